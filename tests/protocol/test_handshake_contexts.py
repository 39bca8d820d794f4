"""STRUCTURED_REPLY, EXTENDED_HEADERS and the meta context options as a server answers them.

::

    STRUCTURED_REPLY   SIMPLE -> STRUCTURED     twice INVALID, after the other EXT_HEADER_REQD
    EXTENDED_HEADERS   any    -> EXTENDED       twice INVALID
    SET_META_CONTEXT   replaces the former set, also by failing; holds for one export name
"""

from struct import pack

import pytest
from haggling import (
    CONTEXTS,
    EXPORTS,
    Answer,
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
from protocol.constants import Dialect, Info, Option, Reply
from protocol.handshake.events import Agreement, State
from protocol.handshake.options import MAX_QUERIES

LIST, SET = Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT
ALL = CONTEXTS["disk"]
BITMAPS = ["qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"]
both = pytest.mark.parametrize("number", [LIST, SET], ids=lambda n: n.name)


def structured() -> Haggle:
    haggle = Haggle()
    haggle.send_all(Option.STRUCTURED_REPLY)
    return haggle


def shown(replies: list[Answer]) -> list[tuple[int, str]]:
    """(id, name) of a successful answer."""
    *contexts, last = replies
    assert ack(last.option) == last
    assert {Reply.META_CONTEXT} >= {answer.reply for answer in contexts}
    parsed = [structs.MetaContextReply.parse(answer.data) for answer in contexts]
    return [(context.id, context.name.decode()) for context in parsed]


def agreed(haggle: Haggle, name: str = "disk") -> Agreement:
    haggle.send(Option.GO, info_data(name, [Info.BLOCK_SIZE]))
    return haggle.transmit().agreement


# --- dialects ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "replies", "dialect"),
    [
        ([], [], Dialect.SIMPLE),
        ([8], [Reply.ACK], Dialect.STRUCTURED),
        ([11], [Reply.ACK], Dialect.EXTENDED),
        ([8, 8], [Reply.ACK, Reply.ERR_INVALID], Dialect.STRUCTURED),
        ([11, 11], [Reply.ACK, Reply.ERR_INVALID], Dialect.EXTENDED),
        ([8, 11], [Reply.ACK, Reply.ACK], Dialect.EXTENDED),
        ([11, 8], [Reply.ACK, Reply.ERR_EXT_HEADER_REQD], Dialect.EXTENDED),
        ([8, 11, 8], [Reply.ACK, Reply.ACK, Reply.ERR_EXT_HEADER_REQD], Dialect.EXTENDED),
    ],
    ids=str,
)
def test_extended_headers_win_over_structured_replies(
    asked: list[int], replies: list[Reply], dialect: Dialect
) -> None:
    haggle = Haggle()
    assert replies == [answer.reply for answer in haggle.send_all(*asked)]
    assert dialect is agreed(haggle).dialect


@pytest.mark.parametrize("asked", [[], [8], [11], [8, 11]], ids=str)
@pytest.mark.parametrize("contexts", [[], ["base:allocation"]], ids=["none", "one"])
def test_flags_are_offered_only_in_the_dialect_that_has_them(
    asked: list[int], contexts: list[str]
) -> None:
    haggle = Haggle()
    haggle.send_all(*asked)
    haggle.send(SET, meta_data("disk", contexts))
    flags = agreed(haggle).flags
    assert F.HAS_FLAGS in flags
    assert bool(asked) == (F.SEND_DF in flags)
    assert (11 in asked and bool(contexts)) == (F.BLOCK_STATUS_PAYLOAD in flags)


# --- LIST_META_CONTEXT -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], ALL),
        (["base:"], ALL[:1]),
        (["qemu:"], ALL[1:]),
        (["qemu:dirty-bitmap:"], BITMAPS),
        (["qemu:dirty-bitmap"], []),
        (["qemu:allocation-depth"], ALL[3:]),
        (["qemu:allocation"], []),
        (["base:", "base:allocation", "base:"], ALL[:1]),
        (["x-nobody:", "x-nobody:knows", "base:"], ALL[:1]),
        (["x-nobody:knows"], []),
        (["allocation", "", ":", "base"], []),
    ],
    ids=str,
)
def test_list_shows_what_the_queries_match_with_id_zero(
    queries: list[str], names: list[str]
) -> None:
    haggle = Haggle()  # LIST is served before STRUCTURED_REPLY
    assert [(0, name) for name in names] == shown(haggle.send(LIST, meta_data("disk", queries)))


