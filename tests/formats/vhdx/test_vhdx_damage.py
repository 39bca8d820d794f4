"""VHDX files that are broken: an error that says where, or what the intact copy says."""

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.vhdx.crc32c import crc32c
from tests.disk.reading import content
from tests.formats.mutants import Mutation, attempt, mutations, threads
from tests.formats.vhdx.vhdx_images import (
    BAT_AT,
    CHILD_ID,
    FULL,
    LOG_AT,
    LOG_ID,
    METADATA_AT,
    MIB,
    PARTIAL,
    PAYLOAD_AT,
    Block,
    Vhdx,
    log_entry,
    parent_keys,
    summed,
)

ITEMS_AT = METADATA_AT + (64 << 10)


def image(**fields: object) -> Vhdx:
    vhdx = Vhdx(size=4 * MIB, **fields)  # type: ignore[arg-type]
    vhdx.blocks = {n: Block(FULL, random.Random(n).randbytes(MIB)) for n in (2, 0)}
    return vhdx


def patch(path: Path, *changes: tuple[int, bytes]) -> None:
    with open(path, "r+b") as file:
        for at, value in changes:
            file.seek(at)
            file.write(value)


async def read(path: Path, workers: Workers) -> bytes:
    disk = await open_image(str(path), "vhdx", Opening(workers))
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


async def refusal(path: Path, workers: Workers) -> DiskError:
    with pytest.raises(DiskError) as raised:
        await read(path, workers)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    return raised.value


# --- headers and regions -------------------------------------------------------------------------


