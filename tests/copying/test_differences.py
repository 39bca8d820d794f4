"""Comparing finds the first byte that differs, exactly."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.copying.compare import compare
from nbdsrv.copying.reading import PIECE
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.copying.disks import MIB, MemoryDisk, pieces
from tests.disk.threads import running_workers

CONTENT = random.Random("compare").randbytes(5 * PIECE + 333)


def changed(content: bytes, *offsets: int) -> bytes:
    copy = bytearray(content)
    for offset in offsets:
        copy[offset] ^= 0x80
    return bytes(copy)


async def difference(
    workers: Workers, one: bytes, other: bytes, *, strict: bool = False
) -> int | None:
    disks = MemoryDisk(workers, one), MemoryDisk(workers, other)
    verdict = await compare(*disks, workers, strict=strict)
    assert verdict.sizes == (len(one), len(other))
    assert verdict.equal == (verdict.difference is None)
    return verdict.difference


async def test_the_same(workers: Workers) -> None:
    assert await difference(workers, CONTENT, CONTENT) is None


@pytest.mark.parametrize(
    "offset",
    [0, 1, 511, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 77, len(CONTENT) - 334, len(CONTENT) - 1],
)
async def test_one_byte(workers: Workers, offset: int) -> None:
    assert await difference(workers, CONTENT, changed(CONTENT, offset)) == offset
    assert await difference(workers, changed(CONTENT, offset), CONTENT) == offset


async def test_the_first_of_several_however_the_reads_end(workers: Workers) -> None:
    other = changed(CONTENT, *range(PIECE + 5, len(CONTENT), 100_000))
    for _ in range(20):
        assert await difference(workers, CONTENT, other) == PIECE + 5


@pytest.mark.parametrize("longer", [1, 511, PIECE, 3 * PIECE + 1])
async def test_a_longer_disk_is_the_same_if_the_rest_is_zeroes(
    workers: Workers, longer: int
) -> None:
    end = len(CONTENT)
    assert await difference(workers, CONTENT, CONTENT + bytes(longer)) is None
    assert await difference(workers, CONTENT + bytes(longer), CONTENT) is None
    tail = bytes(longer - 1) + b"\1"
    assert await difference(workers, CONTENT, CONTENT + tail) == end + longer - 1
    assert await difference(workers, CONTENT + tail, CONTENT) == end + longer - 1
    assert await difference(workers, CONTENT, CONTENT + bytes(longer), strict=True) == end


async def test_nothing_is_like_nothing_and_like_zeroes(workers: Workers) -> None:
    assert await difference(workers, b"", b"") is None
    assert await difference(workers, b"", bytes(MIB)) is None
    assert await difference(workers, bytes(7) + b"x", b"") == 7


async def test_holes_are_not_read(workers: Workers) -> None:
    content, data = pieces(100 * MIB, (10 * MIB, b"x" * MIB), (60 * MIB, b"y" * MIB))
    one = MemoryDisk(workers, content, data)
    other = MemoryDisk(workers, content, [(10 * MIB, MIB), (60 * MIB, MIB), (80 * MIB, 5)])
    verdict = await compare(one, other, workers, strict=True)
    assert verdict.equal
    assert sum(length for _, length in one.reads) == 2 * MIB
    assert sum(length for _, length in other.reads) == 2 * MIB + 5


async def test_a_bad_sector_is_an_error_and_not_a_difference(workers: Workers) -> None:
    one = MemoryDisk(workers, CONTENT, bad=2 * PIECE + 9)
    other = MemoryDisk(workers, CONTENT)
    for pair in ((one, other), (other, one)):
        with pytest.raises(DiskError, match=f"at byte {2 * PIECE + 9} "):
            await compare(*pair, workers, strict=False)
    assert one.under_way == other.under_way == 0


async def test_a_difference_before_the_bad_sector_is_found(workers: Workers) -> None:
    one = MemoryDisk(workers, CONTENT, bad=4 * PIECE)
    other = MemoryDisk(workers, changed(CONTENT, 12345))
    assert (await compare(one, other, workers, strict=False)).difference == 12345
    assert one.under_way == other.under_way == 0


@settings(max_examples=30)
@given(
    one=st.binary(max_size=60),
    other=st.binary(max_size=60),
    common=st.binary(max_size=20),
)
async def test_as_comparing_bytes_says(one: bytes, other: bytes, common: bytes) -> None:
    one, other = common + one, common + other
    size = max(len(one), len(other))
    padded = zip(one.ljust(size, b"\0"), other.ljust(size, b"\0"), strict=True)
    first = next((at for at, (a, b) in enumerate(padded) if a != b), None)
    async with running_workers(2) as workers:
        assert await difference(workers, one, other) == first
