"""Changed block tracking as sm keeps it: one log for each VDI, linked in the order of snapshots.

::

    base ──> snap1 ──> snap2 ──> live         a log says what changed since the VDI before it
              log       log       log         list_changed_blocks(base, snap2) = snap1 | snap2

    a VDI is destroyed      its log is merged into the next one, the chain stays whole
    tracking is turned off  the log is gone, the chain ends there: "unrelated"

Bits are 64 KiB, most significant first, ceil(ceil(size / 64 KiB) / 8) bytes.
"""

from dataclasses import dataclass, field

__all__ = ["GRANULARITY", "Log", "changed_between", "merge_into_next", "unlink"]

GRANULARITY = 64 << 10


@dataclass(eq=False)
class Log:
    """Of one VDI."""

    size: int
    before: "Log | None" = None
    after: "Log | None" = None
    bits: bytearray = field(init=False)

    def __post_init__(self) -> None:
        blocks = -(-self.size // GRANULARITY)
        self.bits = bytearray(-(-blocks // 8))

    def mark(self, offset: int, length: int) -> None:
        """A write."""
        if not length:
            return
        for block in range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1):
            self.bits[block // 8] |= 0x80 >> block % 8

    def split(self) -> "Log":
        """A snapshot is taken: this becomes its log; the live VDI's new one is returned."""
        fresh = Log(self.size, before=self)
        self.after = fresh
        return fresh


def changed_between(older: Log, newer: Log) -> bytes | None:
    """What changed from one to the other; None if no chain leads there."""
    if older is newer:
        return bytes(len(newer.bits))
    found = bytearray(len(newer.bits))
    at = older.after
    while at is not None:
        _merge(found, at.bits)
        if at is newer:
            return bytes(found)
        at = at.after
    return None


def merge_into_next(log: Log) -> None:
    """A VDI is destroyed."""
    if log.after is not None:
        _merge(log.after.bits, log.bits)
        log.after.before = log.before
    if log.before is not None:
        log.before.after = log.after


def unlink(log: Log) -> None:
    """Tracking is turned off."""
    for neighbour in (log.before, log.after):
        if neighbour is not None:
            if neighbour.after is log:
                neighbour.after = None
            if neighbour.before is log:
                neighbour.before = None


def _merge(into: bytearray, bits: bytearray) -> None:
    for index, byte in enumerate(bits[: len(into)]):
        into[index] |= byte
