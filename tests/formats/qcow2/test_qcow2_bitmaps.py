"""Persistent dirty bitmaps are told as QEMU's own NBD server tells them."""

import json
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.qcow2.bitmaps import _runs
from tests.disk.check_disk import check_disk, extent_map
from tests.formats.qcow2.peer import create, opener, qemu_img, qemu_io, read_by_qemu, refusal

PREFIX = "qemu:dirty-bitmap:"
AUTOCLEAR = 88


def add(path: Path, name: str, granularity: int = 65536) -> None:
    qemu_img("bitmap", "--add", "-g", str(granularity), path, name)


def bits_by_qemu(path: Path, bitmap: str) -> bytes:
    """The flag of every byte, as qemu-nbd tells nbdinfo."""
    for program in ("nbdinfo", "qemu-nbd"):
        if shutil.which(program) is None:
            assert os.environ.get("CI") != "true", f"{program} is expected here"
            pytest.skip(f"{program} is not installed")
    server = ["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, path, "]"]
    command = ["nbdinfo", "--json", f"--map={PREFIX}{bitmap}", *server]
    told = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return b"".join(bytes([e["type"]]) * e["length"] for e in json.loads(told.stdout))


@pytest.mark.parametrize(
    ("granularity", "cluster"), [(65536, "64k"), (512, "512"), (512, "64k"), (262144, "4k")]
)
async def test_as_qemu_tells_it(
    tmp_path: Path, workers: Workers, granularity: int, cluster: str
) -> None:
    path = create(tmp_path / "disk.qcow2", "5000k", "-o", f"cluster_size={cluster}")
    add(path, "b0", granularity)
    chance = random.Random(granularity)
    for _ in range(6):
        offset = chance.randrange(4900) * 1024
        qemu_io(path, f"write -P 1 {offset} {chance.choice((512, 4096, 70000)) // 512 * 512}")
    disk = await opener(path, workers)()
    assert PREFIX + "b0" in disk.contexts
    found = await extent_map(disk, PREFIX + "b0")
    await disk.close()
    assert 0 < found.count(1) < len(found)
    assert found == bits_by_qemu(path, "b0")


async def test_several_bitmaps_keep_the_contract(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "700k")
    add(path, "first")
    qemu_io(path, "write -P 1 0 64k")
    add(path, "second", 4096)
    qemu_io(path, "write -P 2 128k 4k")
    golden = read_by_qemu(path)
    disk = await opener(path, workers)()
    assert disk.contexts[2:] == (PREFIX + "first", PREFIX + "second")
    second = await extent_map(disk, PREFIX + "second")
    assert second == bytes(128 << 10) + b"\1" * 4096 + bytes((700 - 132) << 10)
    await disk.close()
    await check_disk(opener(path, workers), golden)


async def test_all_ones_need_no_data(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "4M", "-o", "cluster_size=512")
    add(path, "all", 512)
    qemu_io(path, "write -z 0 4M")
    disk = await opener(path, workers)()
    assert set(await extent_map(disk, PREFIX + "all")) == {1}
    await disk.close()


def patched(path: Path, changes: dict[int, bytes]) -> None:
    image = bytearray(path.read_bytes())
    for at, data in changes.items():
        image[at : at + len(data)] = data
    path.write_bytes(image)


def directory_of(path: Path) -> int:
    """Where the bitmap directory lies."""
    image = path.read_bytes()
    at = image.index(struct.pack(">I", 0x23852875), 100) + 8
    (position,) = struct.unpack_from(">Q", image, at + 16)
    assert isinstance(position, int)
    return position


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "disk.qcow2", "1M")
    add(path, "b0")
    qemu_io(path, "write -P 1 0 64k")
    return path


async def offered(path: Path, workers: Workers) -> tuple[str, ...]:
    disk = await opener(path, workers)()
    await disk.close()
    return disk.contexts[2:]


async def test_one_that_is_in_use_is_not_offered(image: Path, workers: Workers) -> None:
    assert await offered(image, workers) == (PREFIX + "b0",)
    patched(image, {directory_of(image) + 12: struct.pack(">I", 3)})
    assert await offered(image, workers) == ()
    disk = await opener(image, workers)()
    listed = disk.facts["bitmaps"]
    assert isinstance(listed, list)
    assert (listed[0]["in_use"], listed[0]["served"]) == (True, False)
    with pytest.raises(DiskError):
        await disk.status(PREFIX + "b0", 0, 512)
    await disk.close()


async def test_none_is_offered_without_the_autoclear_bit(image: Path, workers: Workers) -> None:
    patched(image, {AUTOCLEAR: bytes(8)})
    assert await offered(image, workers) == ()


async def test_none_is_offered_for_a_snapshot(image: Path, workers: Workers) -> None:
    qemu_img("snapshot", "-c", "then", image)
    disk = await opener(image, workers, snapshot="then")()
    assert disk.contexts[2:] == ()
    await disk.close()


async def test_unknown_kinds_are_not_offered(image: Path, workers: Workers) -> None:
    patched(image, {directory_of(image) + 16: b"\2"})
    assert await offered(image, workers) == ()


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\xff" * 8),  # the table is nowhere
        (0, (1000).to_bytes(8, "big")),  # nor aligned
        (8, (7).to_bytes(4, "big")),  # not as large as the disk needs
        (17, b"\x40"),  # granularity
        (18, b"\xff\xff"),  # a name beyond the directory
        (20, b"\xff" * 4),  # likewise its extra data
        (24, b"\xff"),  # not UTF-8
    ],
)
async def test_a_broken_directory(image: Path, workers: Workers, at: int, value: bytes) -> None:
    patched(image, {directory_of(image) + at: value})
    assert isinstance(await refusal(image, workers), CorruptImage)


@pytest.mark.parametrize(
    "entry", [b"\xff" * 8, (2).to_bytes(8, "big"), (1 << 40).to_bytes(8, "big")]
)
async def test_a_broken_table(image: Path, workers: Workers, entry: bytes) -> None:
    directory = directory_of(image)
    (table,) = struct.unpack_from(">Q", image.read_bytes(), directory)
    patched(image, {table: entry})
    disk = await opener(image, workers)()
    with pytest.raises(CorruptImage, match=f"at {table}|beyond the end"):
        await disk.status(PREFIX + "b0", 0, 1 << 20)
    await disk.close()


@given(st.binary(max_size=64))
@settings(max_examples=200)
def test_runs_of_bits_are_the_bits(bits: bytes) -> None:
    naive = [byte >> bit & 1 for byte in bits for bit in range(8)]
    assert [flag for count, flag in _runs(bits) for _ in range(count)] == naive
