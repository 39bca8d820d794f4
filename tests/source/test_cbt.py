"""Bitmaps of changed blocks, and the Disk that tells of them."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.source.cbt import CONTEXT, GRANULARITY, Bitmap, CbtDisk
from tests.disk.check_disk import check_disk

G = GRANULARITY


def packed(blocks: list[bool]) -> bytes:
    """Independent of the reader: as a number in binary."""
    text = "".join("1" if block else "0" for block in blocks)
    text += "0" * (-len(text) % 8)
    return int(text or "0", 2).to_bytes(len(text) // 8, "big")


def told(bitmap: Bitmap, offset: int, length: int) -> list[bool]:
    """By byte would take too long: by sector."""
    found: list[bool] = []
    at = offset
    while at < offset + length:
        extents = bitmap.extents(at, offset + length - at)
        assert extents.offset == at
        assert 0 < extents.length <= offset + length - at
        for extent in extents:
            found += [bool(extent.flags)] * (extent.length // 512)
        at = extents.end
    return found


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(1, G // 512), st.data())
def test_bits_are_ranges(blocks: list[bool], last: int, data: st.DataObject) -> None:
    size = (len(blocks) - 1) * G + last * 512
    bitmap = Bitmap(packed(blocks), size)
    sectors = [blocks[at // G] for at in range(0, size, 512)]
    low = data.draw(st.integers(0, len(sectors) - 1))
    high = data.draw(st.integers(low + 1, len(sectors)))
    assert sectors[low:high] == told(bitmap, low * 512, (high - low) * 512)
    assert 512 * sum(sectors) == bitmap.changed


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(2, 12))
def test_too_many_ranges_are_joined_never_lost(blocks: list[bool], limit: int) -> None:
    size = len(blocks) * G
    bitmap = Bitmap(packed(blocks), size, limit)
    found = told(bitmap, 0, size)[:: G // 512]
    assert all(said for said, block in zip(found, blocks, strict=True) if block)
    assert len(bitmap._starts) <= limit


@pytest.mark.parametrize("size", [1, G, G * 8, G * 8 + 1, (2 << 20) * 3 + 512])
def test_a_bitmap_of_another_length_is_not_this_disks(size: int) -> None:
    blocks = -(-size // G)
    length = -(-blocks // 8)
    assert 0 == Bitmap(bytes(length), size).changed
    for wrong in (length - 1, length + 1):
        with pytest.raises(ValueError, match=f"has {wrong} bytes, a disk of {size} bytes takes"):
            Bitmap(bytes(wrong), size)


def test_bits_beyond_the_end_are_nobodys() -> None:
    bitmap = Bitmap(b"\xff", G * 3 - 512)
    assert G * 3 - 512 == bitmap.changed
    assert [(G * 3 - 512, 1)] == [(e.length, e.flags) for e in bitmap.extents(0, G * 3 - 512)]


def test_a_dense_bitmap_of_two_tebibytes() -> None:
    bitmap = Bitmap(b"\xaa" * (4 << 20), 2 << 40)
    assert 1 << 40 <= bitmap.changed <= 2 << 40
    assert len(bitmap._starts) <= 1 << 18
    extents = bitmap.extents((1 << 40) + 5, 1 << 39)
    assert 0 < len(extents) <= 1 << 17


async def test_the_contract(tmp_path: Path, workers: Workers) -> None:
    golden = random.Random(3).randbytes((1 << 20) + 70_000)
    (tmp_path / "disk").write_bytes(golden)
    bits = bytes([0b10100000, 0b00000001, 0b10000000])

    async def open_disk() -> Disk:
        inside = await open_image(str(tmp_path / "disk"), "raw", Opening(workers))
        return CbtDisk(workers, inside, Bitmap(bits, len(golden)))

    await check_disk(open_disk, golden)
    disk = await open_disk()
    assert CONTEXT in disk.contexts
    found = [(e.length, e.flags) for e in await disk.status(CONTEXT, 100, len(golden) - 100)]
    expected = [(G - 100, 1), (G, 0), (G, 1), (G * 12, 0), (G * 2, 1), (70_000 - G, 0)]
    assert expected == found
    await disk.close()


async def test_a_disk_of_another_size(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "disk").write_bytes(bytes(G))
    inside = await open_image(str(tmp_path / "disk"), "raw", Opening(workers))
    with pytest.raises(DiskError, match=f"has {G} bytes, its bitmap is for 100"):
        CbtDisk(workers, inside, Bitmap(b"\0", 100))
    await inside.close()
