"""The client's handshake: a table of states, from the server's first byte to transmission.

::

    GREETING ─oldstyle─────────────────────────────────────────────────────────> READY
       │└─newstyle──> EXPORT_NAME ──────────────────────────────────────────────> READY
       └─fixed──> STARTTLS ─ACK─> TLS ─tls_started()─┐
                     └──refused, if that is allowed──┤
        ┌────────────────────────────────────────────┘
        └> EXTENDED ─no─> STRUCTURED ──> SET_CONTEXTS ──> GO ─ACK─────────────────> READY
              └──────ACK─────────────────────^            ├─UNSUP─> EXPORT_NAME ──> READY
                                                          └─error─> IDLE
                                     INFO, LIST, LIST_CONTEXTS ───> IDLE ─ask()─> SET_CONTEXTS ..
                                                                     └─abort()─> ABORTING ─> ENDED
    TLS refused though required, SHUTDOWN, TLS_REQD to anything ──> DENIED ─abort()─> ABORTING

States nobody wants anything of are passed over; who does not want GO goes to EXPORT_NAME at once.
Source: proto.md, "Handshake".

Rule: what happens is in ``ClientHandshake.TABLE`` and nowhere else; a pair that is not there is
a violation, by the server or by the caller according to whose input it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from protocol.constants import Dialect
from protocol.errors import LocalProtocolError, ProtocolError, Refused, RemoteProtocolError
from protocol.handshake.client_actions import Haggling
from protocol.handshake.client_states import (
    ASKS,
    LAST_WORDS,
    LOCAL,
    REFUSALS,
    Input,
    Signal,
    State,
)
from protocol.handshake.wants import Event, Mode, Wants

__all__ = ["TABLE", "ClientHandshake", "Transition"]


@dataclass(frozen=True, slots=True)
class Transition:
    """What to do, and the states that may follow. FAILED may always follow, by an exception."""

    action: Callable[[Haggling, Input], None]
    targets: frozenset[State]


DIALECT = (State.EXTENDED, State.STRUCTURED)
QUESTION = (State.GO, State.EXPORT_NAME, State.INFO, State.LIST, State.LIST_CONTEXTS)
PLAN = (*DIALECT, State.SET_CONTEXTS, *QUESTION)
"""What may come next on the way to the question, and the question itself."""

FIRM = (Signal.TLS_REQD, Signal.SHUTDOWN)
"""Refusals that no other option will escape. (From GO and INFO, TLS_REQD concerns one export.)"""


def rows(
    state: State,
    signals: tuple[Signal, ...],
    action: Callable[[Haggling, Input], None],
    *targets: State,
) -> dict[tuple[State, Signal], Transition]:
    transition = Transition(action, frozenset(targets))
    return {(state, signal): transition for signal in signals}


H = Haggling
S = State
G = Signal

TABLE: Mapping[tuple[State, Signal], Transition] = {
    **rows(S.GREETING, (G.OLDSTYLE,), H.on_oldstyle, S.READY),
    **rows(S.GREETING, (G.NEWSTYLE,), H.on_newstyle, S.EXPORT_NAME),
    **rows(S.GREETING, (G.FIXED,), H.on_fixed, S.STARTTLS, *PLAN),
    **rows(S.STARTTLS, (G.ACK,), H.on_tls_acked, S.TLS),
    **rows(S.STARTTLS, REFUSALS, H.on_tls_refused, S.DENIED, *PLAN),
    **rows(S.TLS, (G.TLS_STARTED,), H.on_tls_started, *PLAN),
    **rows(S.EXTENDED, (G.ACK,), H.on_extended, S.SET_CONTEXTS, *QUESTION),
    **rows(S.EXTENDED, REFUSALS, H.on_no_extended, S.STRUCTURED, *QUESTION),
    **rows(S.EXTENDED, FIRM, H.on_denied, S.DENIED),
    **rows(S.STRUCTURED, (G.ACK,), H.on_structured, S.SET_CONTEXTS, *QUESTION),
    **rows(S.STRUCTURED, REFUSALS, H.on_no_structured, *QUESTION),
    **rows(S.STRUCTURED, FIRM, H.on_denied, S.DENIED),
    **rows(S.SET_CONTEXTS, (G.CONTEXT,), H.on_context, S.SET_CONTEXTS),
    **rows(S.SET_CONTEXTS, (G.ACK,), H.on_contexts_set, S.GO, S.INFO),
    **rows(S.SET_CONTEXTS, REFUSALS, H.on_no_contexts, S.GO, S.INFO),
    **rows(S.SET_CONTEXTS, FIRM, H.on_denied, S.DENIED),
    **rows(S.GO, (G.INFO,), H.on_info, S.GO),
    **rows(S.GO, (G.ACK,), H.on_go, S.READY),
    **rows(S.GO, REFUSALS, H.on_refused, S.IDLE),
    **rows(S.GO, (G.SHUTDOWN,), H.on_denied, S.DENIED),
    **rows(S.GO, (G.UNSUP,), H.on_go_unsupported, S.EXPORT_NAME),
    **rows(S.EXPORT_NAME, (G.EXPORT,), H.on_export, S.READY),
    **rows(S.INFO, (G.INFO,), H.on_info, S.INFO),
    **rows(S.INFO, (G.ACK,), H.on_described, S.IDLE),
    **rows(S.INFO, REFUSALS, H.on_refused, S.IDLE),
    **rows(S.INFO, (G.SHUTDOWN,), H.on_denied, S.DENIED),
    **rows(S.LIST, (G.SERVER,), H.on_listed_export, S.LIST),
    **rows(S.LIST, (G.ACK,), H.on_listed, S.IDLE),
    **rows(S.LIST, REFUSALS, H.on_refused, S.IDLE),
    **rows(S.LIST, (G.SHUTDOWN,), H.on_denied, S.DENIED),
    **rows(S.LIST_CONTEXTS, (G.CONTEXT,), H.on_listed_context, S.LIST_CONTEXTS),
    **rows(S.LIST_CONTEXTS, (G.ACK,), H.on_contexts_listed, S.IDLE),
    **rows(S.LIST_CONTEXTS, REFUSALS, H.on_refused, S.IDLE),
    **rows(S.LIST_CONTEXTS, (G.SHUTDOWN,), H.on_denied, S.DENIED),
    **rows(S.IDLE, (G.ASK,), H.on_ask, S.SET_CONTEXTS, *QUESTION),
    **rows(S.IDLE, (G.ABORT,), H.on_abort, S.ABORTING),
    **rows(S.DENIED, (G.ABORT,), H.on_abort, S.ABORTING),
    **rows(S.ABORTING, (G.ACK, *REFUSALS, G.EOF), H.on_ended, S.ENDED),
    **rows(S.ENDED, (G.EOF,), H.on_late_eof, S.ENDED),
}
"""A later row overrules an earlier one for the same pair: the particular comes last."""


class ClientHandshake:
    """One handshake on one connection, without I/O. Not safe for concurrent use.

    Feed what the server sends to ``receive_data``, act on the events, and send what
    ``data_to_send`` returns after every call. When ``Refused`` is raised look at the state: in
    IDLE ``ask`` for something else or ``abort``, in DENIED ``abort`` is all that is left. After
    any other RemoteProtocolError, close.
    """

    def __init__(self, wants: Wants) -> None:
        self._haggling = Haggling(wants)

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._haggling.state

    @property
    def tls(self) -> bool:
        """Whether the connection has been upgraded."""
        return self._haggling.tls

    @property
    def dialect(self) -> Dialect:
        """The frames agreed on so far."""
        return self._haggling.dialect

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take bytes from the server, in pieces of any size.

        Raises:
            Refused: the server said no to what was asked for.
            RemoteProtocolError: the server broke a rule.
        """
        self._haggling.input.feed(data)
        while (taken := self._taken()) is not None:
            self._step(taken)
        return self._take_events()

    def data_to_send(self) -> bytes:
        """What is due to be sent; empty if nothing is."""
        out = bytes(self._haggling.out)
        self._haggling.out.clear()
        return out

    def tls_started(self) -> None:
        """The connection has been upgraded; what is received from now on came encrypted."""
        self._step(Input(Signal.TLS_STARTED))

    def ask(self, mode: Mode, export: str = "", queries: tuple[str, ...] = ()) -> None:
        """Ask for more after an answer or a refusal. TLS and dialect stay as they are.

        Raises:
            LocalProtocolError: in any state but IDLE, or the question is malformed.
            RemoteProtocolError: the server went on talking after its last answer.
        """
        wants = replace(self._haggling.wants, mode=mode, export=export, queries=queries)
        self._step(Input(Signal.ASK, wants=wants))

    def abort(self) -> None:
        """End it politely (a soft disconnect); then wait for ``Ended``, or just close."""
        self._step(Input(Signal.ABORT))

    def eof(self) -> list[Event]:
        """The server has closed the connection.

        Raises:
            RemoteProtocolError: it should not have; says what it was asked last.
        """
        self._step(Input(Signal.EOF))
        return self._take_events()

    def _taken(self) -> Input | None:
        try:
            return self._haggling.input.take(self.state)
        except RemoteProtocolError:
            self._haggling.state = State.FAILED
            raise

    def _step(self, taken: Input) -> None:
        try:
            transition = TABLE.get((self.state, taken.signal))
            if transition is None:
                raise misfit(self.state, taken.signal)
            transition.action(self._haggling, taken)
        except Refused:
            raise  # the action has chosen the state
        except RemoteProtocolError:
            self._haggling.state = State.FAILED
            raise

    def _take_events(self) -> list[Event]:
        events, self._haggling.events = self._haggling.events, []
        return events


def misfit(state: State, signal: Signal) -> ProtocolError:
    """The error for a pair that is not in the table."""
    if signal in LOCAL:
        return LocalProtocolError(f"{signal.value} in state {state.name}")
    if signal is not Signal.EOF:
        return RemoteProtocolError(f"{signal.value} in state {state.name}")
    doing = LAST_WORDS.get(state) or f"instead of answering {ASKS[state].name}"
    return RemoteProtocolError(f"server closed the connection {doing}")
