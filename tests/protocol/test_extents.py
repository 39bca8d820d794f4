"""ExtentList: ascending, contiguous, without empty or equal neighbours, however it is built."""

from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.extents import DATA, HOLE, ZERO, Extent, ExtentList

PAIRS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([DATA, ZERO, HOLE, 8])), max_size=20)
OFFSETS = st.integers(0, 2**63)


def per_byte(extents: ExtentList) -> list[int]:
    """The flags of each byte: what a list means, however it is cut."""
    return [extent.flags for extent in extents for _ in range(extent.length)]


@given(OFFSETS, PAIRS)
def test_building_keeps_what_is_said_of_every_byte(
    offset: int, pairs: list[tuple[int, int]]
) -> None:
    extents = ExtentList(offset, pairs)
    assert [flags for length, flags in pairs for _ in range(length)] == per_byte(extents)
    assert (offset, sum(length for length, _ in pairs)) == (extents.offset, extents.length)
    assert offset + extents.length == extents.end


@given(OFFSETS, PAIRS)
def test_no_extent_is_empty_and_no_neighbours_are_equal(
    offset: int, pairs: list[tuple[int, int]]
) -> None:
    extents = ExtentList(offset, pairs)
    assert all(extent.length > 0 for extent in extents)
    assert all(one.flags != two.flags for one, two in pairwise(extents))
    assert len(list(groupby(per_byte(extents)))) == len(extents)


@given(OFFSETS, PAIRS)
def test_ranges_are_ascending_and_contiguous_from_offset_to_end(
    offset: int, pairs: list[tuple[int, int]]
) -> None:
    extents = ExtentList(offset, pairs)
    at = offset
    for start, length, _ in extents.ranges():
        assert at == start
        at += length
    assert extents.end == at
    assert [(e.length, e.flags) for e in extents] == [(n, f) for _, n, f in extents.ranges()]


@given(OFFSETS, PAIRS)
def test_building_again_changes_nothing(offset: int, pairs: list[tuple[int, int]]) -> None:
    extents = ExtentList(offset, pairs)
    again = ExtentList(offset, [(e.length, e.flags) for e in extents])
    assert extents == again
    assert hash(extents) == hash(again)


@given(OFFSETS, PAIRS, PAIRS)
def test_lists_are_equal_exactly_when_they_say_the_same(
    offset: int, one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    left, right = ExtentList(offset, one), ExtentList(offset, two)
    assert (per_byte(left) == per_byte(right)) == (left == right)
    assert left != ExtentList(offset + 1, one)


@given(OFFSETS, PAIRS)
def test_first_is_the_first_extent_alone(offset: int, pairs: list[tuple[int, int]]) -> None:
    extents = ExtentList(offset, pairs)
    assert (offset, list(extents)[:1]) == (extents.first().offset, list(extents.first()))


@pytest.mark.parametrize(
    ("offset", "pairs"), [(-1, []), (-1, [(1, DATA)]), (0, [(-1, DATA)]), (0, [(5, 0), (-5, 1)])]
)
def test_negative_numbers_are_no_extents(offset: int, pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="negative"):
        ExtentList(offset, pairs)


def test_lengths_beyond_32_bits_merge_without_loss() -> None:
    extents = ExtentList(0, [(0xFFFFFFFF, HOLE), (0xFFFFFE00, HOLE), (1 << 40, ZERO)])
    assert [Extent(0x1FFFFFDFF, HOLE), Extent(1 << 40, ZERO)] == list(extents)


def test_an_empty_list_ends_where_it_begins() -> None:
    extents = ExtentList(7, [(0, DATA), (0, HOLE)])
    assert (7, 0, []) == (extents.end, len(extents), list(extents.ranges()))


def test_the_three_states_are_base_allocation_values() -> None:
    assert (0, 2, 3) == (DATA, ZERO, HOLE)


def test_a_long_list_is_shown_short() -> None:
    shown = repr(ExtentList(1, [(n + 1, n % 2) for n in range(1000)]))
    assert shown.startswith("ExtentList(1, [1:0x0, 2:0x1, ")
    assert shown.endswith(", ...])")
    assert len(shown) < 100


def test_a_list_is_not_equal_to_something_else() -> None:
    assert ExtentList(0, [(1, 0)]) != [Extent(1, 0)]
