"""Partitions of an MBR, logical ones among them.

::

    MBR     | 1 primary | 2 extended ------------------------------------ | 3 | - |
                             EBR 5 | next    EBR 6 | next    EBR 7 | -
                             |       `------->      `------->
    start of the partition:  + own EBR       start of the next EBR: + the extended partition

Numbers are those Linux gives: 1 to 4 by place in the MBR, logical ones from 5 in the order of
the chain, empty ones not counted.

Rule: a boot sector of a file system ends in the same signature. What has a status other than 0x00
and 0x80 in one of its four entries is no MBR.
"""

from collections.abc import Sequence
from typing import NamedTuple

from nbdsrv.disk.disk import Disk
from nbdsrv.formats.partition.structs import MBR_SIZE, Mbr
from nbdsrv.formats.partition.terms import Partition, corrupt, read

__all__ = ["PROTECTIVE", "MbrSlot", "mbr_partitions", "parse_mbr"]

SIGNATURE = 0xAA55
EXTENDED = frozenset({0x05, 0x0F, 0x85})
PROTECTIVE = 0xEE
"""The type that says: look for a GPT."""
ENTRIES_AT = 446
ENTRY_SIZE = 16
MAX_LOGICAL = 124
"""Logical partitions followed: a SOURCE can name 128 in all. Each one is a read."""


class MbrSlot(NamedTuple):
    """One of the four entries, in sectors."""

    kind: int
    start: int
    sectors: int

    @property
    def empty(self) -> bool:
        """Does it say nothing?"""
        return not self.kind or not self.sectors

    @property
    def extended(self) -> bool:
        """Does it hold logical partitions?"""
        return self.kind in EXTENDED and self.sectors > 0


def parse_mbr(sector: bytes) -> Sequence[MbrSlot] | None:
    """The four entries of an MBR or EBR; None if it is neither."""
    if len(sector) < MBR_SIZE:
        return None
    table = Mbr.parse(sector)
    if table.signature != SIGNATURE:
        return None
    if any(entry.status not in {0x00, 0x80} for entry in table.entries):
        return None
    return [MbrSlot(entry.kind, entry.start, entry.count) for entry in table.entries]


async def mbr_partitions(disk: Disk, slots: Sequence[MbrSlot], sector_size: int) -> list[Partition]:
    """All partitions, the logical ones last.

    Raises:
        CorruptImage: the chain of logical partitions leads astray.
    """
    found = []
    for index, slot in enumerate(slots):
        if not slot.empty:
            found.append(_partition(index + 1, slot, 0, _entry_at(0, index), sector_size))
    logical: list[Partition] = []
    for index, slot in enumerate(slots):
        if slot.extended:
            where = _entry_at(0, index)
            await _follow(disk, slot.start, where, sector_size, logical)
    return found + logical


async def _follow(
    disk: Disk, extended: int, named_at: int, sector_size: int, found: list[Partition]
) -> None:
    """Add the logical partitions of one extended partition; ``extended`` is its first sector."""
    at, seen = extended, {extended}
    while True:
        position = at * sector_size
        slots = parse_mbr(await read(disk, position, MBR_SIZE))
        if slots is None:
            raise corrupt(disk, named_at, f"no extended boot record at {position}")
        for index, slot in enumerate(slots):
            if not slot.empty and not slot.extended:
                if len(found) >= MAX_LOGICAL:
                    raise corrupt(disk, position, f"more than {MAX_LOGICAL} logical partitions")
                entry_at = _entry_at(position, index)
                number = 5 + len(found)
                found.append(_partition(number, slot, position, entry_at, sector_size))
        following = next((i for i, slot in enumerate(slots) if slot.extended), None)
        if following is None:
            return
        at = extended + slots[following].start
        named_at = _entry_at(position, following)
        if at in seen or len(seen) > MAX_LOGICAL:
            raise corrupt(disk, named_at, "the chain of logical partitions does not end")
        seen.add(at)


def _partition(number: int, slot: MbrSlot, base: int, entry_at: int, sector_size: int) -> Partition:
    return Partition(
        number=number,
        offset=base + slot.start * sector_size,
        length=slot.sectors * sector_size,
        kind=f"{slot.kind:#04x}",
        name="",
        entry=entry_at,
        extended=slot.extended,
    )


def _entry_at(record: int, index: int) -> int:
    return record + ENTRIES_AT + index * ENTRY_SIZE
