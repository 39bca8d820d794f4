"""What a client does at each turn of its handshake: the actions of ``client``'s table.

The way to the question, each step left out when nobody wants it::

    seek_dialect ──> seek_structured ──> seek_contexts ──> seek_answer
    EXTENDED_HEADERS  STRUCTURED_REPLY    SET_META_CONTEXT  GO, INFO, LIST, LIST_META_CONTEXT

Source: proto.md, "Option types".

Rule: an ``on_`` method is an action of the table, called with what happened; it leaves ``state``
at one of the transition's targets or raises.
"""

from typing import NoReturn

from protocol.constants import ClientFlag, Dialect, HandshakeFlag, Info, Option, Reply
from protocol.errors import Refused, RemoteProtocolError
from protocol.handshake import option_replies
from protocol.handshake.answer import Answer
from protocol.handshake.client_input import EXPORT_NAME_SIZE, ServerInput
from protocol.handshake.client_states import ASKS, Input, State
from protocol.handshake.option_replies import ExportTerms, export_size
from protocol.handshake.wants import (
    ContextsListed,
    Described,
    Ended,
    Event,
    Listed,
    Mode,
    StartTls,
    TlsPolicy,
    Wants,
)
from protocol.structs import (
    ClientFlags,
    ExportNameReply,
    Greeting,
    InfoRequest,
    MetaContextRequest,
    Oldstyle,
    OptionHeader,
)
from protocol.terms import BlockSizes, Negotiated, honest_flags

__all__ = ["Haggling"]


