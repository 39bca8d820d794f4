"""VHDs we write: read by QEMU, by us, and field by field as the facts about readers demand."""

import os
import struct
import time
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.vhd.writer import BLOCK, VhdWriter
from nbdsrv.formats.vhd.writer_structs import geometry
from nbdsrv.formats.writer import Plan
from tests.disk.check_disk import check_disk
from tests.formats.images import Image
from tests.formats.written import MIB, WRITTEN, qemu_size, same_as, write

GIB = 1 << 30
EPOCH = 946684800


async def made(path: Path, workers: Workers, image: Image, *, seekable: bool = True) -> bytes:
    target = TargetFile(str(path))
    target.seekable = seekable
    if not seekable:  # a file that is written as if it were a pipe
        target.open = lambda: setattr(target, "fd", os.open(path, os.O_WRONLY | os.O_CREAT))  # type: ignore[method-assign]
    return await write(VhdWriter(workers, target), image)


@pytest.mark.parametrize("seekable", [True, False], ids=["file", "pipe"])
@pytest.mark.parametrize("image", WRITTEN, ids=lambda image: image.name)
async def test_qemu_and_we_read_what_was_written(
    tmp_path: Path, workers: Workers, image: Image, *, seekable: bool
) -> None:
    path = tmp_path / "disk.vhd"
    golden = await made(path, workers, image, seekable=seekable)
    rounded = golden + bytes(-len(golden) % 512)
    assert qemu_size(path, "vpc") == len(rounded)
    same_as(golden, path, "vpc")

    async def open_disk() -> Disk:
        return await open_image(str(path), "vhd", Opening(workers))

    if image.size < MIB:
        await check_disk(open_disk, rounded)
        return
    disk = await open_disk()
    content = bytearray(disk.size)
    await disk.read_into(0, memoryview(content))
    await disk.close()
    assert content == rounded


def sum_is_right(structure: bytes, at: int) -> bool:
    (found,) = struct.unpack_from(">I", structure, at)
    zeroed = structure[:at] + bytes(4) + structure[at + 4 :]
    return bool(found == ~sum(zeroed) & 0xFFFFFFFF)


@pytest.mark.parametrize("seekable", [True, False], ids=["file", "pipe"])
async def test_every_field(tmp_path: Path, workers: Workers, *, seekable: bool) -> None:
    path = tmp_path / "disk.vhd"
    golden = await made(path, workers, WRITTEN[4], seekable=seekable)
    file = path.read_bytes()
    footer, header = file[:512], file[512:1536]
    assert file[-512:] == footer
    assert footer[:8] == b"conectix"
    features, version, data_offset, stamp = struct.unpack_from(">IIQI", footer, 8)
    assert (features, version, data_offset) == (2, 0x10000, 512)
    assert abs(stamp + EPOCH - time.time()) < 60
    assert footer[28:36] == b"tap\0" + bytes.fromhex("00010003")
    size = len(golden) + -len(golden) % 512
    assert struct.unpack_from(">QQ", footer, 40) == (size, size)
    cylinders, heads, track = struct.unpack_from(">HBB", footer, 56)
    assert cylinders * heads * track * 512 <= size
    assert struct.unpack_from(">I", footer, 60) == (3,)
    assert sum_is_right(footer, 64)
    assert any(footer[68:84])
    assert footer[84:] == bytes(428)

    assert header[:8] == b"cxsparse"
    assert struct.unpack_from(">QQIII", header, 8) == (2**64 - 1, 1536, 0x10000, 36, BLOCK)
    assert sum_is_right(header, 36)
    assert header[40:] == bytes(1024 - 40)

    bat = struct.unpack_from(">36I", file, 1536)
    present = [number for number, sector in enumerate(bat) if sector != 0xFFFFFFFF]
    assert present == [0, 2, 3, 4, 34, 35]
    assert file[1536 + 4 * 36 : 2048] == b"\xff" * (512 - 4 * 36)
    first = 2048 + 1024
    assert [bat[number] * 512 for number in present] == [
        first + index * (512 + BLOCK) for index in range(6)
    ]
    for number in present:
        at = bat[number] * 512
        assert file[at : at + 512] == b"\xff" * 512
        expected = golden[number * BLOCK : (number + 1) * BLOCK].ljust(BLOCK, b"\0")
        assert file[at + 512 : at + 512 + BLOCK] == expected
    assert len(file) == first + 6 * (512 + BLOCK) + 512


async def test_tapdisks_batmap_tells_of_full_blocks(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhd"
    await made(path, workers, WRITTEN[4])
    file = path.read_bytes()
    assert file[2048:2056] == b"tdbatmap"
    offset, sectors, version, checksum = struct.unpack_from(">QIII", file, 2056)
    assert (offset, sectors, version) == (2560, 1, 0x00010002)
    bits = file[offset : offset + 512]
    assert checksum == ~sum(bits) & 0xFFFFFFFF
    assert [n for n in range(36) if bits[n >> 3] & (0x80 >> (n & 7))] == [0, 2, 3, 4, 34, 35]


async def test_no_two_are_alike(tmp_path: Path, workers: Workers) -> None:
    identities = set()
    for number in range(3):
        path = tmp_path / f"{number}.vhd"
        await made(path, workers, WRITTEN[0])
        identities.add(path.read_bytes()[68:84])
    assert len(identities) == 3


async def test_the_largest_there_is_and_one_sector_more(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhd"
    most = 2040 * GIB
    writer = VhdWriter(workers, TargetFile(str(path)))
    await writer.open(most)
    await writer.begin(Plan(most, lambda: iter([(most - BLOCK, BLOCK)])))
    await writer.data(most - BLOCK, memoryview(b"z" * BLOCK))
    await writer.finish()
    assert qemu_size(path, "vpc") == most
    path.unlink()
    writer = VhdWriter(workers, TargetFile(str(path)))
    with pytest.raises(UnsupportedImage, match="at most 2040 GiB"):
        await writer.open(most + 1)
    await writer.abort()
    assert os.listdir(tmp_path) == []


async def test_an_aborted_image_is_not_there(tmp_path: Path, workers: Workers) -> None:
    writer = VhdWriter(workers, TargetFile(str(tmp_path / "disk.vhd")))
    await writer.open(10 * MIB)
    await writer.begin(Plan(10 * MIB, lambda: iter([(0, BLOCK)])))
    await writer.data(0, memoryview(bytes(BLOCK)))
    await writer.abort()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # The appendix's formula by hand; qemu-img rounds up where these are rounded down.
        (64 * MIB, (963, 8, 17)),
        (1 * GIB, (2080, 16, 63)),
        (127 * GIB, (65278, 16, 255)),
        (2040 * GIB, (65535, 16, 255)),
        (512, (0, 4, 17)),
    ],
)
def test_geometry(size: int, expected: tuple[int, int, int]) -> None:
    assert tuple(geometry(size // 512).values()) == expected
