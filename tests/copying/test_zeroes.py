"""Finding zeroes in data."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.copying.zeroes import first_nonzero, is_zero, split

UNIT = 16


def slowly(content: bytes, unit: int) -> list[tuple[int, int, bool]]:
    """What ``split`` must say, unit by unit."""
    found: list[tuple[int, int, bool]] = []
    for start in range(0, len(content), unit):
        part = content[start : start + unit]
        zero = not any(part)
        if found and found[-1][2] == zero:
            found[-1] = (found[-1][0], found[-1][1] + len(part), zero)
        else:
            found.append((start, len(part), zero))
    return found


@given(
    units=st.lists(st.sampled_from([bytes(UNIT), b"\0" * (UNIT - 1) + b"x", b"y" * UNIT])),
    tail=st.binary(max_size=UNIT - 1),
    behind=st.binary(max_size=40),
)
def test_split_is_what_looking_at_every_byte_says(
    units: list[bytes], tail: bytes, behind: bytes
) -> None:
    content = b"".join(units) + tail
    block = bytearray(content + behind)
    assert list(split(block, len(content), UNIT)) == slowly(content, UNIT)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 1 << 20, (2 << 20) + 1, 5 << 20])
def test_one_byte_anywhere_makes_it_data(length: int) -> None:
    block = bytearray(length)
    assert is_zero(block, 0, length)
    assert first_nonzero(block, 0, length) is None
    assert list(split(block, length, 4096)) == [(0, length, True)]
    for where in {0, length // 2, length - 1, random.Random(length).randrange(length)}:
        block[where] = 1
        assert not is_zero(block, 0, length)
        assert first_nonzero(block, 0, length) == where
        assert is_zero(block, where + 1, length)
        assert is_zero(block, 0, where)
        data = [(at, n) for at, n, zero in split(block, length, 4096) if not zero]
        assert data == [(where // 4096 * 4096, min(4096, length - where // 4096 * 4096))]
        block[where] = 0


def test_nothing_is_zero_and_has_no_spans() -> None:
    assert is_zero(bytearray(), 0, 0)
    assert first_nonzero(bytearray(b"x"), 1, 1) is None
    assert list(split(bytearray(b"abc"), 0, 4096)) == []