async def test_the_newer_header_counts(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhdx"
    vhdx = image()
    for older, newer in ((64 << 10, 128 << 10), (128 << 10, 64 << 10)):
        vhdx.write(path)
        vhdx.data_write_guid = CHILD_ID
        patch(path, (newer, vhdx.header(20)))
        patch(path, (older, image().header(19)))
        disk = await open_image(str(path), "", Opening(workers))
        assert disk.facts["data_write_guid"] == str(CHILD_ID)
        await disk.close()


@pytest.mark.parametrize("at", [64 << 10, 128 << 10, 192 << 10, 256 << 10])
async def test_one_damaged_copy_does_not_matter(tmp_path: Path, workers: Workers, at: int) -> None:
    path = tmp_path / "disk.vhdx"
    image().write(path)
    patch(path, (at + 60, b"\xff"))
    assert await read(path, workers) == image().content()


@pytest.mark.parametrize(
    ("first", "text"), [(64 << 10, "neither VHDX header"), (192 << 10, "neither region table")]
)
async def test_two_damaged_copies(tmp_path: Path, workers: Workers, first: int, text: str) -> None:
    path = tmp_path / "disk.vhdx"
    image().write(path)
    patch(path, (first + 60, b"\xff"), (first + (64 << 10) + 60, b"\xff"))
    assert text in str(await refusal(path, workers))


async def test_two_current_headers(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhdx"
    vhdx = image()
    vhdx.write(path)
    patch(path, (64 << 10, vhdx.header(8)))
    assert await read(path, workers) == vhdx.content()
    vhdx.data_write_guid = CHILD_ID
    patch(path, (64 << 10, vhdx.header(8)))
    assert "two different headers" in str(await refusal(path, workers))


async def test_later_versions(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhdx"
    image(version=2).write(path)
    assert isinstance(await refusal(path, workers), UnsupportedImage)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (8, struct.pack("<I", 0xFFFFFFFF), "4294967295 regions"),
        (8, struct.pack("<I", 1), "there is no region"),
        (16 + 16, struct.pack("<Q", BAT_AT + 4096), "not multiples of 1 MiB"),
        (16 + 16, struct.pack("<Q", 1 << 62), "beyond the end"),
        (16 + 16, struct.pack("<Q", LOG_AT), "overlap"),
        (16 + 16, struct.pack("<Q", 0), "overlap"),
        (16 + 24, struct.pack("<I", 0), "not multiples"),
        (16 + 24, struct.pack("<I", 0xFFF00000), "beyond the end"),
        (16, b"?", "is required, but not known"),
        (16 + 32 + 16, struct.pack("<Q", BAT_AT), "overlap"),
    ],
)
async def test_impossible_regions(
    tmp_path: Path, workers: Workers, at: int, value: bytes, text: str
) -> None:
    path = tmp_path / "disk.vhdx"
    image().write(path)
    raw = bytearray(image().regions(MIB))
    raw[at : at + len(value)] = value
    patch(path, (192 << 10, summed(bytes(raw))))
    assert text in str(await refusal(path, workers))


async def test_regions_that_are_not_required_are_left_alone(
    tmp_path: Path, workers: Workers
) -> None:
    path = tmp_path / "disk.vhdx"
    vhdx = image()
    vhdx.write(path)
    raw = bytearray(vhdx.regions(MIB))
    raw[8] = 3
    raw[80:112] = struct.pack("<16sQII", b"x" * 16, PAYLOAD_AT + 2 * MIB, MIB, 0)
    patch(path, (192 << 10, summed(bytes(raw))))
    with open(path, "r+b") as file:
        file.truncate(PAYLOAD_AT + 3 * MIB)
    assert await read(path, workers) == vhdx.content()


# --- metadata ------------------------------------------------------------------------------------


def entry_at(item: int) -> int:
    return METADATA_AT + 32 * (item + 1)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (METADATA_AT, b"no table", "no metadata table"),
        (METADATA_AT + 10, b"\xff\xff", "65535 metadata items"),
        (METADATA_AT + 10, b"\x04\0", "there is no metadata item cda348c7"),
        (entry_at(0) + 16, struct.pack("<I", 0), "metadata item caa16737"),
        (entry_at(0) + 16, struct.pack("<I", MIB - 4), "metadata item caa16737"),
        (entry_at(0) + 16, struct.pack("<I", 0xFFFFFFFF), "metadata item caa16737"),
        (entry_at(0) + 20, struct.pack("<I", 0), "metadata item caa16737"),
        (entry_at(1) + 20, struct.pack("<I", 0xFFFFFFFF), "metadata item 2fa54224"),
        (entry_at(2), b"?", "is required, but not known"),
        (ITEMS_AT, struct.pack("<I", 0), "blocks of 0 bytes"),
        (ITEMS_AT, struct.pack("<I", 3 * MIB), "blocks of 3145728 bytes"),
        (ITEMS_AT, struct.pack("<I", 512 * MIB), "blocks of 536870912 bytes"),
        (ITEMS_AT + 4, struct.pack("<I", 2), "there is no metadata item a8d35f2d"),
        (ITEMS_AT + 8, struct.pack("<Q", (64 << 40) + 512), "a disk of"),
        (ITEMS_AT + 8, struct.pack("<Q", 1000), "a disk of 1000 bytes"),
        (ITEMS_AT + 8, struct.pack("<Q", 1 << 40), "a block table of 1048576 bytes"),
        (ITEMS_AT + 32, struct.pack("<I", 0), "sectors of 0 bytes"),
        (ITEMS_AT + 32, struct.pack("<I", 1024), "sectors of 1024 bytes"),
    ],
)
async def test_impossible_metadata(
    tmp_path: Path, workers: Workers, at: int, value: bytes, text: str
) -> None:
    path = tmp_path / "disk.vhdx"
    image().write(path)
    patch(path, (at, value))
    assert text in str(await refusal(path, workers))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, b"?", "parents of kind"),
        (18, b"\xff\xff", "65535 keys"),
        (20, struct.pack("<IIHH", 0, 0, 0, 0), "(it does not say which) is not to be found"),
        (20, struct.pack("<IIHH", 1 << 31, 1 << 31, 80, 80), "(it does not say which)"),
        (20, struct.pack("<IIHH", 20, 20, 3, 3), "no UTF-16"),
    ],
)
async def test_impossible_locators(
    tmp_path: Path, workers: Workers, at: int, value: bytes, text: str
) -> None:
    path = tmp_path / "disk.vhdx"
    image(parent=parent_keys("base.vhdx")).write(path)
    patch(path, (ITEMS_AT + 40 + at, value))
    assert text in str(await refusal(path, workers))


# --- block table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (0 | FULL, "on the headers"),
        (LOG_AT | FULL, "on the log"),
        (METADATA_AT | FULL, "on region 8b7ca206"),
        (BAT_AT | FULL, "on region 2dc27766"),
        (PAYLOAD_AT | FULL, "overlaps the block"),
        (PAYLOAD_AT + 2 * MIB | FULL, "beyond the end"),
        ((1 << 64) - MIB | FULL, "beyond the end"),
        (4, "state 4"),
        (5, "state 5"),
        (PAYLOAD_AT | PARTIAL, "overlaps the block"),
    ],
)
async def test_impossible_entries(tmp_path: Path, workers: Workers, entry: int, text: str) -> None:
    path = tmp_path / "disk.vhdx"
    image(bat={3: entry}).write(path)
    error = str(await refusal(path, workers))
    assert text in error
    assert f"at {BAT_AT + 24}: " in error or "overlaps" in error


