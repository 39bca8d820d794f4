"""What a ``Transmission`` counts about itself.

::

    Reads            served   plain reads, in bytes of their headers: one addition a turn
                     begun    those of them that threads answer
    AfarReads        begun    reads that another server answers
    everything else  _received  _reads_begun ...

Rule: ints, added to where a batch ends. Nothing here is locked: it belongs to the loop, and what a
thread counts while it has the connection is the thread's own (``Writes``).
"""

from time import perf_counter

from nbdsrv.net.afar import AfarReads
from nbdsrv.net.measures import Measures, Tally
from nbdsrv.net.payload import Payloads
from nbdsrv.net.reads import Reads
from nbdsrv.net.sender import Sender
from nbdsrv.net.writes import Writes

__all__ = ["Measured"]


class Measured:
    """Base of ``Transmission``. ``_quick`` is its: may the next turn take the short way?"""

    _quick: bool
    _sender: Sender
    _writes: Writes
    _payloads: Payloads
    _afar: AfarReads
    _reads: Reads

    def __init__(self, measures: Measures, frame: int) -> None:
        """``frame`` is the bytes of a request header."""
        self._measures = measures
        self._frame_size = frame
        self._received = 0  # bytes, those of ``_answer_reads`` apart
        self._reads_begun = self._empty_writes = self._others = self._refusals = 0
        self._timed = False

    def tally(self) -> Tally:
        """What has been moved so far. A write that a thread is storing right now may be missing."""
        writes, sender, payloads = self._writes, self._sender, self._payloads
        begun = self._afar.begun // self._frame_size
        taken = self._reads.served // self._frame_size
        quick = taken - self._reads.begun
        return Tally(
            received=self._received + writes.received + payloads.received,
            sent=sender.sent + sender.out.sent + writes.sent,
            reads=taken + begun + self._reads_begun,
            quick=quick,
            writes=writes.stored + payloads.slow_writes + self._empty_writes,
            others=self._others,
            refused=self._refusals,
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
