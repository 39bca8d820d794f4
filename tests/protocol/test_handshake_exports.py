"""EXPORT_NAME, INFO and GO as a server answers them; export names in every option.

::

    INFO, GO   REP_INFO(EXPORT) REP_INFO(...)* ACK | error      then GO transmits, no trailer
    EXPORT_NAME  size:8 flags:2 (124 zeroes)                    or the connection closes
"""

from itertools import permutations, takewhile
from struct import pack

import pytest
from haggling import (
    EXPORTS,
    FIXED,
    NO_ZEROES,
    Answer,
    F,
    Haggle,
    ack,
    announced,
    answers,
    info_data,
    meta_data,
    naming,
    option,
)

from protocol import structs
from protocol.constants import MAX_STRING, Dialect, Info, Option, Reply
from protocol.handshake.events import OpenExport, State
from protocol.handshake.options import ExportInfo
from protocol.terms import BlockSizes

NAMED = [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT]
HARMLESS = [*set(Option) - {Option.EXPORT_NAME, Option.ABORT, Option.STARTTLS, Option.GO}]
DIALECTS = {
    Option.STRUCTURED_REPLY: Dialect.STRUCTURED,
    Option.EXTENDED_HEADERS: Dialect.EXTENDED,
}
HUGE = 0xFFFFFFFF
by_name = pytest.mark.parametrize("number", NAMED, ids=lambda n: n.name)
info_or_go = pytest.mark.parametrize("number", [Option.INFO, Option.GO], ids=lambda n: n.name)


def extended(number: int) -> Haggle:
    """A handshake in which SET_META_CONTEXT is legal."""
    haggle = Haggle()
    if number == Option.SET_META_CONTEXT:
        haggle.send_all(Option.STRUCTURED_REPLY)
    return haggle


def refusal(replies: list[Answer]) -> Answer:
    """The only reply, which must be an error with a text fit to be shown."""
    (answer,) = replies
    assert answer.reply & 1 << 31
    assert 0 < len(answer.data) <= MAX_STRING
    assert b"\0" not in answer.data
    answer.data.decode()
    return answer


# --- EXPORT_NAME -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "length"),
    [(FIXED | NO_ZEROES, 10), (FIXED, 134), (NO_ZEROES, 10), (0, 134)],
    ids=["fixed-no-zeroes", "fixed", "newstyle-no-zeroes", "newstyle"],
)
def test_export_name_is_answered_with_or_without_zeroes(flags: int, length: int) -> None:
    haggle = Haggle(flags=flags)
    out = haggle.feed(option(Option.EXPORT_NAME, b"disk"))
    export = EXPORTS["disk"]
    assert pack(">QH", export.size, export.flags) + bytes(length - 10) == out
    agreement = haggle.transmit().agreement
    assert (export, Dialect.SIMPLE, {}) == (agreement.export, agreement.dialect, agreement.contexts)


def test_export_name_cannot_be_refused_only_closed() -> None:
    haggle = Haggle()
    assert b"" == haggle.feed(option(Option.EXPORT_NAME, b"elsewhere"))
    assert "elsewhere" in haggle.closed().reason


def test_export_name_after_structured_reply_transmits_structured() -> None:
    haggle = Haggle()
    haggle.send_all(Option.STRUCTURED_REPLY)
    haggle.feed(option(Option.EXPORT_NAME, b"disk"))
    assert Dialect.STRUCTURED is haggle.transmit().agreement.dialect
    assert F.SEND_DF in haggle.transmit().agreement.flags


def test_export_name_after_extended_headers_closes() -> None:
    haggle = Haggle()
    haggle.send_all(Option.EXTENDED_HEADERS)
    assert b"" == haggle.feed(option(Option.EXPORT_NAME, b"disk"))
    haggle.closed()


def test_a_failed_go_leaves_export_name_as_the_way_out() -> None:
    haggle = Haggle()
    assert Reply.ERR_UNKNOWN == refusal(haggle.send(Option.GO, info_data("elsewhere"))).reply
    assert 10 == len(haggle.feed(option(Option.EXPORT_NAME, b"disk")))
    haggle.transmit()


