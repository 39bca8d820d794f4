"""STARTTLS: off, required, per export; what it forgets, and what must not be behind it.

::

    off          POLICY                        never TLS_REQD
    required     ACK, then TLS                 before it nothing but ABORT is served
    per export   ACK, then TLS                 TLS_REQD for single exports only
"""

import pytest
from haggling import (
    EXPORTS,
    FIXED,
    NO_ZEROES,
    NOBODY_KNOWS,
    F,
    Haggle,
    ack,
    answers,
    info_data,
    meta_data,
    naming,
    option,
)

from protocol import structs
from protocol.constants import Command, CommandFlag, Dialect, Errno, Info, Option, Reply
from protocol.errors import LocalProtocolError
from protocol.handshake.events import OpenExport, QueryContexts, StartTls, State, TlsMode
from protocol.replies import encoder
from protocol.requests import Request, Rules

WITH_TLS = [TlsMode.REQUIRED, TlsMode.PER_EXPORT]
with_tls = pytest.mark.parametrize("mode", WITH_TLS, ids=lambda m: m.name)
ANY = [*set(Option) - {Option.STARTTLS, Option.ABORT, Option.EXPORT_NAME}, NOBODY_KNOWS]
STATE = [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]


# --- off ---------------------------------------------------------------------------------------


def test_starttls_where_there_is_no_tls_is_a_matter_of_policy() -> None:
    haggle = Haggle()
    (refusal,) = haggle.send(Option.STARTTLS)
    assert Reply.ERR_POLICY == refusal.reply
    haggle.send(Option.GO, info_data("disk"))
    assert not haggle.transmit().agreement.tls


def test_a_refused_starttls_forgets_nothing() -> None:
    haggle = Haggle()
    haggle.send_all(Option.EXTENDED_HEADERS)
    haggle.send(Option.SET_META_CONTEXT, meta_data("disk", ["base:allocation"]))
    haggle.send(Option.STARTTLS)
    haggle.send(Option.STARTTLS, b"data")
    haggle.send(Option.GO, info_data("disk"))
    agreement = haggle.transmit().agreement
    assert Dialect.EXTENDED is agreement.dialect
    assert {1: "base:allocation"} == agreement.contexts


# --- required ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ANY)
def test_required_tls_comes_before_every_option(number: int) -> None:
    haggle = Haggle(TlsMode.REQUIRED)
    for data in (b"", naming(number, "disk"), b"\xff" * 50):
        (refusal,) = haggle.send(number, data)
        assert (number, Reply.ERR_TLS_REQD) == (refusal.option, refusal.reply)
    assert [] == haggle.events


def test_required_tls_closes_on_export_name() -> None:
    haggle = Haggle(TlsMode.REQUIRED)
    assert b"" == haggle.feed(option(Option.EXPORT_NAME, b"disk"))
    haggle.closed()


@pytest.mark.parametrize("flags", [0, NO_ZEROES], ids=["none", "no-zeroes"])
def test_required_tls_is_not_escaped_by_leaving_out_fixed_newstyle(flags: int) -> None:
    haggle = Haggle(TlsMode.REQUIRED, flags)
    assert b"" == haggle.feed(option(Option.EXPORT_NAME, b"disk"))
    haggle.closed()
    assert [] == [event for event in haggle.events if isinstance(event, OpenExport)]


def test_what_required_tls_refused_has_no_effect_behind_tls() -> None:
    haggle = Haggle(TlsMode.REQUIRED)
    haggle.send_all(*STATE)
    haggle.upgrade().send(Option.GO, info_data("disk"))
    assert Dialect.SIMPLE is haggle.transmit().agreement.dialect


# --- per export --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [Option.INFO, Option.GO], ids=lambda n: n.name)
def test_a_tls_only_export_asks_for_tls_and_is_served_behind_it(number: Option) -> None:
    haggle = Haggle(TlsMode.PER_EXPORT, shell=False)
    haggle.send(number, info_data("secret"))
    haggle.machine.refuse(Reply.ERR_TLS_REQD, "not without TLS")
    (refusal,) = answers(haggle.machine.to_send())
    assert (number, Reply.ERR_TLS_REQD) == (refusal.option, refusal.reply)
    haggle.send(Option.STARTTLS)
    haggle.machine.tls_started()
    haggle.send(number, info_data("secret"))
    event = haggle.machine.accept(EXPORTS["disk"])
    assert ack(number) == answers(haggle.machine.to_send())[-1]
    if number is Option.GO:
        assert event is not None
        assert State.TRANSMISSION is haggle.state


