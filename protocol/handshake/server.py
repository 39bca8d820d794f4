"""The server's half of the handshake, as a table of states.

::

    GREETED --flags--> NEWSTYLE    client without FIXED_NEWSTYLE: EXPORT_NAME or nothing
            --flags--> CLOSED      the same where TLS is required: it could never begin TLS
            --flags--> FORCED      TLS required and not begun: STARTTLS, ABORT or TLS_REQD
            --flags--> OPEN        options are served in plain text
    OPEN, FORCED --STARTTLS--> UPGRADING --tls_started()--> SECURED
    OPEN, SECURED --LIST/INFO/GO/...--> ASKING --answer--> the same, or TRANSMISSION
    any --violation, ABORT--> CLOSED

Every (state, option) pair is in ``TABLE``; tests walk all of it. What needs knowledge of
exports is an event for the I/O shell, which answers by one call of ``list_exports``,
``accept``, ``contexts`` or ``refuse``; until then nothing further is parsed.

Rules that bite, and where they are kept:

* STARTTLS forgets everything negotiated, and a single byte pipelined in plain text behind it
  closes the connection (CVE-2021-3716 and the STARTTLS injection family): ``_starttls``.
* SET_META_CONTEXT replaces the former set even when it fails: ``_set_meta_context``.
* EXPORT_NAME cannot be refused, only closed: ``_reply_error``.
* Lengths are bounded before they are waited for: ``_next_option``.
"""

from collections.abc import Callable, Iterable, Sequence

