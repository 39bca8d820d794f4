"""Which way a request takes.

::

                 ┌ not ours, or too long ──> the last one: nothing behind it can be found
    header ──────┼ refused ────────────────> its payload is skipped, then an error
    at ``at``    ├ with a payload ─────────> Payloads ─> Writes | SlowRequests
                 ├ READ ── in memory ──────> Reads
                 │         packed ─────────> PackedReads
                 │         on a disk ──────> FetchedReads, once more from here | ColdReads
                 │         another server's > AfarReads
                 └ all else ───────────────> SlowRequests

Plain reads that follow each other never come here: ``Reads.serve`` takes them as they lie, and
hands on those of blocks (``_unpack``). Belongs to the loop, and never blocks it.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.residency import Stored
from nbdsrv.disk.runs import RemoteRun, Run
from nbdsrv.net.afar import AfarReads
from nbdsrv.net.channel import Channel
from nbdsrv.net.cold import ColdReads
from nbdsrv.net.fetched import Fetch, FetchedReads
from nbdsrv.net.measures import Measures
from nbdsrv.net.packed import PackedReads
from nbdsrv.net.payload import Payloads, Refusal
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.reads import Reads
from nbdsrv.net.sender import Sender
from nbdsrv.net.slow import Answer, SlowRequests
from nbdsrv.net.writes import Streak, Writes
from protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Dialect,
    Errno,
)
from protocol.handshake.events import Agreement
from protocol.headers import EXTENDED_REQUEST, REQUEST, extended_request_key, request_key
from protocol.replies import encoder
from protocol.requests import MAX_PAYLOAD, Framing, Request, Rules

__all__ = ["LAST", "Dispatch"]

MAX_FETCH = 1 << 20
"""Bytes one thread reads in one go for a cold READ."""
LAST = -2
"""Of ``Dispatch.serve``: nothing behind it is to be looked at."""

SHUTDOWN: Refusal = (Errno.ESHUTDOWN, "the server is shutting down")


class Dispatch:
    """One client's requests.

    Attributes:
        frame: of a request's header.
        draining: are all requests refused, since the server stops?
        turned_away: has one been, for that?
        reads_begun: READs that came here.
        empty_writes: WRITEs of nothing.
        others: other requests begun.
        refusals: errors for what was not begun at all.
    """

    def __init__(
        self,
        reactor: Reactor,
        channel: Channel,
        disk: Disk,
        agreement: Agreement,
        sender: Sender,
        *,
        deliver: Callable[[Answer], None],
        again: Callable[[list[Fetch]], None],
        streak_ended: Callable[[Streak | None, BaseException | None], None],
        memory_is_back: Callable[[], None],
        measures: Measures,
    ) -> None:
        """``deliver`` sends an answer and becomes the owner of its buffers; ``again`` calls
        ``serve_again``; the others are told as ``Writes`` and ``Payloads`` say.
        """
        dialect = agreement.dialect
        extended = dialect is Dialect.EXTENDED
        self.frame = EXTENDED_REQUEST if extended else REQUEST
        self._key = extended_request_key if extended else request_key
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._framing = Framing(dialect)
        self._rules = Rules(
            size=agreement.export.size,
            flags=agreement.flags,
            dialect=dialect,
            block_sizes=agreement.export.block_sizes,
            has_contexts=bool(agreement.contexts),
        )
        self._encoder = encoder(dialect)
        self._sender = sender
        answering = (disk, reactor, self._encoder)
        self.slow = SlowRequests(*answering, agreement.contexts, deliver, measures)
        self.afar = AfarReads(*answering, dialect, self.slow, deliver, measures)
        self.packed = PackedReads(disk, reactor, self.slow, deliver, measures)
        self.fetched = FetchedReads(reactor, self.slow, again)
        self.cold = ColdReads(*answering, self.slow, deliver)
        self.reads = Reads(
            *(disk, reactor, sender, self._encoder, dialect, channel.secure),
            *(self._fetch, self._unpack),
        )
        self.writes = Writes(
            *(disk, reactor, channel, self._encoder, dialect, streak_ended),
            self.slow.note_failure,
            measures,
        )
        self.payloads = Payloads(
            reactor,
            channel,
            self._rules,
            tuple(agreement.contexts),
            self.writes,
            self.slow,
            refuse=self._refuse,
            memory_is_back=memory_is_back,
            direct_fua=Ability.DIRECT_FUA in disk.abilities,
        )
        self.draining = self.turned_away = False
        self._measures = measures
        self._is_again = False
        self._waiting: dict[int, float] = {}
        self.reads_begun = self.empty_writes = self.others = self.refusals = 0

    def serve(self, rx: memoryview, at: int, end: int) -> int:
        """Serve the request whose header is at ``rx[at:]``.

        Returns:
            Where the next one begins, ``payload.AGAIN`` or ``LAST``.

        Raises:
            ConnectionError: there is no request, or the client is gone.
        """
        key, cookie, offset, length = self.frame.unpack_from(rx, at)
        request = Request(key & 0xFFFF, key >> 16 & 0xFFFF, cookie, offset, length)
        if key >> 32 != self._magic:
            self._sender.push()
            raise ConnectionError(f"bad request magic {key >> 32:#x}")
        body = at + self.frame.size
        if request.command == Command.DISC:
            return LAST
        length = self._framing.payload_length(request)
        if length > MAX_PAYLOAD:
            self._refuse(request, Errno.EINVAL, f"payload of {length} bytes exceeds {MAX_PAYLOAD}")
            return LAST
        refusal = self._rules.check(request)
        if self.draining:
            refusal, self.turned_away = SHUTDOWN, True
        if refusal is not None:
            if length > end - body:
                self.payloads.skip(request, length - (end - body), refusal)
                return end
            self._refuse(request, *refusal)
            return body + length
        if length:
            return self.payloads.receive(request, rx, body, end)
        if request.command == Command.BLOCK_STATUS and request.flags & CommandFlag.PAYLOAD_LEN:
            self._refuse(request, Errno.EINVAL, "PAYLOAD_LEN without a payload")
            return body
        if request.command == Command.READ:
            self.reads_begun += 1
            self._read(request)
        elif request.command == Command.WRITE:
            self.empty_writes += 1
            self._sender.emit(self._encoder.done(request.cookie, request.offset))
        else:
            self.others += 1
            self.slow.start(request, self.slow.perform(request))
        return body

    def _read(self, request: Request) -> None:
        if self.reads.read(request):
            return
        runs = self.reads.runs(request)
        if runs is not None and isinstance(runs[0], RemoteRun):
            if self.afar.begin(request.cookie, request.offset, request.length):
                return
            runs = None
        self._hand_on(request, runs)

    def serve_again(self, fetched: Sequence[Fetch]) -> None:
        """Answer READs that have been counted already, and whose bytes are in memory now."""
        reads, size = self.reads, self.frame.size
        counted = reads.served, reads.begun
        headers = memoryview(b"".join(self._header(fetch.request) for fetch in fetched))
        self._waiting = {fetch.request.cookie: fetch.began for fetch in fetched}
        self._is_again = True
        try:
            at, end = 0, len(headers)
            while at < end:
                at = reads.serve(headers, at, end)
                if at < end:
                    self._read(fetched[at // size].request)
                    at += size
        finally:
            self._is_again = False
            reads.served, reads.begun = counted
            waits, self._waiting = self._waiting, {}
            now = perf_counter()
            for began in waits.values():
                self._measures.reads.add(now - began)

    def _header(self, request: Request) -> bytes:
        command, flags, *where = request
        return self.frame.pack(self._key(command, flags), *where)

    def _fetch(self, request: Request, wanted: Sequence[Stored]) -> bool:
        """For ``Reads``: have the kernel bring that into memory, but not twice."""
        return not self._is_again and self.fetched.fetch(request, wanted)

    def _unpack(self, request: Request, runs: Sequence[Run], away: bool) -> bool:  # noqa: FBT001
        """For ``Reads``: have threads get blocks."""
        if self.slow.full():
            return False
        self._hand_on(request, runs, away=away)
        return True

    def _hand_on(self, request: Request, runs: Sequence[Run] | None, *, away: bool = False) -> None:
        """A READ that is not answered on the spot, to the first that takes it, and times it."""
        began = self._waiting.pop(request.cookie, None)
        if runs is None or request.length > MAX_FETCH:
            self.slow.start(request, self.slow.read(request))
            return
        if not away and self.packed.begin(request, runs, began):
            return
        if self._is_again or not self.fetched.begin(request, runs):
            self.cold.begin(request, runs)

    def _refuse(self, request: Request, errno: Errno, text: str) -> None:
        self.refusals += 1
        self._sender.emit(self._encoder.error(request.cookie, request.offset, errno, text))
