"""streamOptimized VMDKs we write: read by QEMU, by us, and byte by byte as the layout demands."""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.vmdk.writer import GRAIN, MAX_SIZE, VmdkWriter
from nbdsrv.formats.writer import Plan
from tests.disk.check_disk import check_disk
from tests.formats.images import Image
from tests.formats.written import MIB, WRITTEN, qemu_img, qemu_size, same_as, write

HEADER = struct.Struct("<4sIIQQQQIQQQB4sH433x")
FIELDS = (
    *("magic", "version", "flags", "capacity", "grain", "descriptor", "descriptor_size"),
    *("entries", "redundant", "directory", "overhead", "unclean", "newlines", "compression"),
)


async def made(path: Path, workers: Workers, image: Image, level: int = 2) -> bytes:
    return await write(VmdkWriter(workers, TargetFile(str(path)), level=level), image)


@pytest.mark.parametrize(
    ("image", "level"),
    [*((image, 2) for image in WRITTEN), (WRITTEN[1], 1), (WRITTEN[1], 6), (WRITTEN[3], 9)],
    ids=str,
)
async def test_qemu_and_we_read_what_was_written(
    tmp_path: Path, workers: Workers, image: Image, level: int
) -> None:
    path = tmp_path / "disk.vmdk"
    golden = await made(path, workers, image, level)
    rounded = golden + bytes(-len(golden) % 512)
    assert qemu_size(path, "vmdk") == len(rounded)
    qemu_img("check", "-f", "vmdk", path)
    same_as(golden, path, "vmdk")

    async def open_disk() -> Disk:
        return await open_image(str(path), "vmdk", Opening(workers))

    if image.size < MIB:
        await check_disk(open_disk, rounded)
        return
    disk = await open_disk()
    content = bytearray(disk.size)
    await disk.read_into(0, memoryview(content))
    await disk.close()
    assert content == rounded


def fields(file: bytes, at: int) -> dict[str, object]:
    return dict(zip(FIELDS, HEADER.unpack_from(file, at), strict=True))


def walk(file: bytes) -> Iterator[tuple[str, int, bytes]]:
    """What follows the overhead, from marker to marker: kind, position, content."""
    at = 128 * 512
    while at < len(file):
        number, size, kind = struct.unpack_from("<QII", file, at)
        if size:
            yield "grain", at, file[at : at + 12 + size]
            at += -(-(12 + size) // 512) * 512
        else:
            name = ("end", "table", "directory", "footer")[kind]
            yield name, at + 512, file[at + 512 : at + 512 + number * 512]
            at += 512 + number * 512
    assert at == len(file)


async def test_the_layout_from_front_to_back(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    golden = await made(path, workers, WRITTEN[4])
    file = path.read_bytes()
    head = fields(file, 0)
    assert head == {
        "magic": b"KDMV",
        "version": 3,
        "flags": 0x30001,
        "capacity": -(-len(golden) // 512),
        "grain": 128,
        "descriptor": 1,
        "descriptor_size": 20,
        "entries": 512,
        "redundant": 0,
        "directory": 2**64 - 1,
        "overhead": 128,
        "unclean": 0,
        "newlines": b"\n \r\n",
        "compression": 1,
    }
    parts = list(walk(file))
    kinds = [kind for kind, _, _ in parts]
    assert kinds[-3:] == ["directory", "footer", "end"]
    assert fields(parts[-2][2], 0) == head | {"directory": parts[-3][1] // 512}

    content = bytearray(-(-len(golden) // GRAIN) * GRAIN)
    places: dict[int, int] = {}
    tables: list[int] = []
    for kind, at, data in parts[:-3]:
        if kind == "grain":
            sector, size = struct.unpack_from("<QI", data)
            assert sector % 128 == 0
            assert sector // 128 > max(places, default=-1)
            places[sector // 128] = at // 512
            unpacked = zlib.decompress(data[12 : 12 + size])
            assert len(unpacked) == GRAIN
            content[sector * 512 : sector * 512 + GRAIN] = unpacked
        else:
            assert kind == "table"
            tables.append(at // 512)
            entries = struct.unpack("<512I", data)
            named = {n % 512: place for n, place in places.items() if place in entries}
            assert {n: place for n, place in enumerate(entries) if place} == named
    assert content[: len(golden)] == golden
    assert content[len(golden) :] == bytes(len(content) - len(golden))
    # 32 MiB a table; the second has no grains and is not there.
    assert len(tables) == 2
    directory = struct.unpack("<3I", parts[-3][2][:12])
    assert directory == (tables[0], 0, tables[1])
    assert all(any(content[n * GRAIN : (n + 1) * GRAIN]) for n in places)


async def test_the_descriptor(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / 'my "disk".vmdk'
    await made(path, workers, WRITTEN[3])
    text = path.read_bytes()[512 : 21 * 512].rstrip(b"\0").decode()
    assert text.startswith("# Disk DescriptorFile\nversion=1\n")
    assert '\ncreateType="streamOptimized"\n' in text
    assert "\nparentCID=ffffffff\n" in text
    assert '\nRDONLY 8192 SPARSE "my disk.vmdk"\n' in text
    keys = dict(re.findall(r'^ddb\.(\S+) = "(.*)"$', text, re.MULTILINE))
    assert keys["adapterType"] == "lsilogic"
    assert int(keys["geometry.cylinders"]) >= 1
    assert (keys["geometry.heads"], keys["geometry.sectors"]) == ("255", "63")
    identity = re.search(r"^CID=([0-9a-f]{8})$", text, re.MULTILINE)
    assert identity is not None
    assert keys["longContentID"].endswith(identity[1])
    assert identity[1] not in {"ffffffff", "fffffffe", "00000000"}


async def test_grains_of_zeroes_within_data_are_left_out(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    writer = VmdkWriter(workers, TargetFile(str(path)))
    content = bytes(4 * GRAIN) + b"x" + bytes(4 * GRAIN - 1)
    await writer.open(len(content))
    await writer.begin(Plan(len(content), lambda: iter([(0, len(content))])))
    await writer.data(0, memoryview(content))
    await writer.finish()
    grains = [data for kind, _, data in walk(path.read_bytes()) if kind == "grain"]
    assert [struct.unpack_from("<Q", data)[0] for data in grains] == [4 * 128]


@pytest.mark.parametrize("size", [0, MAX_SIZE + 1])
async def test_sizes_that_cannot_be(tmp_path: Path, workers: Workers, size: int) -> None:
    writer = VmdkWriter(workers, TargetFile(str(tmp_path / "disk.vmdk")))
    with pytest.raises(UnsupportedImage):
        await writer.open(size)
    await writer.abort()
    assert os.listdir(tmp_path) == []


async def test_an_aborted_image_is_not_there(tmp_path: Path, workers: Workers) -> None:
    writer = VmdkWriter(workers, TargetFile(str(tmp_path / "disk.vmdk")))
    await writer.open(10 * MIB)
    await writer.begin(Plan(10 * MIB, lambda: iter([(0, GRAIN)])))
    await writer.data(0, memoryview(b"x" * GRAIN))
    await writer.abort()
    assert os.listdir(tmp_path) == []