# --- INFO and GO -------------------------------------------------------------------------------


def test_info_lets_the_handshake_go_on_and_go_ends_it() -> None:
    haggle = Haggle()
    assert ack(Option.INFO) == haggle.send(Option.INFO, info_data("disk"))[-1]
    assert State.OPEN is haggle.state
    assert ack(Option.GO) == haggle.send(Option.GO, info_data("disk"))[-1]
    assert b"" == haggle.transmit().remainder


@pytest.mark.parametrize("flags", [FIXED, FIXED | NO_ZEROES], ids=["zeroes", "no-zeroes"])
def test_nothing_follows_the_ack_of_go(flags: int) -> None:
    haggle = Haggle(flags=flags)
    out = haggle.feed(option(Option.GO, info_data("disk")))
    assert out.endswith(structs.OptionReplyHeader.build({"option": 7, "reply": 1, "length": 0}))


def test_bytes_behind_go_are_the_first_requests() -> None:
    haggle = Haggle()
    haggle.feed(option(Option.GO, info_data("disk")) + b"requests")
    assert b"requests" == haggle.transmit().remainder


@info_or_go
@pytest.mark.parametrize("infos", [(), (1,), (2, 1), (3,), (0, 1, 2, 3), (7, 3, 65535)], ids=str)
def test_size_and_flags_come_first_and_what_was_asked_for_before_the_ack(
    number: Option, infos: tuple[int, ...]
) -> None:
    *replies, last = Haggle().send(number, info_data("disk", infos))
    assert ack(number) == last
    assert {Reply.INFO} == {answer.reply for answer in replies}
    first, *rest = [answer.data for answer in replies]
    size, flags = EXPORTS["disk"].size, EXPORTS["disk"].flags
    assert pack(">HQH", Info.EXPORT, size, flags) == first
    assert pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 32 << 20) in rest
    assert (Info.NAME in infos) == (pack(">H", Info.NAME) + b"disk" in rest)
    assert (Info.DESCRIPTION in infos) == (pack(">H", Info.DESCRIPTION) + b"a disk" in rest)
    assert 1 + sum(wanted in infos for wanted in (Info.NAME, Info.DESCRIPTION)) == len(rest)


def test_the_canonical_name_of_the_default_export_is_told() -> None:
    replies = Haggle().send(Option.INFO, info_data("", [Info.NAME]))
    assert pack(">H", Info.NAME) + b"disk" in [answer.data for answer in replies]


