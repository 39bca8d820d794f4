"""READs of encoded blocks whose packed bytes are in memory: all they need is a processor.

::

    client ── READ READ READ ──> begin ── at most 8 ──> a few threads: unpack, copy
                                   │ more: wait here             |
           <── one send ── _send_ready <── _ready <── _unpacked <┘

Unpacking a cluster takes 20 to 100 µs, and around each a thread gives the interpreter away and
wants it back. Some two threads for each processor do that well; sixteen of them, which is right for
reads that wait for a disk, mostly queue for the interpreter. So these reads have threads of their
own (``Workers.compute``), and the rest waits without a thread, a task or a buffer.

What fails, and what memory is short for, is ``SlowRequests``' to carry out.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from nbdsrv.disk.disk import Disk, read_runs
from nbdsrv.disk.runs import BlockRun, Run
from nbdsrv.net.measures import Measures
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.slow import Answer, Reply, SlowRequests
from protocol.requests import Request

__all__ = ["PackedReads"]

MAX_UNPACKING = 8
"""Reads of one client that threads unpack or will next: enough to keep them busy while the loop
sends, and few enough for another client's to be among the next."""


class PackedReads:
    """One client's. Belongs to the loop."""

    def __init__(
        self,
        disk: Disk,
        reactor: Reactor,
        slow: SlowRequests,
        deliver: Callable[[Answer], None],
        measures: Measures,
    ) -> None:
        """``deliver`` sends an answer and becomes the owner of its buffers."""
        self._disk = disk
        self._reactor = reactor
        self._buffers = reactor.buffers
        self._slow = slow
        self._deliver = deliver
        self._measures = measures
        self._unpacking = 0
        self._waiting: deque[tuple[Request, float]] = deque()
        self._ready: list[tuple[Request, Reply]] = []

    def begin(self, request: Request, runs: Sequence[Run], began: float | None = None) -> bool:
        """Carry out a READ that is within the disk, and came just now, or when ``began`` says
        (``perf_counter``); False if it is not of this kind.
        """
        if not _at_hand(runs):
            return False
        self._slow.enter(request.length)
        began = began or perf_counter()
        if self._unpacking >= MAX_UNPACKING:
            self._waiting.append((request, began))
        else:
            self._unpack(request, began, runs)
        return True

    def _unpack(self, request: Request, began: float, runs: Sequence[Run]) -> None:
        reply = self._slow.reply_to(request)
        if reply is None:
            self._leave(request)
            return
        self._unpacking += 1
        done = partial(self._unpacked, request, began, reply)
        work = (self._disk.name, request.offset, runs, reply.data)
        self._reactor.workers.compute(read_runs, *work, done=done)

    def _unpacked(
        self,
        request: Request,
        began: float,
        reply: Reply,
        _result: None,
        error: BaseException | None,
    ) -> None:
        self._unpacking -= 1
        while self._waiting and self._unpacking < MAX_UNPACKING:
            self._next(*self._waiting.popleft())
        if error is not None:
            self._buffers.release(reply.buffer)
            self._leave(request)
            return
        self._measures.reads.add(perf_counter() - began)
        if not self._ready:  # what is ready with it leaves with it
            self._reactor.soon(self._send_ready)
        self._ready.append((request, reply))

    def _next(self, request: Request, began: float) -> None:
        """It has waited, so the disk may have changed: look again where the bytes are."""
        try:
            runs = self._disk.locate(request.offset, request.length)
        except Exception:  # noqa: BLE001 - a bug in there is that one request's
            runs = None
        if runs is not None and _are_blocks(runs):
            self._unpack(request, began, runs)
        else:
            self._leave(request)

    def _send_ready(self) -> None:
        ready, self._ready = self._ready, []
        for request, _ in ready:  # not before: the client stays until all is answered
            self._slow.leave(request.length)
        self._deliver([reply.whole for _, reply in ready])

    def _leave(self, request: Request) -> None:
        """To a task, which waits as long as it takes, and tells what is wrong."""
        self._slow.leave(request.length)
        self._slow.start(request, self._slow.read(request))


def _at_hand(runs: Sequence[Run]) -> bool:
    """Blocks, of which the first and the last need no disk: then those between hardly do."""
    first, last = runs[0], runs[-1]
    if not isinstance(first, BlockRun) or not first.blocks.at_hand(first.key):
        return False
    if last is first:  # the usual small read; to ask costs several microseconds
        return True
    return isinstance(last, BlockRun) and last.blocks.at_hand(last.key) and _are_blocks(runs)


def _are_blocks(runs: Sequence[Run]) -> bool:
    return all(isinstance(run, BlockRun) for run in runs)
