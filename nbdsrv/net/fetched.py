"""Small READs whose bytes the kernel brings into memory first: no thread, no task, no buffer.

::

    client ── READ READ READ ──> not in memory ── ring ──> the disk
                 ^                                           |
                 └──── as if they had just come <── _pass_on <┘  what has come in one turn

Nothing is read *for* the client here: its pages are in memory then, plain or packed, and the READ
goes the way of all that are. Should they be gone again by then, it is ``ColdReads``'; what fails is
``SlowRequests``', which can tell why.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

from nbdsrv.disk.residency import Stored
from nbdsrv.disk.runs import BlockRun, FileRun, Run, in_files
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.slow import SlowRequests
from protocol.requests import Request

__all__ = ["Fetch", "FetchedReads"]

MAX_FETCHING = 64
"""READs of one client under way at a time."""
SMALL = 1 << 16
"""Bytes of a READ: the kernel copies them once more, on the loop."""
MAX_PIECES = 8
"""Stretches of files that one READ is put together from."""


class Fetch:
    """One READ under way.

    Attributes:
        began: when it came, in ``perf_counter``'s seconds.
        left: pieces that have not come.
        good: have the others all come whole?
    """

    __slots__ = ("began", "good", "left", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.began = perf_counter()
        self.left = 0
        self.good = True


class FetchedReads:
    """One client's. Belongs to the loop."""

    def __init__(
        self, reactor: Reactor, slow: SlowRequests, again: Callable[[list[Fetch]], None]
    ) -> None:
        """``again`` serves those whose bytes have come; it may find some of them gone."""
        self._reactor = reactor
        self._slow = slow
        self._again = again
        self._most = MAX_FETCHING if reactor.brings else 0
        self._fetching = 0
        self._arrived: list[Fetch] = []

    def begin(self, request: Request, runs: Sequence[Run]) -> bool:
        """Carry out a READ that is within the disk; False if it is not for here, or not now."""
        return self._suits(runs) and self.fetch(request, in_files(runs, request.length))

    def fetch(self, request: Request, wanted: Sequence[Stored]) -> bool:
        """The same, of which it is known what must be in memory."""
        if request.length > SMALL or self._fetching >= self._most:
            return False
        fetch, bring = Fetch(request), self._reactor.bring
        for fd, position, length, _ in wanted:
            if not bring(fd, position, length, self._came, (fetch, length)):
                fetch.good = False
                break
            fetch.left += 1
        if not fetch.left:
            return False
        self._fetching += 1
        self._slow.enter(request.length)
        return True

    def _suits(self, runs: Sequence[Run]) -> bool:
        """Is it of a few pieces or, as unpacking is the threads' in any case, one packed block
        while nothing else is under way?
        """
        if len(runs) == 1:
            return not (isinstance(runs[0], BlockRun) and self._slow.in_flight)
        return len(runs) <= MAX_PIECES and all(isinstance(run, FileRun) for run in runs)

    def _came(self, piece: tuple[Fetch, int], result: int) -> None:
        fetch, length = piece
        fetch.left -= 1
        if result != length:
            fetch.good = False
        if not fetch.left:
            if not self._arrived:
                self._reactor.soon(self._pass_on)
            self._arrived.append(fetch)

    def _pass_on(self) -> None:
        arrived, self._arrived = self._arrived, []
        slow = self._slow
        good = []
        for fetch in arrived:
            request = fetch.request
            self._fetching -= 1
            slow.leave(request.length)
            if fetch.good:
                good.append(fetch)
            else:
                slow.start(request, slow.read(request))
        self._again(good)