def test_a_tls_only_export_closes_on_export_name() -> None:
    haggle = Haggle(TlsMode.PER_EXPORT, shell=False)
    haggle.feed(option(Option.EXPORT_NAME, b"secret"))
    haggle.machine.refuse(Reply.ERR_TLS_REQD, "not without TLS")
    assert (b"", State.CLOSED) == (haggle.machine.to_send(), haggle.state)


# --- begun -------------------------------------------------------------------------------------


@with_tls
def test_starttls_is_acked_before_the_shell_is_told(mode: TlsMode) -> None:
    haggle = Haggle(mode, shell=False)
    assert [ack(Option.STARTTLS)] == haggle.send(Option.STARTTLS)
    assert [StartTls()] == haggle.events


@with_tls
@pytest.mark.parametrize("number", [*ANY, Option.STARTTLS])
def test_behind_tls_nothing_asks_for_tls(mode: TlsMode, number: int) -> None:
    haggle = Haggle(mode).upgrade()
    replies = haggle.send(number, naming(number, "disk"))
    assert replies
    assert Reply.ERR_TLS_REQD not in [answer.reply for answer in replies]


@with_tls
@pytest.mark.parametrize("data", [b"", b"\0"], ids=["bare", "with-data"])
def test_tls_begins_once(mode: TlsMode, data: bytes) -> None:
    haggle = Haggle(mode).upgrade()
    (refusal,) = haggle.send(Option.STARTTLS, data)
    assert Reply.ERR_INVALID == refusal.reply
    assert State.SECURED is haggle.state


@with_tls
def test_a_second_starttls_forgets_nothing(mode: TlsMode) -> None:
    haggle = Haggle(mode).upgrade()
    haggle.send_all(Option.STRUCTURED_REPLY, Option.STARTTLS)
    haggle.send(Option.GO, info_data("disk"))
    assert Dialect.STRUCTURED is haggle.transmit().agreement.dialect


@with_tls
def test_the_agreement_says_that_tls_is_in_use(mode: TlsMode) -> None:
    haggle = Haggle(mode).upgrade()
    haggle.send(Option.GO, info_data("disk"))
    assert haggle.transmit().agreement.tls


def test_client_flags_outlive_starttls() -> None:
    haggle = Haggle(TlsMode.REQUIRED, FIXED | NO_ZEROES).upgrade()
    assert 10 == len(haggle.feed(option(Option.EXPORT_NAME, b"disk")))


# --- what STARTTLS forgets ---------------------------------------------------------------------


@pytest.mark.parametrize("dialect", STATE, ids=lambda n: n.name)
def test_a_read_behind_starttls_is_answered_as_if_nothing_came_before(dialect: Option) -> None:
    """CVE-2021-3716: what was negotiated in plain text, by whomever, is void."""
    haggle = Haggle(TlsMode.PER_EXPORT)
    haggle.send_all(dialect)
    haggle.send(Option.SET_META_CONTEXT, meta_data("disk", ["base:allocation"]))
    haggle.upgrade().send(Option.GO, info_data("disk"))
    agreement = haggle.transmit().agreement
    assert (Dialect.SIMPLE, {}) == (agreement.dialect, agreement.contexts)
    assert not agreement.flags & (F.SEND_DF | F.BLOCK_STATUS_PAYLOAD)

    rules = Rules(
        size=agreement.export.size,
        flags=agreement.flags,
        dialect=agreement.dialect,
        block_sizes=agreement.export.block_sizes,
        has_contexts=bool(agreement.contexts),
    )
    assert rules.check(Request(Command.READ, 0, 1, 0, 512)) is None
    for command, flags in ((Command.READ, CommandFlag.DF), (Command.BLOCK_STATUS, 0)):
        refusal = rules.check(Request(command, flags, 1, 0, 512))
        assert refusal is not None
        assert Errno.EINVAL is refusal[0]
    header = encoder(agreement.dialect).data_header(1, 0, 0, 512, done=True)
    assert {"magic": 0x67446698, "error": 0, "cookie": 1}.items() <= dict(
        structs.SimpleReply.parse(header)
    ).items()


