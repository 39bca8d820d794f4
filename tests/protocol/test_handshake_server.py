"""The server's handshake: every pair of its table, what it waits for, and every budget.

::

    state       reached by
    GREETED     nothing
    NEWSTYLE    client flags without FIXED_NEWSTYLE
    FORCED      client flags, TLS required
    OPEN        client flags
    ASKING      LIST, unanswered
    UPGRADING   STARTTLS, unanswered
    SECURED     STARTTLS, tls_started()
    TRANSMISSION, CLOSED

What single options mean is in the other test_handshake files.
"""

import pytest
from haggling import (
    EXPORTS,
    FIXED,
    NO_ZEROES,
    NOBODY_KNOWS,
    Haggle,
    ack,
    announced,
    answers,
    client_flags,
    naming,
    option,
)

from protocol import structs
from protocol.constants import MAX_OPTION_LENGTH, MAX_STRING, Option, Reply
from protocol.errors import LocalProtocolError
from protocol.handshake.events import (
    Close,
    ListExports,
    OpenExport,
    QueryContexts,
    StartTls,
    State,
    TlsMode,
)
from protocol.handshake.server import MAX_OPTION_BYTES, MAX_OPTIONS, TABLE

READING = [State.NEWSTYLE, State.FORCED, State.OPEN, State.SECURED]
ALL_OPTIONS = [*Option, None]

Outcome = tuple[Reply | None, State, type | None]

SILENT_CLOSE: Outcome = (None, State.CLOSED, Close)
ABORTED: Outcome = (Reply.ACK, State.CLOSED, Close)
UPGRADE: Outcome = (Reply.ACK, State.UPGRADING, StartTls)
OPENING: Outcome = (None, State.ASKING, OpenExport)
QUERYING: Outcome = (None, State.ASKING, QueryContexts)


def served(state: State) -> dict[Option | None, Outcome]:
    """Of a state in which options are served, before anything was negotiated."""
    return {
        Option.EXPORT_NAME: OPENING,
        Option.ABORT: ABORTED,
        Option.LIST: (None, State.ASKING, ListExports),
        Option.PEEK_EXPORT: (Reply.ERR_UNSUP, state, None),
        Option.STARTTLS: UPGRADE,
        Option.INFO: OPENING,
        Option.GO: OPENING,
        Option.STRUCTURED_REPLY: (Reply.ACK, state, None),
        Option.LIST_META_CONTEXT: QUERYING,
        Option.SET_META_CONTEXT: (Reply.ERR_INVALID, state, None),  # needs STRUCTURED_REPLY
        Option.EXTENDED_HEADERS: (Reply.ACK, state, None),
        None: (Reply.ERR_UNSUP, state, None),
    }


def all_of(outcome: Outcome) -> dict[Option | None, Outcome]:
    return dict.fromkeys(ALL_OPTIONS, outcome)


EXPECTED: dict[State, dict[Option | None, Outcome]] = {
    State.GREETED: all_of(SILENT_CLOSE),  # "IHAV" are no client flags
    State.NEWSTYLE: {**all_of(SILENT_CLOSE), Option.EXPORT_NAME: OPENING},
    State.FORCED: {
        **all_of((Reply.ERR_TLS_REQD, State.FORCED, None)),
        Option.EXPORT_NAME: SILENT_CLOSE,
        Option.ABORT: ABORTED,
        Option.STARTTLS: UPGRADE,
    },
    State.OPEN: served(State.OPEN),
    State.SECURED: {
        **served(State.SECURED),
        Option.STARTTLS: (Reply.ERR_INVALID, State.SECURED, None),
    },
    State.ASKING: all_of((None, State.ASKING, None)),
    State.UPGRADING: all_of(SILENT_CLOSE),  # plain text behind STARTTLS
    State.TRANSMISSION: all_of((None, State.TRANSMISSION, None)),
    State.CLOSED: all_of((None, State.CLOSED, None)),
}


def reach(state: State) -> Haggle:
    """A handshake in a state, its output drained; its shell answers nothing."""
    mode = TlsMode.REQUIRED if state is State.FORCED else TlsMode.PER_EXPORT
    flags = {State.GREETED: None, State.NEWSTYLE: 0}.get(state, FIXED | NO_ZEROES)
    haggle = Haggle(mode, flags, shell=False)
    if state is State.ASKING:
        haggle.send(Option.LIST)
    if state in {State.UPGRADING, State.SECURED}:
        haggle.send(Option.STARTTLS)
    if state is State.SECURED:
        haggle.machine.tls_started()
    if state is State.TRANSMISSION:
        haggle.send(Option.GO, naming(Option.GO, "disk"))
        haggle.machine.accept(EXPORTS["disk"])
        haggle.machine.to_send()
    if state is State.CLOSED:
        haggle.feed(b"GET / HTTP/1.1\r\n")
    assert state is haggle.state
    return haggle


