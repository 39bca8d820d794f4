"""Requests that may wait, answered whenever they are done.

Everything that is not in memory, not a plain overwrite, or rare::

    READ of holes and data, or in trouble    a task
    status, FLUSH, TRIM, zeroes ...          a task

Other READs come here only when they are in trouble (``cold``, ``packed``, ``afar``).

Only here (and in ``transmission``, for stored writes) does an operating system's errno become the
wire's.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from nbdsrv.disk.disk import Disk, read_runs
from nbdsrv.disk.runs import RemoteRun, Run, ZeroRun
from nbdsrv.errors import DiskError
from nbdsrv.net.buffers import Buffer
from nbdsrv.net.measures import Measures
from nbdsrv.net.reactor import Reactor
from protocol.constants import Command, CommandFlag, Errno
from protocol.errors import LocalProtocolError
from protocol.extents import ExtentList
from protocol.replies import ChunkEncoder, SimpleEncoder, wire_errno
from protocol.requests import Request

__all__ = ["MAX_READING", "Answer", "Reply", "SlowRequests"]

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 1024
"""Requests of one client being worked on; it may send more, they wait in its socket."""
MAX_IN_FLIGHT_BYTES = 16 << 20
"""Bytes those requests may move, likewise."""
STATUS_BYTES = 1 << 20
"""Bytes a BLOCK_STATUS counts for: its answer is that long for a fragmented image."""
MAX_TOLD = 8
"""Failed requests of one client that are logged: a bad disk fails many, and one line will do."""
MAX_READING = 16
"""Cold reads of one client under way at a time: half of the threads, so that others get theirs."""
Answer = list[tuple[memoryview | bytes, Buffer | None]]
"""What to send, in order; a buffer is released after the part it stands beside."""


class Reply(NamedTuple):
    """A chunk whose data threads fill in.

    Attributes:
        buffer: that holds it; whoever has the reply releases it, or hands it on.
        start: bytes of the header, which is there.
        total: bytes, the data included.
    """

    buffer: Buffer
    start: int
    total: int

    @property
    def data(self) -> memoryview:
        """Where the data goes."""
        return self.buffer.data[self.start : self.total]

    @property
    def whole(self) -> tuple[memoryview, Buffer]:
        """As a part of an ``Answer``."""
        return self.buffer.view(self.total), self.buffer


class SlowRequests:
    """Carries out requests against one Disk for one client.

    Attributes:
        in_flight: requests (and other work of the client) that have not been answered.
        moving: bytes they move.
    """

    def __init__(
        self,
        disk: Disk,
        reactor: Reactor,
        encoder: SimpleEncoder | ChunkEncoder,
        contexts: dict[int, str],
        deliver: Callable[[Answer], None],
        measures: Measures,
    ) -> None:
        """``deliver`` sends an answer and becomes the owner of its buffers."""
        self._disk = disk
        self._name = os.path.basename(disk.name)
        self._reactor = reactor
        self._workers = reactor.workers
        self._buffers = reactor.buffers
        self._encoder = encoder
        self._contexts = contexts
        self._deliver = deliver
        self._measures = measures
        self._began: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told = 0
        self.in_flight = 0
        self.moving = 0
        self._reading = asyncio.Semaphore(MAX_READING)

    def full(self) -> bool:
        """Is so much being worked on that no more should be received?"""
        return self.in_flight >= MAX_IN_FLIGHT or self.moving >= MAX_IN_FLIGHT_BYTES

    def enter(self, moved: int) -> None:
        """Something is in flight that moves so many bytes, whoever carries it out."""
        self.in_flight += 1
        self.moving += moved

    def leave(self, moved: int) -> None:
        """It is not any more. Before its answer is delivered."""
        self.in_flight -= 1
        self.moving -= moved

    def start(
        self, request: Request, work: Coroutine[Any, Any, Answer], owner: Buffer | None = None
    ) -> None:
        """Have a task carry out ``request``; ``owner`` is released when it has."""
        self.note_begun(request)
        task = asyncio.get_running_loop().create_task(self._perform(request, work, owner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(
        self, request: Request, work: Coroutine[Any, Any, Answer], owner: Buffer | None
    ) -> None:
        try:
            answer = await work
        except (Exception, asyncio.CancelledError) as error:
            # Nobody cancels this task: what was cancelled is something it waited for. A request
            # without an answer would hang its client, and the server when it is to stop.
            if not isinstance(error, DiskError | OSError):
                log.exception("session.bug in request %s", request)
            answer = [(self.failure(request, error), None)]
        if owner is not None:
            self._buffers.release(owner)
        self.note_answered(request)
        self._deliver(answer)

    def reply_to(self, request: Request) -> Reply | None:
        """What a READ of one stretch of data is answered with; None while memory is short."""
        at, length = request.offset, request.length
        header = self._encoder.data_header(request.cookie, at, at, length, done=True)
        total = len(header) + length
        if not self._buffers.affords(total):
            return None
        buffer = self._buffers.borrow(total)
        buffer.data[: len(header)] = header
        return Reply(buffer, len(header), total)

    def note_begun(self, request: Request) -> None:
        """It is in flight, and is timed from now on."""
        self.enter(_weight(request))
        self._began[id(request)] = perf_counter()

    def note_answered(self, request: Request) -> None:
        """It is not any more. Before its answer is delivered."""
        self.leave(_weight(request))
        took = perf_counter() - self._began.pop(id(request))
        measures = self._measures
        if request.command == Command.READ:
            measures.reads.add(took)
        elif request.command == Command.WRITE:
            measures.writes.add(took)
        else:
            measures.others.add(took)

    async def read(self, request: Request) -> Answer:
        """READ: holes as holes where the dialect has them and DF does not forbid it."""
        async with self._reading:
            return await self._read(request)

    async def _read(self, request: Request) -> Answer:
        encoder = self._encoder
        await self._buffers.afford(request.length)
        buffer = self._buffers.borrow(request.length)
        try:
            if isinstance(encoder, SimpleEncoder) or request.flags & CommandFlag.DF:
                answer = await self._read_whole(request, buffer)
            else:
                answer = await self._read_sparse(request, buffer, encoder)
        except BaseException:
            self._buffers.release(buffer)
            raise
        answer[-1] = (answer[-1][0], buffer)
        return answer

    async def _read_whole(self, request: Request, buffer: Buffer) -> Answer:
        """One content chunk (or simple reply), zeroes included."""
        encoder, view = self._encoder, buffer.view(request.length)
        cookie, at = request.cookie, request.offset
        try:
            await self._disk.read_into(at, view)
        except DiskError as error:
            return self._partial(request, view, error)
        return [
            (encoder.data_header(cookie, at, at, request.length, done=True), None),
            (view, None),
        ]

    async def _read_sparse(self, request: Request, buffer: Buffer, encoder: ChunkEncoder) -> Answer:
        """A chunk per stretch of data or hole."""
        cookie, at, good = request.cookie, request.offset, request.length
        runs = await self._disk.runs(at, good)
        if isinstance(runs[0], RemoteRun):
            return await self._read_whole(request, buffer)
        view = buffer.view(good)
        failed: DiskError | None = None
        try:
            await self._workers.run(read_runs, self._disk.name, at, runs, view)
        except DiskError as error:
            failed = error
            good = self._good_length(request, error)
        answer: Answer = []
        start = 0
        for length, is_hole in _stretches(runs, good):
            done = failed is None and start + length == good
            if is_hole:
                hole = encoder.hole(cookie, at, at + start, length, done=done)
                answer.append((hole, None))
            else:
                head = encoder.data_header(cookie, at, at + start, length, done=done)
                answer += [(head, None), (view[start : start + length], None)]
            start += length
        if failed is not None:
            answer.append((self.failure(request, failed), None))
        return answer

    def _partial(self, request: Request, view: memoryview, error: DiskError) -> Answer:
        """The good part, if the dialect can tell it from the bad one, then the error."""
        good = self._good_length(request, error)
        answer: Answer = []
        if good and isinstance(self._encoder, ChunkEncoder):
            cookie, at = request.cookie, request.offset
            head = self._encoder.data_header(cookie, at, at, good, done=False)
            answer += [(head, None), (view[:good], None)]
        answer.append((self.failure(request, error), None))
        return answer

    def _good_length(self, request: Request, error: DiskError) -> int:
        if error.offset is None:
            return 0
        return max(0, min(error.offset - request.offset, request.length))

    async def write(self, request: Request, data: memoryview) -> Answer:
        """WRITE where the format must allocate first."""
        await self._disk.write(request.offset, data)
        return await self._done(request)

    async def perform(self, request: Request, chosen: Sequence[int] = ()) -> Answer:
        """Everything but READ and WRITE. ``chosen``: the payload's context ids, or all."""
        disk, offset, length = self._disk, request.offset, request.length
        command = Command(request.command)
        if command is Command.BLOCK_STATUS:
            return await self._status(request, chosen or tuple(self._contexts))
        if command is Command.FLUSH:
            await disk.flush()
        elif not length:
            pass  # unspecified by proto.md; harmless to agree
        elif command is Command.TRIM:
            await disk.trim(offset, length)
        elif command is Command.CACHE:
            await disk.cache(offset, length)
        elif command is Command.WRITE_ZEROES:
            punch = not request.flags & CommandFlag.NO_HOLE
            fast = bool(request.flags & CommandFlag.FAST_ZERO)
            await disk.zero(offset, length, punch=punch, fast=fast)
        return await self._done(request)

    async def _done(self, request: Request) -> Answer:
        # FUA is legal on every command once offered; only changes have something to persist.
        if request.flags & CommandFlag.FUA and request.command in _CHANGES:
            await self._disk.flush()
        return [(self._encoder.done(request.cookie, request.offset), None)]

    async def _status(self, request: Request, chosen: Sequence[int]) -> Answer:
        encoder, offset, length = self._encoder, request.offset, request.length
        if isinstance(encoder, SimpleEncoder):
            raise LocalProtocolError("block status in simple replies")
        statuses: list[tuple[int, ExtentList]] = []
        for context in chosen:
            found = await self._disk.status(self._contexts[context], offset, length)
            if request.flags & CommandFlag.REQ_ONE:
                found = found.first()
            statuses.append((context, found))
        return [(chunk, None) for chunk in encoder.status(request.cookie, offset, statuses)]

    def failure(self, request: Request, error: BaseException) -> bytes:
        """The error reply for an exception; what is not a DiskError is our bug, hence EIO."""
        number = error.errno if isinstance(error, DiskError | OSError) else None
        errno = wire_errno(number)
        fast = request.flags & CommandFlag.FAST_ZERO and request.command == Command.WRITE_ZEROES
        if errno is Errno.ENOTSUP and not fast:
            errno = Errno.EINVAL  # proto.md: without FAST_ZERO, ENOTSUP is forbidden
        if errno is Errno.ENOTSUP:
            self._measures.failed += 1
        else:
            self.note_failure(request, error)
        offset = error.offset if isinstance(error, DiskError) else None
        if offset is not None and not request.offset <= offset < request.offset + request.length:
            offset = None
        text = _DIRECTORIES.sub("", str(error).replace(self._disk.name, self._name))
        return self._encoder.error(request.cookie, request.offset, errno, text, offset=offset)

    def note_failure(self, request: Request, error: BaseException) -> None:
        """Count and log a failure, whoever answers it."""
        self._measures.failed += 1
        if self._told >= MAX_TOLD:
            return
        self._told += 1
        what = f"{Command(request.command).name} of {request.length} at {request.offset}"
        more = " (this client's others are not logged)" if self._told == MAX_TOLD else ""
        log.warning("request.failed disk=%r %s reason=%s%s", self._name, what, error, more)


_DIRECTORIES = re.compile(r"\S*/(?=\S)")
"""Where things lie on this host is no concern of a client; images are told by their names only."""
_MOVING = frozenset({Command.READ, Command.WRITE})
_CHANGES = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})


def _weight(request: Request) -> int:
    """Bytes a request counts for while it is in flight."""
    if request.command == Command.BLOCK_STATUS:
        return STATUS_BYTES
    return request.length if request.command in _MOVING else 0


def _stretches(runs: Sequence[Run], length: int) -> list[tuple[int, bool]]:
    """(bytes, is it a hole?) of exactly ``length`` bytes; the last run may have reached further."""
    stretches: list[tuple[int, bool]] = []
    for run in runs:
        if length <= 0:
            break
        part, is_hole = min(run.length, length), isinstance(run, ZeroRun)
        if stretches and stretches[-1][1] is is_hole:
            stretches[-1] = (stretches[-1][0] + part, is_hole)
        else:
            stretches.append((part, is_hole))
        length -= run.length
    return stretches
