"""VHDX: what qemu-img makes is read as qemu-img reads it, and what Hyper-V makes as it says."""

import os
import random
import struct
import subprocess
import time
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.vhdx.crc32c import crc32c
from protocol.contexts import ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import OpenDisk, check_disk, extent_map
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.table_images import converted, qemu, read_by_qemu
from tests.formats.vhdx.vhdx_images import (
    BASE_ID,
    BAT_AT,
    CHILD_ID,
    FULL,
    MIB,
    NOT_PRESENT,
    PARTIAL,
    UNDEFINED,
    UNMAPPED,
    Block,
    Vhdx,
    parent_keys,
)
from tests.formats.vhdx.vhdx_images import ZERO as ZEROED
from tests.formats.vhdx.vhdx_images import crc32c as crc32c_bytewise

CONTENTS = (
    Image("hole", MIB + 512),
    Image("scattered", 4 * MIB, ((MIB, 4096), (2 * MIB + 512, MIB), (4 * MIB - 512, 512))),
    Image("odd-tail", 2 * MIB + 1536, ((MIB, 1), (2 * MIB + 1024, 512))),
    Image("sector", 512, ((0, 512),)),
)


def opener(path: str, workers: Workers) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(path, "", Opening(workers))

    return open_disk


def data(seed: int, length: int = MIB) -> bytes:
    return random.Random(seed).randbytes(length)


async def read(path: Path | str, workers: Workers) -> bytes:
    disk = await open_image(str(path), "", Opening(workers))
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


async def refusal(path: Path, workers: Workers) -> str:
    with pytest.raises(DiskError) as raised:
        await read(path, workers)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    for length in (0, 1, 7, 8, 9, 4095):
        raw = data(length, length)
        assert crc32c(raw) == crc32c_bytewise(raw)
        assert crc32c(raw[3:], crc32c(raw[:3])) == crc32c_bytewise(raw)


@pytest.mark.parametrize("image", CONTENTS, ids=lambda image: image.name)
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
async def test_contract(tmp_path: Path, workers: Workers, image: Image, subformat: str) -> None:
    options = f"subformat={subformat},block_size=1M"
    path, golden = converted(tmp_path, image, "vhdx", "-o", options)
    await check_disk(opener(path, workers), golden, extents_granularity=512)


@pytest.mark.parametrize("image", CONTENTS[1:3], ids=lambda image: image.name)
@pytest.mark.parametrize(
    ("subformat", "block_size", "log_size"),
    [("dynamic", "1M", "1M"), ("dynamic", "8M", "3M"), ("dynamic", "256M", "1M"),
     ("fixed", "2M", "4M"), ("dynamic", "0", "32M")],
)  # fmt: skip
async def test_as_qemu_reads_it(
    tmp_path: Path,
    workers: Workers,
    image: Image,
    subformat: str,
    block_size: str,
    log_size: str,
) -> None:
    options = f"subformat={subformat},block_size={block_size},log_size={log_size}"
    path, golden = converted(tmp_path, image, "vhdx", "-o", options)
    disk = await open_image(path, "", Opening(workers))
    assert disk.format == "vhdx"
    assert disk.facts["subformat"] == subformat
    assert str(disk.facts["creator"]).startswith("QEMU")
    assert disk.facts["log_replayed"] is False
    found = await content(disk, 0, disk.size)
    assert found == golden == read_by_qemu(path, "vhdx")
    await disk.close()


@pytest.mark.parametrize(("state", "zero"), [("off", HOLE), ("on", ZERO)])
async def test_map_of_what_qemu_wrote(
    tmp_path: Path, workers: Workers, state: str, zero: int
) -> None:
    path = str(tmp_path / "disk.vhdx")
    qemu(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "vhdx",
        "-o",
        "block_size=1M,block_state_zero=" + state,
        path,
        "6M",
    )
    qemu("qemu-io", "-f", "vhdx", "-c", "write -P 1 1M 4k", "-c", "write -P 2 4M 2M", path)
    disk = await open_image(path, "", Opening(workers))
    expected = [zero, DATA, zero, zero, DATA, DATA]
    assert (await extent_map(disk))[::MIB] == bytes(expected)
    await disk.close()


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_every_state(tmp_path: Path, workers: Workers, sector_size: int) -> None:
    vhdx = Vhdx(size=6 * MIB, sector_size=sector_size)
    states = (FULL, NOT_PRESENT, ZEROED, UNMAPPED, UNDEFINED, FULL)
    vhdx.blocks = {n: Block(state, data(n)) for n, state in enumerate(states)}
    path = vhdx.write(tmp_path / "disk.vhdx")
    disk = await open_image(path, "", Opening(workers))
    assert disk.facts["logical_sector_size"] == sector_size
    assert (await extent_map(disk))[::MIB] == bytes([DATA, HOLE, ZERO, HOLE, HOLE, DATA])
    assert await content(disk, 0, disk.size) == vhdx.content()
    await disk.close()


