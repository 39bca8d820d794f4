"""Unpacking within a limit: exact, bounded, and never another exception."""

import gzip
import lzma
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.unpacking import BrokenPayload, packed_as, unpack

_STREAM = zstandard.ZstdCompressor(write_content_size=False)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstandard.ZstdCompressor().compress,
    "zstd, length not told": _STREAM.compress,
    "xz": lzma.compress,
    "gzip": gzip.compress,
}


@pytest.mark.parametrize("how", PACKERS)
@given(st.binary(max_size=3000))
def test_what_was_packed(how: str, data: bytes) -> None:
    packed = PACKERS[how](data)
    assert packed_as(packed) == how.partition(",")[0]
    assert unpack(packed, len(data)) == data
    assert unpack(memoryview(packed), len(data) + 5) == data
    if data:
        with pytest.raises(BrokenPayload):
            unpack(packed, len(data) - 1)


@pytest.mark.parametrize("how", PACKERS)
def test_a_bomb_costs_its_limit(how: str) -> None:
    packed = PACKERS[how](bytes(1 << 26))
    tracemalloc.start()
    try:
        with pytest.raises(BrokenPayload, match=r"more than|would unpack"):
            unpack(packed, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20  # xz: its dictionary
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("how", PACKERS)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=3), st.integers(0, 400) | st.none())
def test_broken(how: str, at: int, change: bytes, cut: int | None) -> None:
    packed = bytearray(PACKERS[how](b"some words " * 100))
    packed[at : at + len(change)] = change
    try:
        assert len(unpack(bytes(packed[:cut]), 1100)) <= 1100
    except BrokenPayload as error:
        _one_line(error)


def _one_line(error: Exception) -> None:
    assert "\n" not in str(error)
