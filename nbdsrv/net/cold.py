"""READs that a disk must be waited for: by threads, without a task.

::

    one turn of the loop finds   cold cold cold cold    cold cold ...      cold
                                   └────┴────┴────┘       └────┘ in a file   | not, or long
    a thread                     tell the kernel of all,  likewise           read it
                                 then read one by one

While the thread waits for the first, the disk fetches the others, just as if a thread waited for
each. But a thread for each costs it a wake-up, a wait and the interpreter twice: with sixteen reads
under way so it is half the context switches, and a fifth to a quarter of the processor.

What fails, what memory is short for and what is not one stretch of data is ``SlowRequests``' to
carry out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from nbdsrv.disk.disk import Disk, read_runs
from nbdsrv.disk.residency import announce
from nbdsrv.disk.runs import Run, ZeroRun, in_files
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.slow import MAX_READING, Answer, Reply, SlowRequests
from protocol.constants import CommandFlag
from protocol.replies import ChunkEncoder, SimpleEncoder
from protocol.requests import Request

__all__ = ["ColdReads"]

GROUP = 4
"""READs that share a thread, at most. Of sixteen there would be no answer before all are read, and
neither the client nor the other processor had anything to do meanwhile; of two each costs more."""
SMALL = 1 << 16
"""Bytes of a READ that may share a thread: what takes longer to copy would hold the others up."""


class _Cold(NamedTuple):
    """A READ, where its bytes are, and the answer to be."""

    request: Request
    runs: Sequence[Run]
    reply: Reply


class ColdReads:
    """One client's. Belongs to the loop."""

    def __init__(
        self,
        disk: Disk,
        reactor: Reactor,
        encoder: SimpleEncoder | ChunkEncoder,
        slow: SlowRequests,
        deliver: Callable[[Answer], None],
    ) -> None:
        """``deliver`` sends an answer and becomes the owner of its buffers."""
        self._name = disk.name
        self._reactor = reactor
        self._buffers = reactor.buffers
        self._encoder = encoder
        self._slow = slow
        self._deliver = deliver
        self._reading = 0
        self._gathered: list[_Cold] = []

    def begin(self, request: Request, runs: Sequence[Run]) -> None:
        """Carry out a READ that is within the disk; ``runs`` are what ``locate`` has said of it."""
        busy = self._reading >= MAX_READING or not self._one_chunk(request, runs)
        reply = None if busy else self._slow.reply_to(request)
        if reply is None:
            self._slow.start(request, self._slow.read(request))
            return
        self._reading += 1
        self._slow.note_begun(request)
        cold = _Cold(request, runs, reply)
        if request.length > SMALL or not in_files(runs, request.length):
            self._send_for([cold])
            return
        if not self._gathered:
            self._reactor.soon(self._send_for_all)
        self._gathered.append(cold)

    def _one_chunk(self, request: Request, runs: Sequence[Run]) -> bool:
        """Is the answer to be one stretch of data, without holes of its own?"""
        if isinstance(self._encoder, SimpleEncoder) or request.flags & CommandFlag.DF:
            return True
        return not any(isinstance(run, ZeroRun) for run in runs)

    def _send_for_all(self) -> None:
        gathered, self._gathered = self._gathered, []
        for at in range(0, len(gathered), GROUP):
            self._send_for(gathered[at : at + GROUP])

    def _send_for(self, group: Sequence[_Cold]) -> None:
        done = partial(self._fetched, group)
        self._reactor.workers.submit(_read_all, self._name, group, done=done)

    def _fetched(
        self, group: Sequence[_Cold], failed: Sequence[bool] | None, error: BaseException | None
    ) -> None:
        answers: Answer = []
        for cold, is_bad in zip(group, failed or [True] * len(group), strict=True):
            request, _, reply = cold
            self._reading -= 1
            self._slow.note_answered(request)
            if is_bad or error is not None:
                self._buffers.release(reply.buffer)
                self._slow.start(request, self._slow.read(request))  # it can tell what is wrong
            else:
                answers.append(reply.whole)
        if answers:
            self._deliver(answers)


def _read_all(name: str, group: Sequence[_Cold]) -> list[bool]:
    """Of each, has it failed? In a thread."""
    for request, runs, _ in group[1:]:  # to read the first is to announce it
        for fd, position, length, _ in in_files(runs, request.length):  # by now a pack may be gone
            announce(fd, position, length)
    failed = []
    for request, runs, reply in group:
        try:
            read_runs(name, request.offset, runs, reply.data)
        except Exception:  # noqa: BLE001 - it is read once more, by who can tell
            failed.append(True)
        else:
            failed.append(False)
    return failed
