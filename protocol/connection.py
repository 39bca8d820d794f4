"""A client's transmission phase: requests out, answers in, no I/O.

::

    read() write() ... ──> cookie and bytes to send
                                                       Inflight, by cookie
    receive_data()     ──> Data, Hole, Status, Failed, Done

Source: proto.md, "Transmission" and "Request types" (ext-header branch).

Rule: what the server did not offer is not sent (LocalProtocolError), what was not asked for is
not accepted (RemoteProtocolError).
"""

from collections.abc import Collection
from struct import Struct

from protocol.answers import Answer
from protocol.constants import Command, CommandFlag, Dialect, TransmissionFlag
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.headers import (
    EXTENDED_READ_KEY,
    EXTENDED_REQUEST,
    READ_KEY,
    REQUEST,
    extended_request_key,
    request_key,
)
from protocol.incoming import Incoming, Payload
from protocol.inflight import Inflight
from protocol.terms import Negotiated

__all__ = ["ClientConnection"]

MAX_COMPACT_LENGTH = 0xFFFFFFFF
"""Bytes a 28-byte request can name."""

WRITING = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
WITH_PAYLOAD = frozenset({Command.READ, Command.WRITE})

OFFERS = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.CACHE: TransmissionFlag.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}
FLAG_OFFERS = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.DF: TransmissionFlag.SEND_DF,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}

STATUS_LENGTH = Struct(">Q")
CONTEXT_ID = Struct(">I")