def test_list_selects_nothing_and_replaces_nothing() -> None:
    haggle = structured()
    haggle.send(SET, meta_data("disk", BITMAPS[:1]))
    haggle.send(LIST, meta_data("disk", ["base:allocation"]))
    haggle.send(LIST, meta_data("elsewhere"))
    assert {1: BITMAPS[0]} == agreed(haggle).contexts


# --- SET_META_CONTEXT --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], []),
        (["base:"], []),
        (["qemu:dirty-bitmap:", "qemu:"], []),
        (["base:allocation"], ALL[:1]),
        (["base:allocation"] * 3, ALL[:1]),
        (ALL, ALL),
        (ALL[::-1], ALL),
        (["x-nobody:knows", *BITMAPS, ""], BITMAPS),
        (["base:allocation:", "base:Allocation", "base: allocation"], []),
    ],
    ids=str,
)
def test_set_selects_each_context_named_exactly_once_under_an_id_of_its_own(
    queries: list[str], names: list[str]
) -> None:
    haggle = structured()
    chosen = shown(haggle.send(SET, meta_data("disk", queries)))
    assert sorted(names) == sorted(name for _, name in chosen)
    assert len(names) == len({number for number, _ in chosen})
    assert dict(chosen) == agreed(haggle).contexts


@pytest.mark.parametrize("queries", [[], ["base:allocation"]], ids=["none", "one"])
def test_set_before_structured_replies_is_invalid(queries: list[str]) -> None:
    haggle = Haggle()
    (refusal,) = haggle.send(SET, meta_data("disk", queries))
    assert Reply.ERR_INVALID == refusal.reply
    assert [] == haggle.events
    haggle.send_all(Option.STRUCTURED_REPLY)
    assert {} == agreed(haggle).contexts


FAILING = {
    "empty": b"",
    "trailing byte": meta_data("disk", ["base:allocation"]) + b"\0",
    "unknown export": meta_data("elsewhere", ["base:allocation"]),
    "bad name": meta_data(b"a\0b", ["base:allocation"]),
    "bad query": meta_data("disk", [b"base:\xff"]),
    "long query": meta_data("disk", ["base:" + "x" * 4092]),
    "too many": meta_data("disk", ["base:allocation"] * (MAX_QUERIES + 1)),
}


@pytest.mark.parametrize("data", FAILING.values(), ids=FAILING.keys())
def test_set_replaces_the_former_set_even_when_it_fails(data: bytes) -> None:
    haggle = structured()
    haggle.send(SET, meta_data("disk", ["base:allocation"]))
    (refusal,) = haggle.send(SET, data)
    assert refusal.reply & 1 << 31
    assert {} == agreed(haggle).contexts


def test_set_replaces_the_former_set_when_it_succeeds() -> None:
    haggle = structured()
    haggle.send(SET, meta_data("disk", ["base:allocation"]))
    chosen = shown(haggle.send(SET, meta_data("disk", BITMAPS)))
    assert sorted(BITMAPS) == sorted(name for _, name in chosen)
    assert dict(chosen) == agreed(haggle).contexts


@pytest.mark.parametrize(
    ("selected", "opened"), [("disk", "sectors"), ("sectors", "disk"), ("disk", ""), ("", "disk")]
)
def test_contexts_are_void_when_go_names_another_export(selected: str, opened: str) -> None:
    haggle = structured()
    haggle.send(SET, meta_data(selected, ["base:allocation"]))
    assert {} == agreed(haggle, opened).contexts


def test_contexts_are_void_when_export_name_names_another_export() -> None:
    haggle = structured()
    haggle.send(SET, meta_data("disk", ["base:allocation"]))
    haggle.feed(option(Option.EXPORT_NAME, b""))
    assert {} == haggle.transmit().agreement.contexts


def test_contexts_hold_though_info_asks_about_others_in_between() -> None:
    haggle = structured()
    haggle.send(SET, meta_data("disk", ["base:allocation"]))
    haggle.send(Option.INFO, info_data("sectors", [Info.BLOCK_SIZE]))
    haggle.send(Option.GO, info_data("elsewhere"))
    assert {1: "base:allocation"} == agreed(haggle).contexts


