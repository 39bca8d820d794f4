"""A base that remembers what is read of it first: the recording of a boot trace.

::

    Overlay ── what is still the base's ──> Recording ──> base
                                                │
                                             units, in the order they were first asked for

Reads do not pass through here: a client is told by ``locate`` where bytes are, as far as that is
known, and reads on by itself. So while it records, ``locate`` knows no further than the unit; when
recording ends, ``epoch`` says so, and all is as fast as without.
"""

import asyncio
from collections.abc import Callable, Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.runs import RemoteRun, Run
from nbdsrv.overlay.layered import clipped
from nbdsrv.overlay.trace import MAX_UNITS, UNIT, UNIT_BITS

__all__ = ["Recording"]


MAX_ASKED = 40_000
"""Reads of what is the base's, window by window. A system that boots asks for some ten thousand;
a benchmark must not be slowed down for long."""


class Recording(Passthrough):
    """The base, and what was read of it since it was opened.

    Attributes:
        units: numbers of those read, in the order they were, as keys.
        recording: is it still?
        overrun: more was asked for than any system asks for while it boots.
        begun, ended: set when the first read has come, and when it records no more.
    """

    def __init__(self, inside: Disk) -> None:
        """Records from now on. Becomes the owner of ``inside``."""
        super().__init__(inside.workers, inside)
        self.units: dict[int, None] = {}
        self.recording = True
        self.overrun = False
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self._changes = 0
        self._asked = 0

    @property
    def inside(self) -> Disk:
        """The base itself, for reads that are no guest's."""
        return self._inside

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """The base's; and once more when recording ends."""
        return self._inside.epoch + self._changes

    def stop(self) -> None:
        """Record no more. Idempotent."""
        if self.recording:
            self.recording = False
            self._changes += 1
            self.ended.set()

    def note(self, offset: int, length: int) -> None:
        """A guest reads that."""
        units = self.units
        if not self._asked:
            self.begun.set()
        self._asked += 1
        if self._asked > MAX_ASKED:
            self.overrun = True
            self.stop()
            return
        for unit in range(offset >> UNIT_BITS, (offset + length + UNIT - 1) >> UNIT_BITS):
            if unit not in units:
                if len(units) >= MAX_UNITS:
                    self.overrun = True
                    self.stop()
                    return
                units[unit] = None

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """As the base; while it records, to the end of the unit."""
        runs = self._inside.locate(offset, length)
        if not self.recording or not runs or isinstance(runs[0], RemoteRun):
            return runs
        self.note(offset, length)
        return clipped(runs, offset, -(-(offset + length) >> UNIT_BITS << UNIT_BITS))

    async def load(self, offset: int, length: int) -> None:
        """As the base."""
        await self._inside.load(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the base."""
        if self.recording:
            self.note(offset, len(buffer))
        await self._inside.read_into(offset, buffer)

    def begin_read(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        """As the base."""
        if self.recording:
            self.note(offset, len(buffer))
        return self._inside.begin_read(offset, buffer, done)
