"""Ranges: joined, asked about, cut into steps."""

from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.backup.ranges import ranges_within, steps, together, whole
from nbdsrv.copying.survey import DataMap

RANGES = st.lists(st.tuples(st.integers(0, 900), st.integers(1, 99)), max_size=8).map(sorted)
SIZE = 1000


def members(ranges: DataMap) -> set[int]:
    return {n for start, length in ranges.ranges() for n in range(start, start + length)}


@given(one=RANGES, other=RANGES, unit=st.sampled_from([1, 8, 64]))
def test_together_is_the_union_in_whole_units(
    one: list[tuple[int, int]], other: list[tuple[int, int]], unit: int
) -> None:
    found = together(SIZE, unit, [one, other])
    touched = {n // unit for at, span in (*one, *other) for n in range(at, at + span)}
    assert members(found) == {n for n in range(SIZE) if n // unit in touched}


@given(told=RANGES, data=RANGES, piece=st.sampled_from([64, 128]))
def test_steps_cover_what_is_told_once(
    told: list[tuple[int, int]], data: list[tuple[int, int]], piece: int
) -> None:
    ranges, there = together(SIZE, 8, [told]), together(SIZE, 8, [data])
    seen: list[int] = []
    for offset, length, is_data in steps(ranges, there, piece):
        assert not is_data or offset // piece == (offset + length - 1) // piece
        seen += range(offset, offset + length)
        assert {n in members(there) for n in range(offset, offset + length)} == {is_data}
    assert seen == sorted(members(ranges))


@given(told=RANGES, offset=st.integers(0, 900), length=st.integers(1, 100))
def test_ranges_within(told: list[tuple[int, int]], offset: int, length: int) -> None:
    ranges = together(SIZE, 8, [told])
    found = [n for at, span in ranges_within(ranges, offset, length) for n in range(at, at + span)]
    assert found == [n for n in range(offset, offset + length) if n in members(ranges)]


def test_a_disk_of_no_bytes() -> None:
    assert list(steps(whole(0, 64), whole(0, 64), 128)) == []
