"""One target of one disk that is being read: takes what it is offered, at its own pace.

::

    offer(bytes) ─┬─ whole chunks that are owed ───────────┬─ room? ─> queue ─> writer.data
                  └─ ends of chunks ─> Partials ── whole ──┘   no: missed        a few at a time
    zero(range) ─────────────────────────────────────────────────────> queue ─> writer.zero

Rule: ``offer`` never waits. What does not fit into the queue is missed, which costs nothing to
remember: it is still owed, and is read again at the end (``drive``). So whoever reads, and every
other branch, is as fast as if this one did not exist.

Rule: what goes wrong in a repository is that repository's failure. A branch that has failed takes
nothing more, and everything it is offered is let go.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from nbdsrv.backup.owed import Owed
from nbdsrv.backup.partial import Partials
from nbdsrv.copying.reading import WINDOW
from nbdsrv.copying.survey import DataMap
from nbdsrv.errors import NbdsrvError, RepositoryError
from nbdsrv.repository.repository import DiskWriter

__all__ = ["QUEUE", "Branch", "FailsAlone", "Piece"]

log = logging.getLogger(__name__)

QUEUE = 32 << 20
"""Bytes that wait for one branch: half a pack, so that putting one does not make it fall behind."""
MAX_QUEUED = 4096
"""Things that wait, however small: holes take no bytes."""


class FailsAlone:
    """Whose errors go no further.

    Attributes:
        failure: the first one, or None.
    """

    def __init__(self) -> None:
        self.failure: NbdsrvError | None = None

    @asynccontextmanager
    async def failing_alone(self) -> AsyncIterator[None]:
        """An error in the block is this one's failure and goes no further."""
        try:
            yield
        except NbdsrvError as error:
            # What follows the first error only says that there was one.
            self.failure = self.failure or error


class Piece:
    """Bytes of the source in memory, kept by the branches that still need them.

    Attributes:
        buffer: the bytes, at its beginning.
    """

    __slots__ = ("_free", "_users", "buffer")

    def __init__(self, buffer: bytearray, free: Callable[[bytearray], None] | None = None) -> None:
        """Has one user; ``free`` takes the buffer back from the last one."""
        self.buffer = buffer
        self._users = 1
        self._free = free

    def keep(self) -> "Piece":
        """One user more."""
        self._users += 1
        return self

    def let_go(self) -> None:
        """One user less."""
        self._users -= 1
        if not self._users and self._free is not None:
            self._free(self.buffer)


class _Due(NamedTuple):
    """What is to be told; zeroes have no piece."""

    offset: int
    length: int
    piece: Piece | None

    @property
    def weight(self) -> int:
        """Bytes of memory it keeps."""
        return len(self.piece.buffer) if self.piece is not None else 0