def test_contexts_survive_the_move_to_extended_headers() -> None:
    haggle = structured()
    haggle.send(SET, meta_data("disk", ["base:allocation"]))
    haggle.send_all(Option.EXTENDED_HEADERS)
    assert {1: "base:allocation"} == agreed(haggle).contexts


def test_info_and_go_of_an_export_agree_on_status_payload_only_with_contexts_for_it() -> None:
    haggle = Haggle()
    haggle.send_all(Option.EXTENDED_HEADERS)
    haggle.send(SET, meta_data("disk", ["base:allocation"]))
    told = {}
    for name in ("sectors", "disk"):
        data = haggle.send(Option.INFO, info_data(name, [Info.BLOCK_SIZE]))[0].data
        told[name] = structs.InfoExport.parse(data).flags
    payload = F.SEND_DF | F.BLOCK_STATUS_PAYLOAD
    assert EXPORTS["sectors"].flags | F.SEND_DF == told["sectors"]
    assert EXPORTS["disk"].flags | payload == told["disk"]


# --- malformed, too many -----------------------------------------------------------------------


@both
def test_sixty_four_queries_are_served(number: Option) -> None:
    queries = ["base:allocation", *(f"x-{n}:" for n in range(MAX_QUERIES - 1))]
    replies = structured().send(number, meta_data("disk", queries))
    assert ["base:allocation"] == [name for _, name in shown(replies)]


@both
@pytest.mark.parametrize("count", [MAX_QUERIES + 1, 1000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_more_queries_are_too_big_whether_they_are_there_or_not(number: Option, count: int) -> None:
    haggle = structured()
    (refusal,) = haggle.send(number, meta_data("disk")[:-4] + pack(">I", count))
    assert Reply.ERR_TOO_BIG == refusal.reply
    assert [] == haggle.events


MALFORMED = {
    "empty": b"",
    "half a length": b"\0\0\0",
    "name longer than the option": pack(">I", 9) + b"disk" + pack(">I", 0),
    "no count": pack(">I", 4) + b"disk",
    "half a count": pack(">I", 4) + b"disk\0\0",
    "count without queries": pack(">I", 4) + b"disk" + pack(">I", 1),
    "half a query length": pack(">I", 4) + b"disk" + pack(">IH", 1, 0),
    "query beyond the option": pack(">I", 4) + b"disk" + pack(">II", 1, 16) + b"base:allocation",
    "query of 4 GiB": pack(">I", 4) + b"disk" + pack(">II", 1, 0xFFFFFFFF) + b"base:allocation",
    "trailing byte": meta_data("disk", ["base:allocation"]) + b"\0",
    "trailing query": meta_data("disk", ["base:allocation"]) + pack(">I", 0),
}


@both
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_queries_are_invalid_and_leave_the_stream_in_sync(
    number: Option, data: bytes
) -> None:
    haggle = structured()
    (refusal,) = haggle.send(number, data)
    assert (number, Reply.ERR_INVALID) == (refusal.option, refusal.reply)
    assert ([], State.OPEN) == (haggle.events, haggle.state)
    shown(haggle.send(number, naming(number, "disk")))


@both
@pytest.mark.parametrize(
    "query", [b"x" * 4097, b"base:\0", b"base:\xff"], ids=["long", "nul", "utf8"]
)
def test_queries_are_strings_of_the_protocol(number: Option, query: bytes) -> None:
    (refusal,) = structured().send(number, meta_data("disk", ["base:allocation", query]))
    assert Reply.ERR_INVALID == refusal.reply


@both
def test_a_query_of_4096_bytes_is_looked_at(number: Option) -> None:
    replies = structured().send(number, meta_data("disk", ["x-" + "n" * 4093 + ":"]))
    assert [] == shown(replies)


@both
def test_the_shell_may_refuse_a_query(number: Option) -> None:
    haggle = Haggle(shell=False)
    haggle.send_all(Option.STRUCTURED_REPLY)
    haggle.send(number, meta_data("disk"))
    haggle.machine.refuse(Reply.ERR_PLATFORM, "it is broken")
    expected = [Answer(number, Reply.ERR_PLATFORM, b"it is broken")]
    assert expected == answers(haggle.machine.to_send())
    assert State.OPEN is haggle.state