def test_dialects_may_be_negotiated_again_behind_starttls() -> None:
    haggle = Haggle(TlsMode.PER_EXPORT)
    assert [ack(8), ack(11)] == haggle.send_all(*STATE)
    haggle.upgrade()
    assert [ack(8), ack(11)] == haggle.send_all(*STATE)


def test_contexts_chosen_before_starttls_stay_void_though_the_dialect_is_chosen_again() -> None:
    """CVE-2021-3716."""
    haggle = Haggle(TlsMode.PER_EXPORT)
    haggle.send_all(Option.STRUCTURED_REPLY)
    haggle.send(Option.SET_META_CONTEXT, meta_data("disk", ["base:allocation"]))
    haggle.upgrade().send_all(Option.STRUCTURED_REPLY)
    haggle.send(Option.GO, info_data("disk"))
    assert {} == haggle.transmit().agreement.contexts


def test_block_sizes_asked_for_before_starttls_are_not_asked_for_behind_it() -> None:
    haggle = Haggle(TlsMode.PER_EXPORT)
    haggle.send(Option.INFO, info_data("sectors", [Info.BLOCK_SIZE]))
    last = haggle.upgrade().send(Option.GO, info_data("sectors"))[-1]
    assert Reply.ERR_BLOCK_SIZE_REQD == last.reply


# --- plain text behind STARTTLS ----------------------------------------------------------------

STARTTLS = option(Option.STARTTLS)
PIPELINED = {
    "a byte": b"\0",
    "an option": option(Option.STRUCTURED_REPLY),
    "a client hello": b"\x16\x03\x01",
    "all of it": option(Option.GO, info_data("disk")),
}
pipelined = pytest.mark.parametrize("more", PIPELINED.values(), ids=PIPELINED.keys())


@with_tls
@pipelined
def test_plain_text_in_one_piece_with_starttls_closes_without_tls(
    mode: TlsMode, more: bytes
) -> None:
    """CVE-2021-3716 and its siblings: nobody else's bytes become part of the TLS session."""
    haggle = Haggle(mode, shell=False)
    haggle.feed(STARTTLS + more)
    haggle.closed()
    assert StartTls() not in haggle.events
    with pytest.raises(LocalProtocolError):
        haggle.machine.tls_started()


@with_tls
@pipelined
def test_plain_text_behind_other_options_closes_as_well(mode: TlsMode, more: bytes) -> None:
    haggle = Haggle(mode, shell=False)
    haggle.feed(option(NOBODY_KNOWS) + STARTTLS + more)
    haggle.closed()
    assert StartTls() not in haggle.events


@with_tls
@pipelined
def test_plain_text_byte_by_byte_behind_starttls_closes(mode: TlsMode, more: bytes) -> None:
    haggle = Haggle(mode, shell=False)
    for byte in STARTTLS + more:
        haggle.feed(bytes([byte]))
    haggle.closed()
    assert (ack(Option.STARTTLS),) == tuple(answers(haggle.sent))
    with pytest.raises(LocalProtocolError):
        haggle.machine.tls_started()


@with_tls
def test_plain_text_that_nobody_looked_at_does_not_become_tls(mode: TlsMode) -> None:
    haggle = Haggle(mode, shell=False)
    haggle.feed(STARTTLS)
    haggle.machine.receive(option(Option.STRUCTURED_REPLY))
    with pytest.raises(LocalProtocolError):
        haggle.machine.tls_started()
    assert State.UPGRADING is haggle.state


def test_starttls_waits_for_the_answer_to_what_came_before() -> None:
    haggle = Haggle(TlsMode.PER_EXPORT, shell=False)
    haggle.feed(option(Option.LIST_META_CONTEXT, meta_data("disk")) + STARTTLS)
    assert [QueryContexts(Option.LIST_META_CONTEXT, "disk")] == haggle.events
    haggle.machine.contexts([])
    assert StartTls() == haggle.machine.next_event()