async def test_more_than_a_chunk(tmp_path: Path, workers: Workers) -> None:
    """With blocks of 256 MiB and sectors of 512 bytes every 16th entry is a bitmap's."""
    vhdx = Vhdx(size=40 << 28, block_size=1 << 28)
    vhdx.blocks = {n: Block(FULL, data(n, 512)) for n in (39, 15, 16, 17, 32, 0, 33)}
    path = vhdx.write(tmp_path / "disk.vhdx")
    disk = await open_image(path, "", Opening(workers))
    for number in range(40):
        expected = vhdx.blocks[number].data if number in vhdx.blocks else bytes(512)
        assert await content(disk, number << 28, 512) == expected
    await disk.close()


async def test_last_block_cut_off_behind_the_end_of_the_disk(
    tmp_path: Path, workers: Workers
) -> None:
    vhdx = Vhdx(size=MIB + 1024, blocks={0: Block(FULL, data(1)), 1: Block(FULL, data(2))})
    path = tmp_path / "disk.vhdx"
    vhdx.write(path)
    os.truncate(path, path.stat().st_size - MIB + 1024)
    assert await read(path, workers) == vhdx.content()
    os.truncate(path, path.stat().st_size - 1)
    assert "beyond the end of the file" in await refusal(path, workers)


async def test_the_largest_disk_opens_and_maps_fast(tmp_path: Path, workers: Workers) -> None:
    path = str(tmp_path / "disk.vhdx")
    qemu("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=32M", path, "64T")
    subprocess.run(
        ["qemu-io", "-f", "vhdx", "-c", "write -P 7 50T 64k", path],
        check=True,
        capture_output=True,
        timeout=60,
    )
    started = time.monotonic()
    disk = await open_image(path, "", Opening(workers))
    opened = time.monotonic()
    assert disk.size == 64 << 40
    assert await content(disk, 50 << 40, 65536) == b"\7" * 65536
    at, present = 0, 0
    while at < disk.size:
        found = await disk.extents(at, disk.size - at)
        present += sum(e.length for e in found if e.flags == DATA)
        at = found.end
    assert present == 32 * MIB
    assert opened - started < 1
    assert time.monotonic() - opened < 20  # a tenth of a second on a quiet machine
    await disk.close()


# --- parents -------------------------------------------------------------------------------------


def base(**fields: object) -> Vhdx:
    vhdx = Vhdx(size=5 * MIB, **fields)  # type: ignore[arg-type]
    vhdx.blocks = {n: Block(FULL, data(n)) for n in (3, 0, 1, 4, 2)}
    return vhdx


