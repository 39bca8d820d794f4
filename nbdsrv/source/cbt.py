"""What has changed on a disk, told by a bitmap: changed block tracking as XCP-ng has it.

::

    byte      |     0     |     1     | ...       the most significant bit comes first
    bit        7 6 5 .. 0   7 6 5 .. 0
    disk      |64K|64K|...                        the last block may be shorter

    CbtDisk ── status("nbdsrv:cbt") ──> 1 changed, 0 not         everything else: the Disk inside

Rule: where a bitmap is not exactly as long as the disk's size demands it is not this disk's.
"""

import errno as os_errno
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from protocol.extents import ExtentList

__all__ = ["CONTEXT", "GRANULARITY", "Bitmap", "CbtDisk"]

CONTEXT = "nbdsrv:cbt"
"""The meta context a ``CbtDisk`` has: flag 1 where something was written."""
GRANULARITY = 64 << 10
"""Bytes of a bit."""
MAX_RUNS = 1 << 18
"""Changed ranges kept, 4 MiB. Beyond it the narrowest gaps are taken for changed."""
MAX_EXTENTS = 1 << 16
"""Extents of one answer."""
_SOME = re.compile(rb"[^\0]+")


def _runs_of(byte: int, gap: int) -> tuple[tuple[int, int], ...]:
    """[first, end) of the set bits in a byte, joined over gaps of up to ``gap`` bits."""
    found: list[tuple[int, int]] = []
    for bit in range(8):
        if byte & 0x80 >> bit:
            if found and bit <= found[-1][1] + gap:
                found[-1] = (found[-1][0], bit + 1)
            else:
                found.append((bit, bit + 1))
    return tuple(found)


_RUNS = [[_runs_of(byte, gap) for byte in range(256)] for gap in range(8)]
"""By gap and byte: a dense bitmap has millions of bytes."""


class Bitmap:
    """Which blocks of a disk have changed. Immutable.

    Attributes:
        size: of the disk, bytes.
        changed: bytes that have.
    """

    def __init__(self, bits: bytes, size: int, limit: int = MAX_RUNS) -> None:
        """Read a bitmap; takes a second for a dense one of 4 MiB (2 TiB of disk).

        Args:
            bits: MSB first, 64 KiB each.
            size: of the disk, bytes.
            limit: ranges kept.

        Raises:
            ValueError: the bitmap is not this disk's: it has another length.
        """
        blocks = -(-size // GRANULARITY)
        expected = -(-blocks // 8)
        if len(bits) != expected:
            raise ValueError(
                f"the bitmap has {len(bits)} bytes, a disk of {size} bytes takes {expected}"
            )
        self.size = size
        self._starts = array("Q")
        self._ends = array("Q")
        self._read(_cut(bits, blocks), limit)
        ranges = zip(self._starts, self._ends, strict=True)
        self.changed = sum(
            min(end * GRANULARITY, size) - start * GRANULARITY for start, end in ranges
        )

    def _read(self, bits: bytes, limit: int) -> None:
        gap, runs = 0, _RUNS[0]
        for match in _SOME.finditer(bits):
            block = match.start() * 8
            for byte in match[0]:
                for low, high in runs[byte]:
                    if self._ends and block + low <= self._ends[-1] + gap:
                        self._ends[-1] = block + high
                    elif len(self._starts) < limit:
                        self._starts.append(block + low)
                        self._ends.append(block + high)
                    else:
                        gap = self._narrow(limit, block + low, block + high, gap)
                        runs = _RUNS[min(gap, 7)]
                block += 8

    def _narrow(self, limit: int, start: int, end: int, gap: int) -> int:
        """Join ranges over wider and wider gaps until half of the places are free."""
        runs = [*zip(self._starts, self._ends, strict=True), (start, end)]
        while len(runs) > limit // 2 + 1:
            gap = gap * 2 + 1
            joined = [runs[0]]
            for low, high in runs[1:]:
                if low <= joined[-1][1] + gap:
                    joined[-1] = (joined[-1][0], high)
                else:
                    joined.append((low, high))
            runs = joined
        self._starts = array("Q", (low for low, _ in runs))
        self._ends = array("Q", (high for _, high in runs))
        return gap

    def extents(self, offset: int, length: int) -> ExtentList:
        """1 where something changed; at most ``length`` bytes, fewer if there are many extents."""
        return ExtentList(offset, self._pieces(offset, min(offset + length, self.size)))

    def _pieces(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        index = max(bisect_right(self._starts, at // GRANULARITY) - 1, 0)
        for number in range(index, min(index + MAX_EXTENTS // 2, len(self._starts))):
            start = self._starts[number] * GRANULARITY
            stop = min(self._ends[number] * GRANULARITY, end)
            if start >= end:
                break
            if start > at:
                yield start - at, 0
                at = start
            if stop > at:
                yield stop - at, 1
                at = stop
        else:
            if index + MAX_EXTENTS // 2 < len(self._starts):
                return  # there are more; whoever asks goes on from here
        yield end - at, 0


def _cut(bits: bytes, blocks: int) -> bytes:
    """Without the bits of the last byte that are beyond the disk's end."""
    spare = -blocks % 8
    return bits[:-1] + bytes([bits[-1] & 0xFF << spare]) if spare else bits


class CbtDisk(Passthrough):
    """A Disk and what has changed on it."""

    def __init__(self, workers: Workers, inside: Disk, bitmap: Bitmap) -> None:
        """Becomes the owner of ``inside``.

        Raises:
            DiskError: the bitmap is of a disk of another size.
        """
        super().__init__(workers, inside)
        if bitmap.size != inside.size:
            text = f"{inside.name} has {inside.size} bytes, its bitmap is for {bitmap.size}"
            raise DiskError(text, os_errno.EINVAL)
        self._bitmap = bitmap
        self.contexts = (*inside.contexts, CONTEXT)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Of the bitmap; other contexts are the inner Disk's."""
        if context != CONTEXT:
            return await super().status(context, offset, length)
        self._check(offset, length)
        if not length:
            raise DiskError(f"{self.name}: no extents of nothing", os_errno.EINVAL)
        return self._bitmap.extents(offset, length)