class Haggling:
    """A client's handshake in progress: what is known, what is due, where it stands."""

    def __init__(self, wants: Wants) -> None:
        self.wants = wants
        self.state = State.GREETING
        self.dialect = Dialect.SIMPLE
        self.tls = False
        self.input = ServerInput()
        self.out = bytearray()
        self.events: list[Event] = []
        self.answer = Answer()
        self.contexts: dict[int, str] = {}
        self.refusals: list[str] = []

    # --- what to ask next ----------------------------------------------------------------

    def enter(self, state: State, data: bytes = b"") -> None:
        """Go to a state, asking what it asks."""
        self.state = state
        option = ASKS.get(state)
        self.answer = Answer(option)
        if option is not None:
            self.out += OptionHeader.build({"option": option, "length": len(data)}) + data

    def seek_dialect(self) -> None:
        if self.wants.extended:
            self.enter(State.EXTENDED)
        else:
            self.seek_structured()

    def seek_structured(self) -> None:
        if self.wants.structured:
            self.enter(State.STRUCTURED)
        else:
            self.seek_contexts()

    def seek_contexts(self) -> None:
        self.contexts = {}
        selectable = self.dialect is not Dialect.SIMPLE and self.wants.mode in {Mode.GO, Mode.INFO}
        if selectable and self.wants.queries:
            self.enter(State.SET_CONTEXTS, context_request(self.wants))
        else:
            self.seek_answer()

    def seek_answer(self) -> None:
        match self.wants.mode:
            case Mode.GO if not self.wants.go:
                self.enter(State.EXPORT_NAME, self.wants.export.encode())
            case Mode.GO:
                self.enter(State.GO, info_request(self.wants))
            case Mode.INFO:
                self.enter(State.INFO, info_request(self.wants))
            case Mode.LIST:
                self.enter(State.LIST)
            case Mode.LIST_CONTEXTS:
                self.enter(State.LIST_CONTEXTS, context_request(self.wants))

    # --- greetings -----------------------------------------------------------------------

    def on_oldstyle(self, taken: Input) -> None:
        fields = Oldstyle.parse(taken.data)
        self.need_plain_go("the server speaks only the oldstyle handshake")
        if self.wants.export:
            text = "the server speaks only the oldstyle handshake and has one, unnamed export"
            raise self.unable(Option.EXPORT_NAME, text)
        # 32 bits here, but the flags that were ever defined are the low 16.
        self.answer.terms = ExportTerms(export_size(fields.size), fields.flags & 0xFFFF)
        self.transmit()

    def on_newstyle(self, taken: Input) -> None:
        self.need_plain_go("the server does not speak fixed newstyle")
        self.reply_flags(taken, ClientFlag(0))
        self.enter(State.EXPORT_NAME, self.wants.export.encode())

    def on_fixed(self, taken: Input) -> None:
        self.reply_flags(taken, ClientFlag.FIXED_NEWSTYLE)
        if self.wants.tls is TlsPolicy.OFF:
            self.seek_dialect()
        else:
            self.enter(State.STARTTLS)

    def reply_flags(self, taken: Input, flags: ClientFlag) -> None:
        if Greeting.parse(taken.data).flags & HandshakeFlag.NO_ZEROES:
            self.input.no_zeroes = True
            flags |= ClientFlag.NO_ZEROES
        self.out += ClientFlags.build({"flags": flags})

    def need_plain_go(self, text: str) -> None:
        """Without options there is one thing to be had, and never encrypted."""
        if self.wants.tls is TlsPolicy.REQUIRE:
            raise self.unable(Option.STARTTLS, text)
        if self.wants.mode is not Mode.GO:
            raise self.unable(self.wants.mode.value, text)

    def unable(self, option: Option, text: str) -> Refused:
        self.state = State.FAILED
        return Refused(option, Reply.ERR_UNSUP, text)

    # --- the way to the question ---------------------------------------------------------

    def on_tls_acked(self, taken: Input) -> None:
        self.need_empty(taken)
        if self.input:
            raise RemoteProtocolError("plain text behind the server's consent to TLS")
        self.enter(State.TLS)
        self.events.append(StartTls())

    def on_tls_refused(self, taken: Input) -> None:
        # CVE-2019-14842: whatever the error is, who requires TLS gets no plain text.
        if self.wants.tls is TlsPolicy.REQUIRE:
            self.on_denied(taken)
        self.note_refusal(taken)
        self.seek_dialect()

    def on_tls_started(self, _: Input) -> None:
        self.tls = True
        self.seek_dialect()

    def on_extended(self, taken: Input) -> None:
        self.need_empty(taken)
        self.dialect = Dialect.EXTENDED
        self.seek_contexts()

    def on_no_extended(self, taken: Input) -> None:
        self.note_refusal(taken)
        self.seek_structured()

    def on_structured(self, taken: Input) -> None:
        self.need_empty(taken)
        self.dialect = Dialect.STRUCTURED
        self.seek_contexts()

    def on_no_structured(self, taken: Input) -> None:
        self.note_refusal(taken)
        self.seek_contexts()

    def on_context(self, taken: Input) -> None:
        self.answer.add_context(taken.data, self.wants.queries)

    def on_contexts_set(self, taken: Input) -> None:
        self.need_empty(taken)
        self.contexts = self.answer.contexts
        self.seek_answer()

    def on_no_contexts(self, taken: Input) -> None:
        self.note_refusal(taken)
        self.seek_answer()

    # --- answers -------------------------------------------------------------------------

    def on_info(self, taken: Input) -> None:
        self.answer.add_info(taken.data)

    def on_go(self, taken: Input) -> None:
        self.need_empty(taken)
        self.transmit()

    def on_go_unsupported(self, taken: Input) -> None:
        """Fall back to EXPORT_NAME, for xapi-nbd and old nbd-servers."""
        if self.dialect is Dialect.EXTENDED:
            raise RemoteProtocolError("a server with extended headers does not know GO")
        self.note_refusal(taken)
        self.enter(State.EXPORT_NAME, self.wants.export.encode())

    def on_export(self, taken: Input) -> None:
        fields = ExportNameReply.parse(taken.data[:EXPORT_NAME_SIZE])
        self.answer.terms = ExportTerms(export_size(fields.size), fields.flags)
        self.transmit()

    def on_described(self, taken: Input) -> None:
        self.need_empty(taken)
        self.settle(Described(self.terms()))

    def on_listed_export(self, taken: Input) -> None:
        self.answer.add_export(taken.data)

    def on_listed(self, taken: Input) -> None:
        self.need_empty(taken)
        self.settle(Listed(tuple(self.answer.exports)))

    def on_listed_context(self, taken: Input) -> None:
        self.answer.add_listed_context(taken.data)

    def on_contexts_listed(self, taken: Input) -> None:
        self.need_empty(taken)
        self.settle(ContextsListed(tuple(self.answer.names)))

    def on_refused(self, taken: Input) -> NoReturn:
        refused = self.refusal(taken)
        self.enter(State.IDLE)
        raise refused

    def on_denied(self, taken: Input) -> NoReturn:
        refused = self.refusal(taken)
        self.enter(State.DENIED)
        raise refused

    def on_ask(self, taken: Input) -> None:
        if self.input:
            raise RemoteProtocolError("data nobody asked for, behind the last answer")
        if taken.wants is not None:
            self.wants = taken.wants
        self.seek_contexts()

    def on_abort(self, _: Input) -> None:
        self.enter(State.ABORTING)

    def on_ended(self, _: Input) -> None:
        """Any answer will do: nbd-server 3.24 resets, qemu-nbd 7.2 wants TLS first."""
        self.enter(State.ENDED)
        self.events.append(Ended())

    def on_late_eof(self, _: Input) -> None:
        pass

    # --- outcomes ------------------------------------------------------------------------

    def settle(self, event: Event) -> None:
        self.events.append(event)
        self.enter(State.IDLE)

    def transmit(self) -> None:
        self.events.append(self.terms())
        self.enter(State.READY)

    def terms(self) -> Negotiated:
        answer = self.answer
        if answer.terms is None:
            raise RemoteProtocolError(f"server accepted {self.asked()} without NBD_INFO_EXPORT")
        return Negotiated(
            export=self.wants.export,
            size=answer.terms.size,
            flags=honest_flags(answer.terms.flags, self.dialect),
            blocks=answer.blocks or BlockSizes(),
            blocks_advertised=answer.blocks is not None,
            name=answer.texts.get(Info.NAME),
            description=answer.texts.get(Info.DESCRIPTION),
            dialect=self.dialect,
            contexts=dict(self.contexts),
            tls=self.tls,
            refusals=tuple(self.refusals),
        )

    def need_empty(self, taken: Input) -> None:
        if taken.data:
            raise RemoteProtocolError(f"ACK to {self.asked()} with {len(taken.data)} bytes of data")

    def note_refusal(self, taken: Input) -> None:
        self.refusals.append(str(self.refusal(taken)))

    def refusal(self, taken: Input) -> Refused:
        return option_replies.refusal(ASKS[self.state], taken.reply, taken.data)

    def asked(self) -> str:
        return ASKS[self.state].name


def string(text: str) -> dict[str, object]:
    data = text.encode()
    return {"length": len(data), "data": data}


def info_request(wants: Wants) -> bytes:
    name = string(wants.export)
    data: bytes = InfoRequest.build({"name": name, "infos": wants.infos, "rest": b""})
    return data


def context_request(wants: Wants) -> bytes:
    fields = {
        "name": string(wants.export),
        "queries": [string(query) for query in wants.queries],
        "rest": b"",
    }
    data: bytes = MetaContextRequest.build(fields)
    return data
