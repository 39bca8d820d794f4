"""Disks one after the other keep the contract, and borders between them show nowhere."""

import os
from pathlib import Path

import pytest

from nbdsrv.disk.concat import Concat
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.raw import open_raw
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.formats.images import Image

PARTS = (
    Image("first", 100_001, ((0, 70_000),)),
    Image("second", 1, ((0, 1),)),
    Image("third", 300_000, ((200_000, 100_000),)),
)


async def opened(directory: Path, workers: Workers) -> Disk:
    names = [str(directory / part.name) for part in PARTS]
    disks = [await open_raw(name, workers, writable=False) for name in names]
    return Concat(workers, "together", disks)


@pytest.fixture
def golden(tmp_path: Path) -> bytes:
    return b"".join(part.make(str(tmp_path / part.name)) for part in PARTS)


async def test_contract(tmp_path: Path, golden: bytes, workers: Workers) -> None:
    await check_disk(lambda: opened(tmp_path, workers), golden)


async def test_a_read_that_fails_says_where_on_the_whole(
    tmp_path: Path, golden: bytes, workers: Workers
) -> None:
    disk = await opened(tmp_path, workers)
    os.truncate(tmp_path / "third", 250_000)
    with pytest.raises(DiskError) as raised:
        await content(disk, 50_000, len(golden) - 50_000)
    assert raised.value.offset == 100_002 + 250_000
    await disk.close()


async def test_extents_stop_at_the_end_of_a_part(
    tmp_path: Path, golden: bytes, workers: Workers
) -> None:
    disk = await opened(tmp_path, workers)
    assert (await disk.extents(10, len(golden) - 10)).length == 100_001 - 10
    assert (await disk.extents(100_001, 500)).length == 1
    await disk.close()
