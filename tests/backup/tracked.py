"""A disk that is written, trimmed and resized between backups, and keeps track of it."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from nbdsrv.backup.engine import Backup, Order, SourceDisk
from nbdsrv.backup.report import Report
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.repository.destination import Destination
from nbdsrv.repository.native.destination import NativeDestination
from nbdsrv.repository.native.vault import Vault
from protocol.extents import ExtentList
from tests.copying.disks import MemoryDisk

__all__ = ["BITMAP", "Guest", "back_up", "destinations"]

BITMAP = "qemu:dirty-bitmap:b"
BLOCK = 4096


@dataclass
class Guest:
    """What a VM does to its disk.

    Attributes:
        content: of the disk.
        dirty: (offset, length) written since ``backed_up``.
        lies: tell the backup that nothing was written.
        holes: (offset, length) that read as holes.
        bad: a byte that cannot be read.
    """

    content: bytearray
    dirty: list[tuple[int, int]] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)
    lies: bool = False
    bad: int | None = None

    def write(self, offset: int, data: bytes) -> None:
        data = data[: max(0, len(self.content) - offset)]
        self.content[offset : offset + len(data)] = data
        self._touch(offset, len(data))
        self.holes = [hole for hole in self.holes if not _overlap(hole, (offset, len(data)))]

    def discard(self, offset: int, length: int) -> None:
        """Reads as zeroes, and is a hole."""
        length = max(0, min(length, len(self.content) - offset))
        self.write(offset, bytes(length))
        if length:
            self.holes.append((offset, length))

    def resize(self, size: int) -> None:
        """Longer by zeroes, or shorter."""
        old = len(self.content)
        del self.content[size:]
        self.content += bytes(size - len(self.content))
        self.holes = [hole for hole in self.holes if sum(hole) <= size]
        if size > old:
            self._touch(old, size - old)
        self.dirty = [(at, min(span, size - at)) for at, span in self.dirty if at < size]

    def backed_up(self) -> None:
        self.dirty.clear()

    def _touch(self, offset: int, length: int) -> None:
        if length:
            self.dirty.append((offset, length))

    @asynccontextmanager
    async def open(self, workers: Workers) -> AsyncIterator["TrackedDisk"]:
        yield TrackedDisk(workers, self)


class TrackedDisk(MemoryDisk):
    """The disk as a backup sees it."""

    def __init__(self, workers: Workers, guest: Guest) -> None:
        size = len(guest.content)
        data = _runs(size, [(at, span, 0) for at, span in guest.holes], other=1)
        ranges, at = [], 0
        for length, flag in data:
            if flag:
                ranges.append((at, length))
            at += length
        super().__init__(workers, bytes(guest.content), ranges, bad=guest.bad)
        self._guest = guest
        self.contexts = (*MemoryDisk.contexts, BITMAP)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        if context != BITMAP:
            return await super().status(context, offset, length)
        dirty = [] if self._guest.lies else self._guest.dirty
        blocks = [
            (at // BLOCK * BLOCK, min(-(-(at + span) // BLOCK) * BLOCK, self.size), 1)
            for at, span in dirty
        ]
        marks = bytearray(-(-self.size // BLOCK))
        for start, end, _ in blocks:
            first, last = start // BLOCK, -(-end // BLOCK)
            marks[first:last] = b"\1" * (last - first)
        runs = [(min(BLOCK, self.size - n * BLOCK), mark) for n, mark in enumerate(marks)]
        skipped = 0
        out = []
        for span, mark in runs:
            lo, hi = max(skipped, offset), min(skipped + span, offset + length)
            if lo < hi:
                out.append((hi - lo, mark))
            skipped += span
        return ExtentList(offset, out)


def _runs(size: int, ranges: Sequence[tuple[int, int, int]], other: int) -> list[tuple[int, int]]:
    marks = bytearray([other]) * size
    for at, span, flag in ranges:
        marks[at : at + span] = bytes([flag]) * span
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        flag = marks[at]
        end = marks.find(1 - flag, at)
        end = size if end < 0 else end
        found.append((end - at, flag))
        at = end
    return found


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < sum(other) and other[0] < sum(one)


def destinations(targets: Sequence[Vault | Destination]) -> list[Destination]:
    """As the engine takes them."""
    return [NativeDestination(each) if isinstance(each, Vault) else each for each in targets]


async def back_up(
    workers: Workers,
    targets: Sequence[Vault | Destination] | Vault | Destination,
    guests: dict[str, Guest] | Guest,
    order: Order | None = None,
) -> Report:
    """One backup of these disks."""
    targets = [targets] if isinstance(targets, Vault | Destination) else targets
    guests = {"disk": guests} if isinstance(guests, Guest) else guests

    def source(name: str, guest: Guest) -> SourceDisk:
        @asynccontextmanager
        async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
            yield TrackedDisk(workers, guest)

        return SourceDisk(name, opened)

    work = Backup(destinations(targets), workers, order or Order("vm"))
    return await work.run([source(name, guest) for name, guest in guests.items()])


def chance(seed: int) -> random.Random:
    return random.Random(seed)