def test_the_table_has_every_option_in_every_state_that_reads_options() -> None:
    assert {(state, number) for state in READING for number in ALL_OPTIONS} == set(TABLE)
    assert set(State) == set(EXPECTED)


@pytest.mark.parametrize("number", ALL_OPTIONS, ids=lambda n: n.name if n else "unknown")
@pytest.mark.parametrize("state", State, ids=lambda s: s.name)
def test_every_state_answers_every_option_as_specified(state: State, number: Option | None) -> None:
    haggle = reach(state)
    before = len(haggle.events)
    wire = NOBODY_KNOWS if number is None else number

    replies = haggle.send(wire, naming(wire, "disk"))

    reply, after, event = EXPECTED[state][number]
    assert ([] if reply is None else [(wire, reply)]) == [(r.option, r.reply) for r in replies]
    assert after is haggle.state
    assert ([] if event is None else [event]) == [type(e) for e in haggle.events[before:]]


@pytest.mark.parametrize("number", [0, 12, NOBODY_KNOWS, 0x7FFFFFFF, 0x80000001, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"\xff" * 100], ids=["bare", "with-data"])
def test_an_unknown_option_is_consumed_and_unsupported(number: int, data: bytes) -> None:
    haggle = Haggle()
    (refusal,) = haggle.send(number, data)
    assert (number, Reply.ERR_UNSUP) == (refusal.option, refusal.reply)
    assert [ack(Option.STRUCTURED_REPLY)] == haggle.send(Option.STRUCTURED_REPLY)


# --- the greeting ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [1 << bit for bit in range(2, 32)])
def test_an_unknown_client_flag_closes(flags: int) -> None:
    haggle = Haggle(flags=flags | FIXED | NO_ZEROES)
    assert haggle.closed().fault
    assert b"" == haggle.sent


def test_nothing_happens_before_all_four_bytes_of_client_flags() -> None:
    haggle = Haggle(flags=None)
    for byte in client_flags()[:3]:
        assert b"" == haggle.feed(bytes([byte]))
        assert (State.GREETED, []) == (haggle.state, haggle.events)
    haggle.feed(client_flags()[3:])
    assert State.OPEN is haggle.state


@pytest.mark.parametrize("start", [b"GET / HT", b"IHAVEOPU", b"\0" * 8, b"NBDMAGIC"])
def test_bad_option_magic_closes_at_its_eighth_byte(start: bytes) -> None:
    """CVE-2017-9524, CVE-2017-7539: garbage where an option is due is not waited out."""
    haggle = Haggle()
    haggle.feed(start[:7])
    assert State.OPEN is haggle.state
    haggle.feed(start[7:])
    assert "bad option magic" == haggle.closed().reason


# --- ABORT, LIST -------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"bye" * 100], ids=["bare", "with-data"])
@pytest.mark.parametrize("state", [State.FORCED, State.OPEN, State.SECURED], ids=lambda s: s.name)
def test_abort_is_acked_and_is_no_fault(state: State, data: bytes) -> None:
    haggle = reach(state)
    assert [ack(Option.ABORT)] == haggle.send(Option.ABORT, data)
    assert not haggle.closed().fault


@pytest.mark.parametrize("state", [State.OPEN, State.SECURED], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "number",
    [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS],
    ids=lambda n: n.name,
)
def test_options_without_data_refuse_data_and_go_on(state: State, number: Option) -> None:
    haggle = reach(state)
    (refusal,) = haggle.send(number, b"\0")
    assert (number, Reply.ERR_INVALID) == (refusal.option, refusal.reply)
    assert state is haggle.state
    assert [ack(Option.EXTENDED_HEADERS)] == haggle.send(Option.EXTENDED_HEADERS)


def test_list_names_every_export_then_acks() -> None:
    *servers, last = Haggle().send(Option.LIST)
    parsed = [structs.ServerReply.parse(answer.data) for answer in servers]
    assert {Reply.SERVER} == {answer.reply for answer in servers}
    assert [(name, export.description) for name, export in EXPORTS.items()] == [
        (entry.name.data.decode(), entry.description.decode()) for entry in parsed
    ]
    assert ack(Option.LIST) == last


def test_a_listing_without_exports_is_a_bare_ack() -> None:
    haggle = reach(State.ASKING)
    haggle.machine.list_exports([])
    assert [ack(Option.LIST)] == answers(haggle.machine.to_send())


