"""What a ``Transmission`` counts about itself.

::

    Reads            served   plain reads, in bytes of their headers: one addition a turn
                     begun    those of them that threads answer
    AfarReads        begun    reads that another server answers
    Dispatch         what took the long way, by kind
    everything else  _received

Rule: ints, added to where a batch ends. Nothing here is locked: it belongs to the loop, and what a
thread counts while it has the connection is the thread's own (``Writes``).
"""

from time import perf_counter

from nbdsrv.net.dispatch import Dispatch
from nbdsrv.net.measures import Measures, Tally
from nbdsrv.net.sender import Sender

__all__ = ["Measured"]


class Measured:
    """Base of ``Transmission``. ``_quick`` is its: may the next turn take the short way?"""

    _quick: bool

    def __init__(self, measures: Measures, dispatch: Dispatch, sender: Sender) -> None:
        self._measures = measures
        self._dispatch = dispatch
        self._sender = sender
        self._writes = dispatch.writes
        self._reads = dispatch.reads
        self._afar = dispatch.afar
        self._payloads = dispatch.payloads
        self._frame_size = dispatch.frame.size
        self._received = 0  # bytes that came with the requests
        self._timed = False

    def tally(self) -> Tally:
        """What has been moved so far. A write that a thread is storing right now may be missing."""
        dispatch, writes, sender = self._dispatch, self._writes, self._sender
        payloads = self._payloads
        begun = self._afar.begun // self._frame_size
        taken = self._reads.served // self._frame_size
        quick = taken - self._reads.begun
        return Tally(
            received=self._received + writes.received + payloads.received,
            sent=sender.sent + sender.out.sent + writes.sent,
            reads=taken + begun + dispatch.reads_begun,
            quick=quick,
            writes=writes.stored + payloads.slow_writes + dispatch.empty_writes,
            others=dispatch.others,
            refused=dispatch.refusals,
        )

    @property
    def asked(self) -> int:
        """Bytes the client has sent: a number that changes with each request."""
        return self._received + self._writes.received + self._payloads.received

    def watch(self) -> None:
        """Time the next turn. It goes the long way round, so that the short one need not ask."""
        self._timed = True
        self._quick = False

    def _timed_turn(self) -> None:
        self._timed = False
        reads, began = self._reads, perf_counter()
        before, begun = reads.served, reads.begun
        self._turn()
        served = (reads.served - before) // self._frame_size - (reads.begun - begun)
        if served:
            self._measures.quick.add(perf_counter() - began, served)

    def _turn(self) -> None:
        raise NotImplementedError
