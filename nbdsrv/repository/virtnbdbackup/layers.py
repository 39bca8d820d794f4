"""A chain of files laid over each other.

::

    newest   |      |##|      |0|                |##|            layer 0
             |   |##|                |##|                        layer 1
    oldest   |############   ##########     #########|           layer 2: the whole disk
             ----------------------------------------
    pieces   |2  |1 |0 |2 |   |0|2 |1|2|    |2  |0 |             ``over``, of one range

Each file's entries are looked up by bisection, and only where no newer file has something: the cost
of a page is that of its pieces, not of the disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nbdsrv.repository.virtnbdbackup.index import Index

__all__ = ["FAULT", "Layer", "Piece", "over", "ranges_in"]

FAULT = -1
"""The entry of a piece of which the file cannot tell what it is."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A file of a chain.

    Attributes:
        index: where its extents are.
        bound: bytes of the disk it may show: the disk may have been larger once.
    """

    index: Index
    bound: int


class Piece(NamedTuple):
    """A range of the disk, and the entry of the layer that has it."""

    start: int
    end: int
    layer: int
    entry: int


def over(layers: Sequence[Layer], offset: int, end: int) -> list[Piece]:
    """What is seen of a range from above; ascending, with gaps where no layer has anything."""
    pieces: list[Piece] = []
    gaps = [(offset, end)]
    for number, layer in enumerate(layers):
        left: list[tuple[int, int]] = []
        for start, stop in gaps:
            at = start
            for piece in _entries(layer, number, start, min(stop, layer.bound)):
                if piece.start > at:
                    left.append((at, piece.start))
                pieces.append(piece)
                at = piece.end
            if at < stop:
                left.append((at, stop))
        gaps = left
        if not gaps:
            break
    pieces.sort()
    return pieces


def _entries(layer: Layer, number: int, start: int, end: int) -> Iterator[Piece]:
    index = layer.index
    known = min(end, index.end) if index.fault is not None else end
    starts, lengths = index.starts, index.lengths
    entry = index.first(start)
    while entry < len(starts) and starts[entry] < known:
        begin = max(starts[entry], start)
        yield Piece(begin, min(starts[entry] + lengths[entry], known), number, entry)
        entry += 1
    if max(start, known) < end:
        yield Piece(max(start, known), end, number, FAULT)


def ranges_in(index: Index, bound: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """What a file says it holds of a range: (start, end), ascending. Unknown counts as held."""
    for piece in _entries(Layer(index, bound), 0, offset, min(end, bound)):
        yield piece.start, piece.end