class ClientConnection:
    """One connection in transmission, on the terms of its handshake. Not safe for concurrent use.

    A request method returns the request's cookie and what to send for it; send it in the order
    of the calls. Offsets and lengths are bytes, a length is at least 1. All request methods
    raise LocalProtocolError, and change nothing, for what the server has not offered, what lies
    outside the export or its block sizes, and when the connection is ending or broken.

    Attributes:
        terms: what the handshake agreed on.
        salvaged: after a RemoteProtocolError, the answers that were complete before it.
    """

    def __init__(self, terms: Negotiated) -> None:
        self.terms = terms
        self.salvaged: list[Answer] = []
        self._extended = terms.dialect is Dialect.EXTENDED
        self._offered: set[tuple[Command, int]] = set()  # what has been checked already
        # A plain READ needs no offer: what remains to be checked of it are these.
        self._longest_read = min(terms.blocks.maximum, terms.size, MAX_COMPACT_LENGTH)
        self._unaligned = terms.blocks.minimum - 1
        self._read_frame = EXTENDED_REQUEST if self._extended else REQUEST
        self._read_key = EXTENDED_READ_KEY if self._extended else READ_KEY
        self._inflight: dict[int, Inflight] = {}
        self._incoming = Incoming(terms, self._inflight)
        self._next_cookie = 1
        self._disconnecting = False
        self._error: RemoteProtocolError | None = None

    @property
    def inflight(self) -> tuple[int, ...]:
        """Cookies of the requests that await their end, oldest first."""
        return tuple(self._inflight)

    @property
    def leaving(self) -> bool:
        """Whether the server has said ESHUTDOWN; all that may follow is ``disconnect``."""
        return self._incoming.leaving

    # --- requests ------------------------------------------------------------------------

    def read(self, offset: int, length: int, *, unfragmented: bool = False) -> tuple[int, bytes]:
        """READ, at most ``terms.blocks.maximum`` bytes; DF with ``unfragmented``."""
        odd = unfragmented or self._error is not None or self._disconnecting or self.leaving
        within = 0 < length <= self._longest_read and 0 <= offset <= self.terms.size - length
        if odd or not within or (offset | length) & self._unaligned:
            flags = int(CommandFlag.DF) if unfragmented else 0
            return self._range(Command.READ, flags, offset, length)  # which says what is wrong
        cookie = self._next_cookie
        self._next_cookie = (cookie + 1) & 0xFFFFFFFFFFFFFFFF
        self._inflight[cookie] = Inflight(cookie, Command.READ, offset, length)
        return cookie, self._read_frame.pack(self._read_key, cookie, offset, length)

    def write(self, offset: int, length: int, *, fua: bool = False) -> tuple[int, bytes]:
        """WRITE, at most ``terms.blocks.maximum`` bytes.

        Returns the header only: send it, then exactly ``length`` bytes of data, from wherever
        they are, with nothing in between.
        """
        flags = CommandFlag.PAYLOAD_LEN if self._extended else 0
        return self._range(Command.WRITE, flags | fua_flag(fua=fua), offset, length)

    def flush(self) -> tuple[int, bytes]:
        """FLUSH: covers the writes whose Done has arrived."""
        return self._request(Command.FLUSH, 0, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> tuple[int, bytes]:
        """TRIM: afterwards the contents are anything."""
        return self._range(Command.TRIM, fua_flag(fua=fua), offset, length)

    def cache(self, offset: int, length: int) -> tuple[int, bytes]:
        """CACHE: the range will be read soon."""
        return self._range(Command.CACHE, 0, offset, length)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> tuple[int, bytes]:
        """WRITE_ZEROES; with ``fast`` it fails with ENOTSUP rather than take its time."""
        flags = fua_flag(fua=fua)
        flags |= CommandFlag.NO_HOLE if no_hole else 0
        flags |= CommandFlag.FAST_ZERO if fast else 0
        return self._range(Command.WRITE_ZEROES, flags, offset, length)

    def block_status(
        self,
        offset: int,
        length: int,
        *,
        one: bool = False,
        contexts: Collection[int] | None = None,
    ) -> tuple[int, bytes]:
        """BLOCK_STATUS of all negotiated contexts, or of ``contexts`` by id (with payload).

        The answer may end early: ask again from there. With ``one`` it is a single extent.
        """
        known = self.terms.contexts
        chosen = frozenset(known if contexts is None else contexts)
        if not chosen or not chosen <= known.keys():
            raise LocalProtocolError(f"meta contexts {sorted(chosen)} of {sorted(known)}")
        flags = int(CommandFlag.REQ_ONE) if one else 0
        if contexts is None:
            return self._range(Command.BLOCK_STATUS, flags, offset, length, contexts=chosen)
        if not self.terms.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
            raise LocalProtocolError("the server does not offer BLOCK_STATUS_PAYLOAD")
        payload = STATUS_LENGTH.pack(length) + b"".join(map(CONTEXT_ID.pack, sorted(chosen)))
        flags |= CommandFlag.PAYLOAD_LEN
        return self._range(
            Command.BLOCK_STATUS, flags, offset, length, contexts=chosen, payload=payload
        )

    def disconnect(self) -> bytes:
        """DISC: the last thing to send. Requests in flight are still answered, or should be.

        Raises:
            LocalProtocolError: it has been sent already, or the connection is broken.
        """
        self._check_open()
        self._disconnecting = True
        return self._header(Command.DISC, 0, 0, 0, 0)

    def _range(
        self,
        command: Command,
        flags: int,
        offset: int,
        length: int,
        *,
        contexts: frozenset[int] = frozenset(),
        payload: bytes = b"",
    ) -> tuple[int, bytes]:
        limit = MAX_COMPACT_LENGTH if not self._extended else self.terms.size
        if command in WITH_PAYLOAD:
            limit = min(limit, self.terms.blocks.maximum)
        where = f"{command.name} {offset}+{length}"
        if not 1 <= length <= limit:
            raise LocalProtocolError(f"{where}: the length is not between 1 and {limit}")
        if offset < 0 or offset + length > self.terms.size:
            raise LocalProtocolError(f"{where}: not within an export of {self.terms.size} bytes")
        minimum = self.terms.blocks.minimum
        if (offset | length) & (minimum - 1):
            raise LocalProtocolError(f"{where}: not in blocks of {minimum} bytes")
        return self._request(command, flags, offset, length, contexts=contexts, payload=payload)

    def _request(
        self,
        command: Command,
        flags: int,
        offset: int,
        length: int,
        *,
        contexts: frozenset[int] = frozenset(),
        payload: bytes = b"",
    ) -> tuple[int, bytes]:
        if self._error is not None or self._disconnecting:
            self._check_open()
        if (command, flags) not in self._offered:
            self._check_offered(command, flags)
            self._offered.add((command, flags))
        if self.leaving:
            raise LocalProtocolError("the server is shutting down: disconnect")
        cookie = self._next_cookie
        self._next_cookie = (cookie + 1) & 0xFFFFFFFFFFFFFFFF
        self._inflight[cookie] = Inflight(
            cookie, command, offset, length, flags=flags, contexts=contexts
        )
        return cookie, self._header(
            command, flags, cookie, offset, len(payload) or length
        ) + payload

    def _header(self, command: Command, flags: int, cookie: int, offset: int, length: int) -> bytes:
        if self._extended:
            return EXTENDED_REQUEST.pack(
                extended_request_key(command, flags), cookie, offset, length
            )
        return REQUEST.pack(request_key(command, flags), cookie, offset, length)

    def _check_open(self) -> None:
        if self._error is not None:
            raise LocalProtocolError(f"the connection is broken: {self._error}")
        if self._disconnecting:
            raise LocalProtocolError("the connection has been ended")

    def _check_offered(self, command: Command, flags: int) -> None:
        offered = self.terms.flags
        if offered & TransmissionFlag.READ_ONLY and command in WRITING:
            raise LocalProtocolError(f"{command.name} to a read-only export")
        needed = OFFERS.get(command, TransmissionFlag(0))
        for flag, offer in FLAG_OFFERS.items():
            if flags & flag:
                needed |= offer
        if missing := needed & ~offered:
            raise LocalProtocolError(f"{command.name}: the server does not offer {missing.name}")

    # --- answers -------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Answer]:
        """Take bytes from the server, in pieces of any size.

        The Data among the answers are views of ``data``: use them before it changes.

        Raises:
            RemoteProtocolError: the server broke a rule. What it answered before that, with the
                same bytes, is in ``salvaged``. Every further call raises the same.
        """
        if self._error is not None:
            raise self._error
        try:
            self._incoming.feed(memoryview(data).cast("B"))
        except RemoteProtocolError as error:
            self._error = error
            self.salvaged = self._take_answers()
            raise
        return self._take_answers()

    @property
    def payload(self) -> Payload | None:
        """The data that comes next in the stream, or None if something else does.

        A shell that reads those bytes straight to where they belong tells
        ``payload_received`` instead of passing them to ``receive_data``.
        """
        return self._incoming.payload

    def payload_received(self, count: int) -> list[Answer]:
        """``count`` bytes of ``payload`` are where they belong.

        Raises:
            LocalProtocolError: there are not that many.
            RemoteProtocolError: as ``receive_data``.
        """
        payload = self._incoming.payload
        if payload is None or not 0 <= count <= payload.length or self._error is not None:
            raise LocalProtocolError(f"{count} bytes received of {payload}")
        try:
            if count:
                self._incoming.advance(count)
        except RemoteProtocolError as error:
            self._error = error
            raise
        return self._take_answers()

    def eof(self) -> None:
        """The server has closed the connection.

        Raises:
            RemoteProtocolError: without ``disconnect``, or with answers owed; says which.
        """
        if self._error is not None:
            raise self._error
        if self._disconnecting and not self._inflight and self._incoming.between_replies:
            return
        where = "" if self._incoming.between_replies else f", {self._incoming.whereabouts()}"
        owed = f", {len(self._inflight)} requests unanswered" if self._inflight else ""
        self._error = RemoteProtocolError(f"server closed the connection{where}{owed}")
        raise self._error

    def _take_answers(self) -> list[Answer]:
        answers, self._incoming.answers = self._incoming.answers, []
        return answers


def fua_flag(*, fua: bool) -> int:
    return int(CommandFlag.FUA) if fua else 0
