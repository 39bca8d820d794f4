"""The client handshake's states, what can happen in them, and what they asked the server.

A ``Signal`` is the kind of a thing that happens; an ``Input`` is the thing itself. The table
that joins them is in ``client``.
"""

from dataclasses import dataclass
from enum import Enum

from protocol.constants import Option, Reply
from protocol.handshake.option_replies import is_error
from protocol.handshake.wants import Wants

__all__ = ["ASKS", "LAST_WORDS", "LOCAL", "REFUSALS", "Input", "Signal", "State", "signal_of"]


class State(Enum):
    """Where a client's handshake stands: mostly, which answer it waits for."""

    GREETING = "greeting"
    STARTTLS = "starttls"
    TLS = "tls"
    EXTENDED = "extended"
    STRUCTURED = "structured"
    SET_CONTEXTS = "set-contexts"
    GO = "go"
    EXPORT_NAME = "export-name"
    INFO = "info"
    LIST = "list"
    LIST_CONTEXTS = "list-contexts"
    IDLE = "idle"
    DENIED = "denied"
    ABORTING = "aborting"
    READY = "ready"
    ENDED = "ended"
    FAILED = "failed"


class Signal(Enum):
    """What can happen; the value completes the sentence "... in state X"."""

    OLDSTYLE = "oldstyle greeting"
    NEWSTYLE = "newstyle greeting"
    FIXED = "fixed newstyle greeting"
    EXPORT = "answer to EXPORT_NAME"
    ACK = "ACK"
    SERVER = "SERVER reply"
    INFO = "INFO reply"
    CONTEXT = "META_CONTEXT reply"
    UNKNOWN = "reply of an unknown type"
    UNSUP = "refusal UNSUP"
    TLS_REQD = "refusal TLS_REQD"
    SHUTDOWN = "refusal SHUTDOWN"
    ERROR = "refusal"
    UNASKED = "data nobody asked for"
    TLS_STARTED = "tls_started()"
    ASK = "ask()"
    ABORT = "abort()"
    EOF = "end of stream"


LOCAL = frozenset({Signal.TLS_STARTED, Signal.ASK, Signal.ABORT})
"""What the caller does; out of place it is the caller's fault."""

REFUSALS = (Signal.UNSUP, Signal.TLS_REQD, Signal.SHUTDOWN, Signal.ERROR)

ASKS = {
    State.STARTTLS: Option.STARTTLS,
    State.EXTENDED: Option.EXTENDED_HEADERS,
    State.STRUCTURED: Option.STRUCTURED_REPLY,
    State.SET_CONTEXTS: Option.SET_META_CONTEXT,
    State.GO: Option.GO,
    State.EXPORT_NAME: Option.EXPORT_NAME,
    State.INFO: Option.INFO,
    State.LIST: Option.LIST,
    State.LIST_CONTEXTS: Option.LIST_META_CONTEXT,
    State.ABORTING: Option.ABORT,
}
"""The option that was sent on entering a state."""

LAST_WORDS = {
    State.GREETING: "before it greeted",
    State.TLS: "while TLS was to begin",
    State.EXPORT_NAME: "when asked for the export: there is none of that name, or it needs TLS",
    State.IDLE: "between two options",
    State.DENIED: "after refusing to go on",
    State.READY: "when transmission had just begun",
    State.FAILED: "after the handshake had failed",
}
"""What a server that hangs up was doing, where it is not simply answering an option."""

SIGNALS: dict[int, Signal] = {
    Reply.ACK: Signal.ACK,
    Reply.SERVER: Signal.SERVER,
    Reply.INFO: Signal.INFO,
    Reply.META_CONTEXT: Signal.CONTEXT,
    Reply.ERR_UNSUP: Signal.UNSUP,
    Reply.ERR_TLS_REQD: Signal.TLS_REQD,
    Reply.ERR_SHUTDOWN: Signal.SHUTDOWN,
}


@dataclass(frozen=True, slots=True)
class Input:
    """One thing that happened.

    Attributes:
        reply: the option reply's type, if it was one.
        data: the greeting, the option reply's data, or the first bytes of what was unasked.
        wants: what to ask for, with ASK.
    """

    signal: Signal
    reply: int = 0
    data: bytes = b""
    wants: Wants | None = None


def signal_of(reply: int) -> Signal:
    """Classify an option reply's type. An error is one even if the number is unknown."""
    return SIGNALS.get(reply, Signal.ERROR if is_error(reply) else Signal.UNKNOWN)