@pytest.mark.parametrize("dialect", [None, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
@pytest.mark.parametrize("name", ["disk", "", "sectors", "elsewhere"])
def test_go_says_what_info_said(name: str, dialect: Option | None) -> None:
    haggle = Haggle()
    if dialect is not None:
        haggle.send_all(dialect)
        haggle.send(Option.SET_META_CONTEXT, meta_data(name, ["base:allocation"]))
    data = info_data(name, [Info.NAME, Info.BLOCK_SIZE])
    info, go = haggle.send(Option.INFO, data), haggle.send(Option.GO, data)
    assert [(a.reply, a.data) for a in info] == [(a.reply, a.data) for a in go]
    assert (name in EXPORTS) == (haggle.state is State.TRANSMISSION)


@pytest.mark.parametrize("first", HARMLESS, ids=lambda n: n.name)
def test_options_in_any_order_end_in_the_agreement_they_add_up_to(first: Option) -> None:
    """CVE-2019-14851: INFO before GO met an assertion."""
    for second, third in permutations(set(HARMLESS) - {first}, 2):
        haggle, order = Haggle(), (first, second, third)
        for number in (*order, Option.GO):
            haggle.feed(option(number, naming(number, "disk")))
        agreement = haggle.transmit().agreement
        dialects = [Dialect.SIMPLE, *(DIALECTS[number] for number in order if number in DIALECTS)]
        assert max(dialects) is agreement.dialect, order
        before = takewhile(lambda number: number is not Option.SET_META_CONTEXT, order)
        selects = Option.SET_META_CONTEXT in order and DIALECTS.keys() & set(before)
        selected = {1: "base:allocation"} if selects else {}
        assert selected == agreement.contexts, order


def test_an_export_is_asked_for_only_by_options_that_name_one() -> None:
    """CVE-2019-14850: a backend is not opened before an option asks for it."""
    haggle = Haggle()
    haggle.send_all(*set(Option) - {Option.EXPORT_NAME, Option.ABORT, *NAMED})
    assert [] == [event for event in haggle.events if isinstance(event, OpenExport)]


# --- size constraints --------------------------------------------------------------------------


@info_or_go
def test_a_client_that_ignores_block_sizes_is_told_them_and_refused(number: Option) -> None:
    haggle = Haggle()
    *replies, last = haggle.send(number, info_data("sectors", [Info.NAME]))
    assert Reply.ERR_BLOCK_SIZE_REQD == refusal([last]).reply
    told = [answer.data for answer in replies]
    assert pack(">HIII", Info.BLOCK_SIZE, 512, 4096, 1 << 20) in told
    assert pack(">H", Info.EXPORT) == told[0][:2]
    assert State.OPEN is haggle.state
    assert ack(number) == haggle.send(number, info_data("sectors", [Info.BLOCK_SIZE]))[-1]


@info_or_go
def test_what_was_asked_before_is_not_asked_now(number: Option) -> None:
    haggle = Haggle()
    haggle.send(Option.INFO, info_data("sectors", [Info.BLOCK_SIZE]))
    last = haggle.send(number, info_data("sectors"))[-1]
    assert Reply.ERR_BLOCK_SIZE_REQD == last.reply


# --- malformed ---------------------------------------------------------------------------------

MALFORMED = {
    "empty": b"",
    "half a length": b"\0\0",
    "name longer than the option": pack(">I", 5) + b"disk" + pack(">H", 0),
    "name of 4 GiB": pack(">I", HUGE) + b"disk" + pack(">H", 0),
    "name up to the count": pack(">I", 6) + b"disk" + pack(">H", 0),
    "no count": pack(">I", 4) + b"disk",
    "half a count": pack(">I", 4) + b"disk\0",
    "count without a list": pack(">I", 4) + b"disk" + pack(">H", 1),
    "half an information": pack(">I", 4) + b"disk" + pack(">H", 1) + b"\0",
    "count beyond the list": info_data("disk", [3])[:-4] + pack(">HH", 65535, 3),
    "count below the list": info_data("disk", [3])[:-4] + pack(">HHH", 1, 3, 3),
    "trailing byte": info_data("disk", [3]) + b"\0",
    "trailing junk": info_data("disk") + b"junk" * 100,
}


@info_or_go
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_info_and_go_are_invalid_and_leave_the_stream_in_sync(
    number: Option, data: bytes
) -> None:
    haggle = Haggle()
    assert (number, Reply.ERR_INVALID) == (
        refusal(haggle.send(number, data)).option,
        refusal(haggle.send(number, data)).reply,
    )
    assert [] == haggle.events
    haggle.send(Option.GO, info_data("disk"))
    haggle.transmit()


# --- names -------------------------------------------------------------------------------------


@by_name
def test_a_name_of_4096_bytes_is_looked_up(number: Option) -> None:
    """CVE-2017-15118, CVE-2022-26495; CVE-2020-10761: it comes back in a text that is cut."""
    name = "\N{EURO SIGN}" * 1365 + "x"
    assert MAX_STRING == len(name.encode())
    haggle = extended(number)
    answer = refusal(haggle.send(number, naming(number, name)))
    assert (number, Reply.ERR_UNKNOWN) == (answer.option, answer.reply)
    assert MAX_STRING - 4 < len(answer.data) <= MAX_STRING
    event = haggle.last
    assert name == getattr(event, "name", None)


@by_name
@pytest.mark.parametrize("length", [4097, 65536 - 64])
def test_longer_names_are_invalid(number: Option, length: int) -> None:
    """CVE-2017-15118, CVE-2022-26496: no name is taken that the protocol does not allow."""
    haggle = extended(number)
    answer = refusal(haggle.send(number, naming(number, b"n" * length)))
    assert Reply.ERR_INVALID == answer.reply
    assert [] == haggle.events


@by_name
@pytest.mark.parametrize("length", [65537, 0x7FFFFFFF, 0xFFFFFFF0, HUGE])
def test_name_lengths_beyond_the_option_are_invalid(number: Option, length: int) -> None:
    """CVE-2022-26495: 0xffffffff plus one wrapped to an allocation of nothing."""
    haggle = extended(number)
    data = pack(">I", length) + naming(number, b"n" * 60000)[4:]
    assert Reply.ERR_INVALID == refusal(haggle.send(number, data)).reply
    assert [] == haggle.events


def test_export_name_of_4096_bytes_is_looked_up() -> None:
    haggle = Haggle()
    haggle.feed(option(Option.EXPORT_NAME, b"n" * MAX_STRING))
    assert OpenExport(Option.EXPORT_NAME, "n" * MAX_STRING) == haggle.events[0]
    haggle.closed()


@pytest.mark.parametrize("length", [4097, 65536, 65537, 0x7FFFFFFF, HUGE])
def test_longer_names_in_export_name_close_before_they_are_read(length: int) -> None:
    """CVE-2022-26495, CVE-2022-26496, CVE-2017-15118."""
    haggle = Haggle()
    assert b"" == haggle.feed(announced(Option.EXPORT_NAME, length))
    assert haggle.closed().fault


@pytest.mark.parametrize(
    "name",
    [
        b"a\0b",
        b"\0",
        b"disk\0",
        b"\xff",
        b"caf\xe9",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
    ],
    ids=repr,
)
@pytest.mark.parametrize("number", [Option.EXPORT_NAME, *NAMED], ids=lambda n: n.name)
def test_names_with_nul_or_without_utf8_are_no_names(number: Option, name: bytes) -> None:
    haggle = extended(number)
    out = haggle.feed(option(number, naming(number, name)))
    assert [] == [event for event in haggle.events if hasattr(event, "name")]
    if number is Option.EXPORT_NAME:
        assert b"" == out
        haggle.closed()
    else:
        assert Reply.ERR_INVALID == refusal(answers(out)).reply


@by_name
def test_texts_that_utf8_cannot_carry_are_sent_all_the_same(number: Option) -> None:
    """A path of odd bytes in an operating system's error is full of lone surrogates."""
    haggle = Haggle(shell=False)
    haggle.send_all(Option.STRUCTURED_REPLY)
    haggle.send(number, naming(number, "disk"))
    haggle.machine.refuse(Reply.ERR_PLATFORM, "no such file: caf\udce9")
    answer = refusal(answers(haggle.machine.to_send()))
    assert (Reply.ERR_PLATFORM, b"no such file: caf?") == (answer.reply, answer.data)


def test_an_export_beyond_all_limits_is_described_as_it_is() -> None:
    haggle = Haggle(shell=False)
    haggle.send(Option.INFO, info_data("disk", [Info.DESCRIPTION, Info.BLOCK_SIZE]))
    sizes = BlockSizes(65536, 65536, HUGE)
    export = ExportInfo("disk", 2**63 - 65536, F.HAS_FLAGS, "d" * 5000, sizes)
    haggle.machine.accept(export)
    told = [answer.data for answer in answers(haggle.machine.to_send())]
    assert [
        pack(">HQH", Info.EXPORT, 2**63 - 65536, F.HAS_FLAGS),
        pack(">H", Info.DESCRIPTION) + b"d" * MAX_STRING,
        pack(">HIII", Info.BLOCK_SIZE, 65536, 65536, HUGE),
        b"",
    ] == told