def test_an_overlong_description_is_cut_between_characters() -> None:
    haggle = reach(State.ASKING)
    haggle.machine.list_exports([("n" * MAX_STRING, "x" + "\N{EURO SIGN}" * MAX_STRING)])
    entry = structs.ServerReply.parse(answers(haggle.machine.to_send())[0].data)
    assert "n" * MAX_STRING == entry.name.data.decode()
    assert "x" + "\N{EURO SIGN}" * ((MAX_STRING - 1) // 3) == entry.description.decode()


# --- shutting down -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", ALL_OPTIONS, ids=lambda n: n.name if n else "unknown")
@pytest.mark.parametrize("state", [State.FORCED, State.OPEN, State.SECURED], ids=lambda s: s.name)
def test_shutting_down_refuses_every_option_but_abort(state: State, number: Option | None) -> None:
    haggle = reach(state)
    haggle.machine.shutting_down = True
    wire = NOBODY_KNOWS if number is None else number
    replies = [(r.option, r.reply) for r in haggle.send(wire, naming(wire, "disk"))]
    if number is Option.EXPORT_NAME:
        assert [] == replies
        haggle.closed()
    elif number is Option.ABORT:
        assert [(wire, Reply.ACK)] == replies
        assert not haggle.closed().fault
    else:
        assert [(wire, Reply.ERR_SHUTDOWN)] == replies
        assert state is haggle.state


# --- what the shell may answer -----------------------------------------------------------------

ANSWERS = {
    "list_exports": lambda machine: machine.list_exports([]),
    "contexts": lambda machine: machine.contexts([]),
    "accept": lambda machine: machine.accept(EXPORTS["disk"]),
    "refuse": lambda machine: machine.refuse(Reply.ERR_UNKNOWN, "no"),
    "tls_started": lambda machine: machine.tls_started(),
}
DUE = {
    Option.LIST: {"list_exports"},
    Option.INFO: {"accept", "refuse"},
    Option.GO: {"accept", "refuse"},
    Option.EXPORT_NAME: {"accept", "refuse"},
    Option.LIST_META_CONTEXT: {"contexts", "refuse"},
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("number", DUE, ids=lambda n: n.name)
def test_only_the_answer_that_is_due_is_taken_and_only_once(number: Option, answer: str) -> None:
    haggle = reach(State.OPEN)
    haggle.send(number, naming(number, "disk"))
    if answer in DUE[number]:
        ANSWERS[answer](haggle.machine)
        assert haggle.state is not State.ASKING
    else:
        with pytest.raises(LocalProtocolError):
            ANSWERS[answer](haggle.machine)
        assert State.ASKING is haggle.state
        return
    with pytest.raises(LocalProtocolError):
        ANSWERS[answer](haggle.machine)


@pytest.mark.parametrize(
    "state", [s for s in State if s not in {State.ASKING, State.UPGRADING}], ids=lambda s: s.name
)
@pytest.mark.parametrize("answer", ANSWERS)
def test_no_answer_is_taken_that_was_not_asked_for(state: State, answer: str) -> None:
    haggle = reach(state)
    with pytest.raises(LocalProtocolError):
        ANSWERS[answer](haggle.machine)
    assert (state, b"") == (haggle.state, haggle.machine.to_send())


def test_options_behind_a_question_wait_for_its_answer() -> None:
    haggle = reach(State.OPEN)
    assert b"" == haggle.feed(option(Option.LIST) + option(Option.STRUCTURED_REPLY))
    haggle.machine.list_exports([])
    assert haggle.machine.next_event() is None
    expected = [ack(Option.LIST), ack(Option.STRUCTURED_REPLY)]
    assert expected == answers(haggle.machine.to_send())


# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [*Option, NOBODY_KNOWS])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x80000000, MAX_OPTION_LENGTH + 1])
def test_an_option_too_long_to_read_closes_before_it_is_read(number: int, length: int) -> None:
    """CVE-2017-15119: 4 GiB of option data are not read patiently."""
    haggle = Haggle()
    assert b"" == haggle.feed(announced(number, length))
    assert haggle.closed().fault


def test_the_longest_option_is_read() -> None:
    haggle = Haggle()
    (refusal,) = haggle.send(NOBODY_KNOWS, bytes(MAX_OPTION_LENGTH))
    assert Reply.ERR_UNSUP == refusal.reply


def test_options_are_counted() -> None:
    haggle = Haggle()
    for _ in range(MAX_OPTIONS):
        haggle.send(NOBODY_KNOWS)
    assert State.OPEN is haggle.state
    assert [] == haggle.send(NOBODY_KNOWS)
    assert "too many options" == haggle.closed().reason


def test_option_bytes_are_counted() -> None:
    haggle = Haggle()
    for _ in range(MAX_OPTION_BYTES // MAX_OPTION_LENGTH):
        haggle.send(NOBODY_KNOWS, bytes(MAX_OPTION_LENGTH))
    assert State.OPEN is haggle.state
    (refusal,) = haggle.send(NOBODY_KNOWS)
    assert Reply.ERR_UNSUP == refusal.reply
    assert [] == haggle.send(NOBODY_KNOWS, b"\0")
    assert "too many options" == haggle.closed().reason


def test_budgets_span_starttls() -> None:
    haggle = Haggle(TlsMode.REQUIRED)
    for _ in range(MAX_OPTIONS - 1):
        haggle.send(NOBODY_KNOWS)
    haggle.upgrade()
    assert [] == haggle.send(NOBODY_KNOWS)
    haggle.closed()