async def test_an_even_row_of_blocks_that_leads_out_of_the_file(
    tmp_path: Path, workers: Workers
) -> None:
    path = tmp_path / "disk.vhdx"
    vhdx = Vhdx(size=4 * MIB, blocks={0: Block(FULL)})
    vhdx.bat = {n: PAYLOAD_AT + n * MIB | FULL for n in range(4)}
    vhdx.write(path)
    assert "beyond the end" in str(await refusal(path, workers))
    vhdx.bat = {n: LOG_AT + n * MIB | FULL for n in range(4)}
    vhdx.write(path)
    assert "on " in str(await refusal(path, workers))


async def test_a_bitmap_where_it_cannot_be(tmp_path: Path, workers: Workers) -> None:
    image().write(tmp_path / "base.vhdx")
    path = tmp_path / "disk.vhdx"
    vhdx = image(parent=parent_keys("base.vhdx"), data_write_guid=CHILD_ID)
    vhdx.blocks = {1: Block(PARTIAL, b"x", frozenset({0}))}
    for entry, text in ((1 << 50 | 6, "beyond the end"), (METADATA_AT | 6, "on region")):
        vhdx.bat = {vhdx.ratio: entry}
        vhdx.write(path)
        assert text in str(await refusal(path, workers))


async def test_files_cut_off_anywhere(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vhdx"
    image().write(path)
    for length in (0, 8, 600, 64 << 10, (64 << 10) + 100, 200 << 10, MIB, 3 * MIB, PAYLOAD_AT):
        with open(path, "r+b") as file:
            file.truncate(length)
        await refusal(path, workers)
        image().write(path)


# --- mutants -------------------------------------------------------------------------------------

AREAS = (
    (64 << 10, 128),
    (128 << 10, 128),
    (192 << 10, 128),
    (LOG_AT, 8192),
    (METADATA_AT, 256),
    (ITEMS_AT, 600),
    (BAT_AT, 40),
    (BAT_AT + 8 * 4096, 8),
)
"""Where a small image says anything."""
HEADERS = (64 << 10, 128 << 10)
SUMMED = {HEADERS[0]: 4096, HEADERS[1]: 4096, 192 << 10: 64 << 10, LOG_AT: 8192}
"""What has a checksum, as a whole."""


@pytest.fixture(scope="module")
def mutable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a parent, a partial block and a log."""
    path = tmp_path_factory.mktemp("mutants") / "disk.vhdx"
    image().write(path.with_name("base.vhdx"))
    vhdx = image(
        parent=parent_keys("base.vhdx"), data_write_guid=CHILD_ID, log_guid=LOG_ID,
        log={0: log_entry(3, 0, [(BAT_AT + 4096, b"\0" * 4096), (PAYLOAD_AT, 4096)])},
    )  # fmt: skip
    vhdx.blocks[1] = Block(PARTIAL, b"x" * 4096, frozenset({1, 5}))
    vhdx.write(path)
    return path


@settings(max_examples=100, deadline=None)
@given(changes=mutations(sum(length for _, length in AREAS)), logged=strategies.booleans())
def test_mutants(mutable: Path, changes: list[Mutation], logged: bool) -> None:
    """Checksums are made right again, or nothing would get past them."""
    good = {start: _read(mutable, start, length) for start, length in SUMMED.items()}
    good |= {start: _read(mutable, start, length) for start, length in AREAS if start not in good}
    areas = {start: bytearray(raw) for start, raw in good.items()}
    if not logged:
        for start in HEADERS:
            areas[start][48:64] = bytes(16)
    for at, value in changes:
        _change(areas, at, value)
    try:
        for start, raw in areas.items():
            if start in SUMMED and raw != good[start]:
                raw[4:8] = bytes(4)
                raw[4:8] = struct.pack("<I", crc32c(raw))
            patch(mutable, (start, bytes(raw)))
        with threads() as (runner, workers):
            text = runner.run(attempt(str(mutable), "vhdx", workers))
        assert "\n" not in text
    finally:
        patch(mutable, *good.items())


def _change(areas: dict[int, bytearray], at: int, value: bytes) -> None:
    for start, length in AREAS:
        if at < length:
            areas[start][at : at + len(value)] = value[: len(areas[start]) - at]
            return
        at -= length


def _read(path: Path, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)
