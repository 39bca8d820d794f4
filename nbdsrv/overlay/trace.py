"""A boot trace: which parts of a disk were read first, in the order they were.

::

    reads     |a|   |b|a|c|       |b|       units of 64 KiB, each counted once
    trace     (a..c, 3 units) (x, 1) ...    neighbours in time and place are one range

JSON, because people look at it; read with every number checked, for it lies where others write:

    {"v": 1, "size": 34359738368, "unit": 65536, "recorded": 1764115200.0, "point": "01M8...",
     "ranges": [[first, count], ...]}
"""

from collections.abc import Iterable, Iterator

import msgspec

from nbdsrv.errors import CorruptImage

__all__ = ["UNIT", "UNIT_BITS", "Trace", "decode_trace", "encode_trace", "merged"]

UNIT_BITS = 16
UNIT = 1 << UNIT_BITS
"""Bytes: what is read next to something is mostly read soon."""
MAX_UNITS = 1 << 15
"""Of a trace: 2 GiB, more than any system reads while it boots."""
MAX_TRACE = 1 << 20
"""Bytes of one, encoded."""
LARGEST = 1 << 62


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What was read.

    Attributes:
        v: version.
        size: of the disk, bytes.
        unit: bytes.
        recorded: when, seconds since 1970.
        point: id of the restore point it was booted from, or "".
        ranges: first unit and number of units, in the order they were read.
    """

    v: int = 1
    size: int
    unit: int = UNIT
    recorded: float = 0
    point: str = ""
    ranges: list[tuple[int, int]] = []

    @property
    def units(self) -> int:
        """How many there are."""
        return sum(count for _, count in self.ranges)

    def byte_ranges(self, size: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each range that lies within a disk of that size."""
        for first, count in self.ranges:
            offset = first * self.unit
            if offset < size:
                yield offset, min(count * self.unit, size - offset)


def merged(units: Iterable[int]) -> list[tuple[int, int]]:
    """Units as ranges; one that directly follows the one before in both ways is part of it."""
    ranges: list[tuple[int, int]] = []
    first = end = -1
    for unit in units:
        if unit == end:
            end += 1
            continue
        if end > first:
            ranges.append((first, end - first))
        first, end = unit, unit + 1
    if end > first:
        ranges.append((first, end - first))
    return ranges


def encode_trace(trace: Trace) -> bytes:
    """What ``decode_trace`` takes."""
    return msgspec.json.encode(trace)


def decode_trace(data: bytes, name: str) -> Trace:
    """From where it was kept.

    Raises:
        CorruptImage: it makes no sense, or is of a later version.
    """
    if len(data) > MAX_TRACE:
        raise CorruptImage(f"{name}: a boot trace of {len(data)} bytes; remove it")
    try:
        trace = msgspec.json.decode(data, type=Trace)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise CorruptImage(f"{name}: no boot trace: {error}; remove it") from error
    sane = trace.v == 1 and trace.unit == UNIT and 0 <= trace.size < LARGEST
    units = 0
    for first, count in trace.ranges:
        units += count
        sane = sane and 0 <= first < LARGEST >> UNIT_BITS and count > 0 and units <= MAX_UNITS
    if not sane:
        raise CorruptImage(f"{name}: a boot trace that makes no sense; remove it")
    return trace