def child(**fields: object) -> Vhdx:
    given: dict[str, object] = {
        "size": 5 * MIB,
        "data_write_guid": CHILD_ID,
        "parent": parent_keys("base.vhdx"),
    }
    vhdx = Vhdx(**{**given, **fields})  # type: ignore[arg-type]
    count = MIB // vhdx.sector_size
    some = frozenset(random.Random(5).sample(range(count), count // 3))
    vhdx.blocks = {
        1: Block(PARTIAL, data(11), some),
        0: Block(FULL, data(10)),
        2: Block(UNMAPPED),
        4: Block(PARTIAL, data(14), frozenset({0, 3, count - 1})),
    }
    return vhdx


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_contract_with_a_parent(tmp_path: Path, workers: Workers, sector_size: int) -> None:
    bottom, top = base(sector_size=sector_size), child(sector_size=sector_size)
    bottom.write(tmp_path / "base.vhdx")
    path = top.write(tmp_path / "child.vhdx")
    golden = top.content(bottom.content())
    await check_disk(opener(path, workers), golden, extents_granularity=sector_size)
    disk = await open_image(path, "", Opening(workers))
    depths = await extent_map(disk, ALLOCATION_DEPTH)
    assert depths[::MIB] == bytes([1, 2 - (0 in top.blocks[1].sectors), 1, 2, 1])
    assert disk.facts["subformat"] == "differencing"
    assert disk.facts["parent"] == str(tmp_path / "base.vhdx")
    await disk.close()


@pytest.mark.parametrize("state", [ZEROED, UNMAPPED, UNDEFINED])
async def test_zeroes_hide_the_parent(tmp_path: Path, workers: Workers, state: int) -> None:
    base().write(tmp_path / "base.vhdx")
    vhdx = child()
    vhdx.blocks = {3: Block(state)}
    path = vhdx.write(tmp_path / "child.vhdx")
    assert await read(path, workers) == vhdx.content(base().content())
    assert (await read(path, workers))[3 * MIB : 4 * MIB] == bytes(MIB)


async def test_bitmap_of_a_later_chunk_and_a_block_larger_than_a_page(
    tmp_path: Path, workers: Workers
) -> None:
    size, block_size = 20 << 28, 1 << 28
    Vhdx(size=size, block_size=block_size).write(tmp_path / "base.vhdx")
    vhdx = child(size=size, block_size=block_size)
    sectors = frozenset({0, 7, 8, 131072, 131073, 524287})
    pieces = {sector: data(sector, 512) for sector in sectors}
    vhdx.blocks = {17: Block(PARTIAL, b"", sectors)}
    path = vhdx.write(tmp_path / "child.vhdx")
    with open(path, "r+b") as image:
        image.seek(BAT_AT + 8 * vhdx.index(17))
        start = struct.unpack("<Q", image.read(8))[0] & ~7
        for sector, piece in pieces.items():
            image.seek(start + sector * 512)
            image.write(piece)
    disk = await open_image(path, "", Opening(workers))
    for sector, piece in pieces.items():
        assert await content(disk, 17 * block_size + sector * 512, 512) == piece
    found = await disk.extents(17 * block_size, block_size)
    assert sum(e.length for e in found if e.flags == DATA) == 512 * len(sectors)
    await disk.close()


@pytest.mark.parametrize("size", [2 * MIB + 512, 8 * MIB])
async def test_parent_of_another_size(tmp_path: Path, workers: Workers, size: int) -> None:
    bottom = Vhdx(size=size, blocks={n: Block(FULL, data(n)) for n in range(-(-size // MIB))})
    bottom.write(tmp_path / "base.vhdx")
    path = child().write(tmp_path / "child.vhdx")
    assert await read(path, workers) == child().content(bottom.content())


NAMES = {
    "relative": parent_keys(".\\base.vhdx"),
    "relative, up": parent_keys("..\\here\\base.vhdx"),
    "volume": parent_keys("gone", volume_path="\\\\?\\Volume{26A2-BDA}\\vm\\base.vhdx"),
    "absolute": parent_keys("gone", absolute_win32_path="\\\\?\\d:\\vm\\base.vhdx"),
    "second linkage": parent_keys("base.vhdx", CHILD_ID, parent_linkage2=f"{{{BASE_ID}}}"),
    "upper case": {"parent_linkage": str(BASE_ID).upper(), "relative_path": "base.vhdx"},
}


@pytest.mark.parametrize("name", NAMES)
async def test_parent_found(tmp_path: Path, workers: Workers, name: str) -> None:
    (tmp_path / "here").mkdir()
    base().write(tmp_path / "here" / "base.vhdx")
    path = child(parent=NAMES[name]).write(tmp_path / "here" / "child.vhdx")
    assert await read(path, workers) == child().content(base().content())


async def test_wrong_parent_is_refused_by_both_names_and_ids(
    tmp_path: Path, workers: Workers
) -> None:
    base(data_write_guid=CHILD_ID).write(tmp_path / "base.vhdx")
    child().write(tmp_path / "child.vhdx")
    text = await refusal(tmp_path / "child.vhdx", workers)
    for part in (tmp_path / "child.vhdx", tmp_path / "base.vhdx", BASE_ID, CHILD_ID):
        assert str(part) in text


async def test_missing_parent_is_refused_by_name(tmp_path: Path, workers: Workers) -> None:
    child().write(tmp_path / "child.vhdx")
    text = await refusal(tmp_path / "child.vhdx", workers)
    for part in (tmp_path / "child.vhdx", tmp_path / "base.vhdx", BASE_ID):
        assert str(part) in text


async def test_a_parent_with_other_sectors_is_refused(tmp_path: Path, workers: Workers) -> None:
    base(sector_size=4096).write(tmp_path / "base.vhdx")
    child().write(tmp_path / "child.vhdx")
    text = await refusal(tmp_path / "child.vhdx", workers)
    assert "base.vhdx has sectors of 4096 bytes" in text


async def test_a_loop_is_refused(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "child.vhdx"
    child(parent=parent_keys("child.vhdx", CHILD_ID)).write(path)
    assert "loop" in await refusal(path, workers)


async def test_partial_blocks_need_a_bitmap_and_a_parent(tmp_path: Path, workers: Workers) -> None:
    base().write(tmp_path / "base.vhdx")
    vhdx = child()
    vhdx.bat = {vhdx.ratio: 0}
    vhdx.write(tmp_path / "child.vhdx")
    assert "no sector bitmap" in await refusal(tmp_path / "child.vhdx", workers)
    lonely = base()
    lonely.blocks[2] = Block(PARTIAL, data(2), frozenset({1}))
    lonely.write(tmp_path / "lonely.vhdx")
    disk = await open_image(str(tmp_path / "lonely.vhdx"), "", Opening(workers))
    with pytest.raises(CorruptImage, match="block 2 is in state 7"):
        await content(disk, 0, 512)
    await disk.close()
