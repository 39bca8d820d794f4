"""One refcount block: counts of 1 to 64 bits each.

::

    bits   1, 2, 4            8    16    32    64
    file   lowest bits first  |    big endian
    here   a byte per count   |    native

Narrow counts are spread over bytes, so that looking for a zero is one call whatever the width.
"""

import sys
from array import array

from nbdsrv.formats.qcow2.structs import SECTOR

__all__ = ["Block", "decode_block", "new_block"]

_CODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
_BYTE_ORDER = 3
"""Refcounts of ``1 << 3`` bits: the first that need not be unpacked."""


class Block:
    """The counts of as many clusters as fit into one. Not thread-safe."""

    __slots__ = ("_counts", "_order")

    def __init__(self, counts: "array[int]", order: int) -> None:
        self._counts = counts
        self._order = order

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, index: int) -> int:
        return self._counts[index]

    def fill(self, index: int, count: int, value: int) -> None:
        """Set ``count`` counts."""
        counts = self._counts
        if count == 1:
            counts[index] = value
        else:
            counts[index : index + count] = array(counts.typecode, [value]) * count

    def find_free(self, start: int, stop: int) -> int:
        """Index of the first zero in [start, stop), -1 if there is none."""
        try:
            return self._counts.index(0, start, stop)
        except ValueError:
            return -1

    def free_length(self, index: int, limit: int) -> int:
        """Zeroes that follow each other from ``index`` on, at most ``limit``."""
        counts = self._counts
        end = index
        while end < index + limit and not counts[end]:
            end += 1
        return end - index

    def last_used(self) -> int:
        """Index of the last count that is not zero, -1 if there is none."""
        used = len(self._counts.tobytes().rstrip(b"\0"))
        return -(-used // self._counts.itemsize) - 1

    def encode(self, low: int, high: int) -> tuple[int, bytes]:
        """Counts [low, high) and what else is in their sectors: (offset in the block, bytes)."""
        counts, order = self._counts, self._order
        if order < _BYTE_ORDER:
            return 0, _packed(counts, order)
        per_sector = SECTOR // counts.itemsize
        low = low // per_sector * per_sector
        part = counts[low : -(-high // per_sector) * per_sector]
        if sys.byteorder == "little":
            part.byteswap()
        return low * counts.itemsize, part.tobytes()


def decode_block(data: bytes, order: int) -> Block:
    """A block as it lies in the file; counts have ``1 << order`` bits."""
    if order < _BYTE_ORDER:
        per_byte, mask = 8 >> order, (1 << (1 << order)) - 1
        spread = bytearray(len(data) * per_byte)
        for place in range(per_byte):
            shift = place << order
            spread[place::per_byte] = data.translate(bytes(b >> shift & mask for b in range(256)))
        return Block(array("B", spread), order)
    counts = array(_CODES[order], data)
    if sys.byteorder == "little":
        counts.byteswap()
    return Block(counts, order)


def new_block(size: int, order: int) -> Block:
    """A block of ``size`` bytes where no cluster is in use."""
    return decode_block(bytes(size), order)


def _packed(counts: "array[int]", order: int) -> bytes:
    per_byte = 8 >> order
    spread = counts.tobytes()
    packed = 0
    for place in range(per_byte):
        packed |= int.from_bytes(spread[place::per_byte], "little") << (place << order)
    return packed.to_bytes(len(spread) // per_byte, "little")
