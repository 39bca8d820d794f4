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
from nbdsrv.disk.ring import LONGEST
from nbdsrv.disk.runs import BlockRun, FileRun, Run
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.slow import SlowRequests
from protocol.requests import Request

__all__ = ["Fetch", "FetchedReads", "pieces"]

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
        self._fetching = 0
        self._arrived: list[Fetch] = []

    def begin(self, request: Request, wanted: Sequence[Stored]) -> bool:
        """Begin a READ that is within the disk, of these bytes; False if that is not possible."""
        if request.length > SMALL or self._fetching >= MAX_FETCHING:
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
        self._slow.in_flight += 1
        self._slow.moving += request.length
        return True

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
            slow.in_flight -= 1
            slow.moving -= request.length
            if fetch.good:
                good.append(fetch)
            else:
                slow.start(request, slow.read(request))
        self._again(good)


def pieces(runs: Sequence[Run], length: int) -> Sequence[Stored]:
    """What must be in memory for the first ``length`` bytes; empty if that is nothing for here."""
    first = runs[0]
    if isinstance(first, BlockRun):
        stored = first.blocks.stored(first.key) if len(runs) == 1 else None
        if stored is None or stored[2] > LONGEST or not stored[3].reads_ahead:
            return ()
        return (stored,)
    if len(runs) > MAX_PIECES:
        return ()
    wanted: list[Stored] = []
    for run in runs:
        if not isinstance(run, FileRun) or not run.residency.reads_ahead:
            return ()
        wanted.append((run.fd, run.position, min(run.length, length), run.residency))
        length -= run.length
    return wanted
