"""Raw images keep the Disk contract: on tmpfs, on a real file system, on a block device."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.raw import open_raw
from tests.disk.check_disk import (
    CONTRACT,
    Check,
    OpenDisk,
    check_disk,
)
from tests.formats.images import IMAGES, Image
from tests.formats.places import PLACES, loop_device

LOOP_IMAGE = Image("loop", 1 << 20, ((0, 65536), (300_000, 70_000), ((1 << 20) - 4096, 4096)))


PARTS = [pytest.param(check, id=check.__name__) for check in CONTRACT]


def opener(workers: Workers, path: str, *, writable: bool = False) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_raw(path, workers, writable=writable)

    return open_disk


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with request.param(tmp_path) as directory:
        yield directory


@pytest.mark.parametrize("check", PARTS)
@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
async def test_read_only(place: str, image: Image, check: Check, workers: Workers) -> None:
    path = os.path.join(place, "disk.img")
    golden = image.make(path)
    before = os.stat(path)
    await check(opener(workers, path), golden)
    after = os.stat(path)
    assert (before.st_mtime_ns, before.st_blocks) == (after.st_mtime_ns, after.st_blocks)


@pytest.mark.parametrize("check", PARTS)
@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
async def test_writable(place: str, image: Image, check: Check, workers: Workers) -> None:
    path = os.path.join(place, "disk.img")
    golden = image.make(path)
    await check(opener(workers, path, writable=True), golden)
    assert os.path.getsize(path) == image.size


async def test_all_of_the_contract_in_one_call(tmp_path: Path, workers: Workers) -> None:
    path = str(tmp_path / "disk.img")
    image = IMAGES[-1]
    golden = image.make(path)
    await check_disk(opener(workers, path, writable=True), golden, extents_granularity=512)


@pytest.mark.parametrize("check", PARTS)
async def test_block_device_read_only(tmp_path: Path, check: Check, workers: Workers) -> None:
    golden = LOOP_IMAGE.make(str(tmp_path / "disk.img"))
    with loop_device(str(tmp_path / "disk.img")) as device:
        await check(opener(workers, device), golden)


@pytest.mark.parametrize("check", PARTS)
async def test_block_device_writable(tmp_path: Path, check: Check, workers: Workers) -> None:
    golden = LOOP_IMAGE.make(str(tmp_path / "disk.img"))
    with loop_device(str(tmp_path / "disk.img")) as device:
        await check(opener(workers, device, writable=True), golden)


async def test_what_was_flushed_to_a_block_device_is_in_its_file(
    tmp_path: Path, workers: Workers
) -> None:
    path = str(tmp_path / "disk.img")
    golden = bytearray(LOOP_IMAGE.make(path))
    with loop_device(path) as device:
        disk = await open_raw(device, workers, writable=True)
        await disk.write(1000, memoryview(b"unaligned"))
        golden[1000:1009] = b"unaligned"
        await disk.zero(4096, 8192, punch=False, fast=False)
        golden[4096:12288] = bytes(8192)
        await disk.flush()
        await disk.close()
        assert Path(path).read_bytes() == bytes(golden)
