"""Which piece is where, and what differs, against a model byte by byte."""

import hashlib
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.pieces import MAX_PIECE, MisfitError, Pieces

NAMES = st.integers(0, 3)
CUTS = st.lists(st.tuples(NAMES, st.integers(0, 5)), max_size=60)


def id_of(name: int, size: int) -> bytes:
    return hashlib.sha256(bytes([name, size])).digest()


def pieces_of(cuts: list[tuple[int, int]], lost: frozenset[int] = frozenset()) -> Pieces:
    sizes = array("q", [-1 if n in lost else size for n, (_, size) in enumerate(cuts)])
    ids = b"".join(id_of(*cut) for cut in cuts)
    return Pieces(sum(size for _, size in cuts), ids, sizes)


def model(cuts: list[tuple[int, int]]) -> list[tuple[bytes, int]]:
    """Of each byte: its piece, and where that begins."""
    found: list[tuple[bytes, int]] = []
    for cut in cuts:
        begin = len(found)
        found += [(id_of(*cut), begin)] * cut[1]
    return found


@given(CUTS, st.data())
def test_between(cuts: list[tuple[int, int]], data: st.DataObject) -> None:
    lost = data.draw(st.frozensets(st.integers(0, max(len(cuts) - 1, 0)), max_size=3))
    pieces, expected = pieces_of(cuts, lost), model(cuts)
    size = len(expected)
    offset = data.draw(st.integers(0, size))
    end = data.draw(st.integers(offset, size))
    at = offset
    for index, begin, stop in pieces.between(offset, end):
        assert begin <= at < stop
        for byte in range(at, min(stop, end)):
            if index < 0:
                assert pieces.gap[0] <= byte < pieces.gap[1]
            else:
                assert (pieces.id(index), begin) == expected[byte]
        at = min(stop, end)
    assert at == end
    places = [n for n, (_, length) in enumerate(cuts) if n in lost and length]
    if not places:
        assert pieces.gap[0] == pieces.gap[1] or lost


@given(CUTS, CUTS, st.data())
def test_changes(
    cuts: list[tuple[int, int]], others: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Also where long stretches are equal, and compared at a time."""
    shared = data.draw(CUTS) * data.draw(st.integers(1, 4))
    cuts, others = cuts + shared, others + shared
    if data.draw(st.booleans()):
        others = cuts[: len(cuts) // 2] + others
    mine, theirs = pieces_of(cuts), pieces_of(others)
    one, two = model(cuts), model(others)
    offset = data.draw(st.integers(0, len(one)))
    length = data.draw(st.integers(0, len(one) - offset))
    flags = b"".join(bytes([f]) * n for n, f in mine.changes(theirs, offset, length))
    expected = bytes(at >= len(two) or one[at] != two[at] for at in range(offset, offset + length))
    assert expected == flags


@pytest.mark.parametrize(
    ("size", "sizes", "error"),
    [
        (5, [3, 3], "more than its 5 bytes"),
        (7, [3, 3], "have 6 bytes, it should have 7"),
        (5, [3, -1, 3], "more than its 5 bytes"),
        (MAX_PIECE + 1, [MAX_PIECE + 1], "more than 67108864"),
        (3, [3, 0, 0, 0], "4 sizes for 64 bytes"),
    ],
)
def test_what_does_not_fit(size: int, sizes: list[int], error: str) -> None:
    ids = bytes(32 * min(len(sizes), 3))
    if len(sizes) > 3:
        ids = bytes(64)
    with pytest.raises(MisfitError, match=error):
        Pieces(size, ids, array("q", sizes))
