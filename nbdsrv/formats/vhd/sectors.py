"""Sector bitmaps: which sectors of a block are in this file, and which are to be had below it.

::

    bitmap    11111111 11100000 00000000 ...
    block     |  in this file  |  the parent's  |          1 bit per sector

VHD counts bits from the most significant one of each byte, VHDX (and tapdisk 0.1) from the least.
"""

import re
from collections.abc import Iterator

__all__ = ["stretches"]

_STRETCH = re.compile("1+|0+")


def stretches(
    bitmap: bytes, first: int, count: int, *, least_first: bool
) -> Iterator[tuple[int, bool]]:
    """(sectors, are they here?) for ``count`` sectors from bit ``first`` on, in turn."""
    bits = 8 * len(bitmap)
    number = int.from_bytes(bitmap, "little" if least_first else "big")
    text = f"{number:0{bits}b}"
    if least_first:
        text = text[::-1]
    for stretch in _STRETCH.finditer(text, first, first + count):
        yield stretch.end() - stretch.start(), text[stretch.start()] == "1"