class Branch:
    """One disk at one target. Belongs to one event loop; ``run`` must be under way.

    Attributes:
        owed: what it must still be given.
        given: bytes of data that it has taken.
        missed: bytes that were offered when there was no room.
        backlog: bytes of memory that wait or are being stored.
        moved: called when something has been stored, or could not be.
    """

    def __init__(
        self, writer: DiskWriter, told: DataMap, owner: FailsAlone, *, queue: int = QUEUE
    ) -> None:
        """Give ``writer`` all of ``told``.

        Args:
            writer: of the disk; nobody else tells it anything meanwhile.
            told: ranges on multiples of its granularity.
            owner: the target; its failure is that of all of its branches.
            queue: bytes that wait at most.
        """
        self.owed = Owed(told, writer.granularity)
        self.given = 0
        self.missed = 0
        self.backlog = 0
        self.moved: Callable[[], None] = _nobody
        self._writer = writer
        self._unit = writer.granularity
        self._size = writer.size
        self._owner = owner
        self._limit = queue
        self._partials = Partials(self._unit, self._size)
        self._queue: deque[_Due] = deque()
        self._busy = 0
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Does it take anything?"""
        return self._owner.failure is None and not self._closed

    @property
    def chunk(self) -> int:
        """Bytes of a chunk."""
        return self._unit

    def owes(self, offset: int, length: int) -> bool:
        """Is there anything in this range that it still needs?"""
        unit = self._unit
        return any(self.owed.runs(offset // unit, -(-(offset + length) // unit)))

    def has_room(self, length: int) -> bool:
        """Would it take so many bytes now? One thing alone always fits."""
        if len(self._queue) >= MAX_QUEUED:
            return False
        return not self.backlog or self.backlog + length <= self._limit

    # --- being given ---------------------------------------------------------------------------

    def offer(self, offset: int, view: memoryview, shared: Callable[[], Piece]) -> None:
        """Bytes of the disk; they may change once this returns.

        Args:
            offset: of the first one.
            view: the bytes.
            shared: a Piece that holds the same bytes, from the first one on; made when it is asked
                for, and kept from then on by whoever wants to.
        """
        if not self.alive:
            return
        unit, end = self._unit, offset + len(view)
        first = -(-offset // unit)
        stop = -(-end // unit) if end == self._size else end // unit
        if first < stop:
            for low, high in self.owed.runs(first, stop):
                self._take(low, high, offset, view, shared)
        head = min(first * unit, end)
        if offset < head:
            self._add(offset, view[: head - offset])
        if first <= stop and stop * unit < end:
            self._add(stop * unit, view[stop * unit - offset :])

    def _take(
        self, low: int, high: int, offset: int, view: memoryview, shared: Callable[[], Piece]
    ) -> None:
        """Whole chunks."""
        start = low * self._unit
        length = min(high * self._unit, self._size) - start
        if not self.has_room(length):
            self.missed += length
            return
        if start == offset:
            piece = shared().keep()
        else:
            piece = Piece(bytearray(view[start - offset : start - offset + length]))
        if self._partials:
            self._partials.drop(low, high)
        self.owed.take(low, high)
        self._post(_Due(start, length, piece))

    def _add(self, offset: int, part: memoryview) -> None:
        """Part of one chunk."""
        chunk = offset // self._unit
        if chunk not in self.owed:
            return
        whole = self._partials.add(offset, part)
        if whole is None:
            return
        if not self.has_room(len(whole)):
            self.missed += len(whole)
            return
        self.owed.take(chunk, chunk + 1)
        self._post(_Due(chunk * self._unit, len(whole), Piece(whole)))

    def zero(self, offset: int, length: int) -> None:
        """The source has a hole there, or zeroes; whole chunks, as far as they are owed."""
        if not self.alive:
            return
        unit, end = self._unit, min(offset + length, self._size)
        for low, high in self.owed.runs(offset // unit, -(-end // unit)):
            if len(self._queue) >= MAX_QUEUED:
                return
            start = low * unit
            self.owed.take(low, high)
            self._post(_Due(start, min(high * unit, self._size) - start, None))

    def _post(self, due: _Due) -> None:
        if due.piece is not None:
            self.backlog += due.weight
            self.given += due.length
        self._queue.append(due)
        self._ready.set()
        self._idle.clear()

    # --- storing -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Store what is given until ``close``. Cancellation leaves a point to be aborted."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WINDOW):
                tasks.create_task(self._store())

    async def drained(self) -> None:
        """Return when nothing waits and nothing is being stored."""
        await self._idle.wait()

    def close(self) -> None:
        """Take nothing more; ``run`` returns when the rest is stored. Idempotent."""
        self._closed = True
        self._partials.clear()
        self._ready.set()

    async def _store(self) -> None:
        while (due := await self._next()) is not None:
            self._busy += 1
            try:
                if self._owner.failure is None:
                    await self._tell(due)
            finally:
                self._busy -= 1
                self.backlog -= due.weight
                if due.piece is not None:
                    due.piece.let_go()
                if not self._busy and not self._queue:
                    self._idle.set()
                self.moved()

    async def _next(self) -> _Due | None:
        while not self._queue:
            if self._closed:
                return None
            self._ready.clear()
            await self._ready.wait()
        return self._queue.popleft()

    async def _tell(self, due: _Due) -> None:
        async with self._owner.failing_alone():
            try:
                if due.piece is None:
                    await self._writer.zero(due.offset, due.length)
                else:
                    await self._writer.data(due.offset, due.piece.buffer, due.length)
            except NbdsrvError:
                raise
            except Exception as error:
                # Whoever reads the disk must not suffer from a mistake of ours here.
                log.exception("branch.bug disk=%s", self._writer.name)
                raise RepositoryError(f"{self._writer.name}: a fault of nbdsrv: {error}") from error


def _nobody() -> None:
    """Nobody waits for this branch."""