from protocol import contexts as meta
from protocol import structs
from protocol.constants import (
    IHAVEOPT,
    MAX_OPTION_LENGTH,
    MAX_STRING,
    ClientFlag,
    Dialect,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from protocol.errors import LocalProtocolError
from protocol.handshake.events import (
    Agreement,
    Close,
    Event,
    ListExports,
    OpenExport,
    QueryContexts,
    StartTls,
    State,
    TlsMode,
    Transmit,
)
from protocol.handshake.options import (
    ExportInfo,
    InvalidOption,
    decode_name,
    export_name_reply,
    info_replies,
    meta_context_reply,
    option_reply,
    parse_info,
    parse_meta_context,
    server_reply,
    truncate_text,
)

__all__ = ["TABLE", "ServerHandshake"]

MAX_OPTIONS = 4096
"""Options one connection may send: enough to ask for three things of a thousand exports."""
MAX_OPTION_BYTES = 1 << 20
"""Bytes of option data one connection may send in all."""


class ServerHandshake:
    """One connection's handshake. Feed with ``receive``, poll ``next_event``, drain ``to_send``.

    Not thread-safe. After ``Close`` or ``Transmit`` it has no more events.
    """

    def __init__(self, tls: TlsMode = TlsMode.OFF) -> None:
        self.state = State.GREETED
        self.shutting_down = False
        self._tls = tls
        self._buffer = bytearray()
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._out = [structs.Greeting.build({"flags": flags})]
        self._client = ClientFlag(0)
        self._secure = False
        self._options = 0
        self._option_bytes = 0
        self._resume = State.OPEN
        self._asked: tuple[int, ...] = ()
        self._queries: tuple[str, ...] = ()
        self._pending: OpenExport | QueryContexts | ListExports | None = None
        self._forget()

    def _forget(self) -> None:
        """No state negotiated in plain text survives STARTTLS."""
        self._dialect = Dialect.SIMPLE
        self._contexts: dict[int, str] = {}
        self._contexts_of: str | None = None

    # --- bytes ---------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer; the shell reads at most a socket buffer at a time."""
        self._buffer += data

    def to_send(self) -> bytes:
        """Bytes due to the peer; empties the queue."""
        out = b"".join(self._out)
        self._out.clear()
        return out

    def next_event(self) -> Event | None:
        """The next thing to do, or None when more bytes (or an answer) are needed."""
        while True:
            if self.state is State.GREETED:
                if len(self._buffer) < 4:
                    return None
                event = self._client_flags()
            elif self.state in _READING:
                taken = self._next_option()
                if taken is None or isinstance(taken, Close):
                    return taken
                event = self._dispatch(*taken)
            elif self.state is State.UPGRADING and self._buffer:
                return self._close("plain text pipelined behind STARTTLS")
            else:
                return None
            if event is not None:
                return event

    def _client_flags(self) -> Event | None:
        flags = structs.ClientFlags.parse(bytes(self._buffer[:4])).flags
        del self._buffer[:4]
        # int: the inverse of an IntFlag has only bits with a name, and would let all others pass
        if flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
            return self._close(f"unknown client flags {flags:#x}")
        self._client = ClientFlag(flags)
        if ClientFlag.FIXED_NEWSTYLE not in self._client:
            if self._tls is TlsMode.REQUIRED:
                return self._close("TLS is required, and needs fixed newstyle negotiation")
            self.state = State.NEWSTYLE
        elif self._tls is TlsMode.REQUIRED:
            self.state = State.FORCED
        else:
            self.state = State.OPEN
        return None

    def _next_option(self) -> tuple[int, bytes] | Close | None:
        """Frame one option. Nothing is awaited that is longer than could be answered."""
        buffer = self._buffer
        if len(buffer) >= 8 and int.from_bytes(buffer[:8], "big") != IHAVEOPT:
            return self._close("bad option magic")
        if len(buffer) < 16:
            return None
        header = structs.OptionHeader.parse(bytes(buffer[:16]))
        option, length = header.option, header.length
        limit = MAX_STRING if option == Option.EXPORT_NAME else MAX_OPTION_LENGTH
        if length > limit:
            return self._close(f"option {option} announces {length} bytes, at most {limit}")
        if len(buffer) < 16 + length:
            return None
        self._options += 1
        self._option_bytes += length
        if self._options > MAX_OPTIONS or self._option_bytes > MAX_OPTION_BYTES:
            return self._close("too many options")
        data = bytes(buffer[16 : 16 + length])
        del buffer[: 16 + length]
        return option, data

    def _dispatch(self, number: int, data: bytes) -> Event | None:
        option = Option(number) if number in _OPTIONS else None
        if self.shutting_down and option is not Option.ABORT:
            return self._reply_error(number, Reply.ERR_SHUTDOWN, "the server is shutting down")
        action = TABLE[self.state, option]
        try:
            return action(self, number, data)
        except InvalidOption as error:
            return self._reply_error(number, error.reply, str(error))

    # --- answers from the shell ------------------------------------------------------------

    def list_exports(self, exports: Iterable[tuple[str, str]]) -> None:
        """Answer ``ListExports`` with (name, description) pairs."""
        self._answering(ListExports)
        self._out.extend(server_reply(name, description) for name, description in exports)
        self._ack(Option.LIST)
        self.state = self._resume

    def contexts(self, available: Sequence[str]) -> None:
        """Answer ``QueryContexts`` with the names of all contexts the export offers."""
        query = self._answering(QueryContexts)
        assert isinstance(query, QueryContexts)
        if query.option is Option.SET_META_CONTEXT:
            chosen = meta.selected(available, self._queries)
            self._contexts, self._contexts_of = chosen, query.name
            found = list(chosen.items())
        else:
            found = [(0, name) for name in meta.listed(available, self._queries)]
        self._out.extend(meta_context_reply(query.option, *pair) for pair in found)
        self._ack(query.option)
        self.state = self._resume

    def accept(self, export: ExportInfo) -> Event | None:
        """Answer ``OpenExport``: the export exists and may be used."""
        request = self._answering(OpenExport)
        assert isinstance(request, OpenExport)
        self.state = self._resume
        agreement = self._agreement(request, export)
        if request.option is Option.EXPORT_NAME:
            zeroes = ClientFlag.NO_ZEROES not in self._client
            self._out.append(export_name_reply(export.size, agreement.flags, zeroes=zeroes))
            return self._transmit(agreement)
        self._out.append(info_replies(request.option, export, agreement.flags, self._asked))
        if export.block_sizes.minimum > 1 and Info.BLOCK_SIZE not in self._asked:
            text = f"requests must be aligned to {export.block_sizes.minimum} bytes"
            return self._reply_error(request.option, Reply.ERR_BLOCK_SIZE_REQD, text)
        self._ack(request.option)
        return self._transmit(agreement) if request.option is Option.GO else None

    def refuse(self, reply: Reply, text: str) -> Event | None:
        """Answer ``OpenExport`` or ``QueryContexts`` with an error."""
        request = self._answering(OpenExport, QueryContexts)
        assert isinstance(request, OpenExport | QueryContexts)
        self.state = self._resume
        return self._reply_error(request.option, reply, text)

    def tls_started(self) -> None:
        """The connection is encrypted from here on; begin the options anew."""
        if self.state is not State.UPGRADING or self._buffer:
            held = len(self._buffer)
            raise LocalProtocolError(f"tls_started() in state {self.state.name}, {held} bytes held")
        self._secure = True
        self.state = State.SECURED

    def _answering(self, *kinds: type) -> OpenExport | QueryContexts | ListExports:
        pending = self._pending
        if self.state is not State.ASKING or pending is None or not isinstance(pending, kinds):
            raise LocalProtocolError(f"no such answer is due in state {self.state.name}")
        self._pending = None
        return pending

    def _agreement(self, request: OpenExport, export: ExportInfo) -> Agreement:
        # Contexts are void when they were selected for another name than the one opened.
        chosen = self._contexts if self._contexts_of == request.name else {}
        flags = export.flags | TransmissionFlag.HAS_FLAGS
        if self._dialect is not Dialect.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self._dialect is Dialect.EXTENDED and chosen:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return Agreement(export, flags, self._dialect, chosen, self._secure)

    # --- actions of the table ----------------------------------------------------------------

    def _export_name(self, _number: int, data: bytes) -> Event | None:
        if self._dialect is Dialect.EXTENDED:
            return self._close("EXPORT_NAME after EXTENDED_HEADERS")
        return self._ask(OpenExport(Option.EXPORT_NAME, decode_name(data)))

    def _abort(self, number: int, _data: bytes) -> Event | None:
        self._ack(number)
        return self._close("client aborted", fault=False)

    def _list(self, _number: int, data: bytes) -> Event | None:
        _want_empty(data)
        return self._ask(ListExports())

    def _starttls(self, number: int, data: bytes) -> Event | None:
        _want_empty(data)
        if self._tls is TlsMode.OFF:
            return self._reply_error(number, Reply.ERR_POLICY, "TLS is not configured here")
        self._ack(number)
        if self._buffer:
            return self._close("plain text pipelined behind STARTTLS")
        self._forget()
        self.state = State.UPGRADING
        return StartTls()

    def _starttls_again(self, number: int, _data: bytes) -> Event | None:
        return self._reply_error(number, Reply.ERR_INVALID, "TLS is already in use")

    def _info(self, number: int, data: bytes) -> Event | None:
        name, self._asked = parse_info(data)
        return self._ask(OpenExport(Option(number), name))

    def _structured_reply(self, number: int, data: bytes) -> Event | None:
        _want_empty(data)
        if self._dialect is Dialect.EXTENDED:
            text = "extended headers are already in use"
            return self._reply_error(number, Reply.ERR_EXT_HEADER_REQD, text)
        if self._dialect is Dialect.STRUCTURED:
            raise InvalidOption("structured replies are already in use")
        self._dialect = Dialect.STRUCTURED
        self._ack(number)
        return None

    def _extended_headers(self, number: int, data: bytes) -> Event | None:
        _want_empty(data)
        if self._dialect is Dialect.EXTENDED:
            raise InvalidOption("extended headers are already in use")
        self._dialect = Dialect.EXTENDED
        self._ack(number)
        return None

    def _list_meta_context(self, number: int, data: bytes) -> Event | None:
        name, self._queries = parse_meta_context(data)
        return self._ask(QueryContexts(Option(number), name))

    def _set_meta_context(self, number: int, data: bytes) -> Event | None:
        self._contexts, self._contexts_of = {}, None
        if self._dialect is Dialect.SIMPLE:
            raise InvalidOption("structured replies must be negotiated first")
        name, self._queries = parse_meta_context(data)
        return self._ask(QueryContexts(Option(number), name))

    def _tls_required(self, number: int, _data: bytes) -> Event | None:
        return self._reply_error(number, Reply.ERR_TLS_REQD, "this server requires TLS")

    def _unsupported(self, number: int, _data: bytes) -> Event | None:
        return self._reply_error(number, Reply.ERR_UNSUP, f"option {number} is not supported")

    def _not_fixed(self, number: int, _data: bytes) -> Event | None:
        return self._close(f"option {number} without fixed newstyle negotiation")

    # --- pieces ------------------------------------------------------------------------------

    def _ask(self, event: OpenExport | QueryContexts | ListExports) -> Event:
        self._resume = self.state
        self._pending = event
        self.state = State.ASKING
        return event

    def _ack(self, option: int) -> None:
        self._out.append(option_reply(option, Reply.ACK))

    def _reply_error(self, option: int, reply: Reply, text: str) -> Event | None:
        if option == Option.EXPORT_NAME or self.state is State.NEWSTYLE:
            return self._close(f"option {option}: {text}")
        self._out.append(option_reply(option, reply, truncate_text(text)))
        return None

    def _transmit(self, agreement: Agreement) -> Event:
        self.state = State.TRANSMISSION
        remainder = bytes(self._buffer)
        self._buffer.clear()
        return Transmit(agreement, remainder)

    def _close(self, reason: str, *, fault: bool = True) -> Close:
        self.state = State.CLOSED
        self._buffer.clear()
        return Close(reason, fault)


def _want_empty(data: bytes) -> None:
    if data:
        raise InvalidOption(f"this option takes no data, {len(data)} bytes came")


_READING = frozenset({State.NEWSTYLE, State.FORCED, State.OPEN, State.SECURED})
_OPTIONS = frozenset(Option)

Action = Callable[[ServerHandshake, int, bytes], Event | None]
_S = ServerHandshake
_SERVED: dict[Option, Action] = {
    Option.EXPORT_NAME: _S._export_name,
    Option.ABORT: _S._abort,
    Option.LIST: _S._list,
    Option.PEEK_EXPORT: _S._unsupported,
    Option.STARTTLS: _S._starttls,
    Option.INFO: _S._info,
    Option.GO: _S._info,
    Option.STRUCTURED_REPLY: _S._structured_reply,
    Option.LIST_META_CONTEXT: _S._list_meta_context,
    Option.SET_META_CONTEXT: _S._set_meta_context,
    Option.EXTENDED_HEADERS: _S._extended_headers,
}

TABLE: dict[tuple[State, Option | None], Action] = {
    **{(State.NEWSTYLE, option): _S._not_fixed for option in (*Option, None)},
    (State.NEWSTYLE, Option.EXPORT_NAME): _S._export_name,
    **{(State.FORCED, option): _S._tls_required for option in (*Option, None)},
    (State.FORCED, Option.ABORT): _S._abort,
    (State.FORCED, Option.STARTTLS): _S._starttls,
    **{(State.OPEN, option): action for option, action in _SERVED.items()},
    (State.OPEN, None): _S._unsupported,
    **{(State.SECURED, option): action for option, action in _SERVED.items()},
    (State.SECURED, Option.STARTTLS): _S._starttls_again,
    (State.SECURED, None): _S._unsupported,
}
"""What to do with an option (None: one nobody knows) in each state that reads options."""
