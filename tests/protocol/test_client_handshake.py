"""The client's handshake against scripted servers: every pair of its table, every bound.

The servers' bytes are built with construct from ``structs``, not with the code under test.
"""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.constants import (
    ClientFlag,
    Dialect,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from protocol.errors import LocalProtocolError, Refused, RemoteProtocolError
from protocol.handshake.client import TABLE, ClientHandshake
from protocol.handshake.client_states import ASKS, LOCAL, Signal, State
from protocol.handshake.wants import (
    ContextsListed,
    Described,
    Ended,
    Export,
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
    InfoBlockSize,
    InfoExport,
    InfoRequest,
    InfoText,
    MetaContextReply,
    MetaContextRequest,
    Oldstyle,
    OptionHeader,
    OptionReplyHeader,
    ServerReply,
)
from protocol.terms import BlockSizes, Negotiated

FIXED = HandshakeFlag.FIXED_NEWSTYLE
NO_ZEROES = HandshakeFlag.NO_ZEROES
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
SIZE = 1 << 30
PLAIN = {"structured": False, "extended": False}
ALLOCATION = "base:allocation"


def greeting(flags=FIXED | NO_ZEROES):
    return Greeting.build({"flags": flags})


def oldstyle(size=SIZE, flags=FLAGS):
    return Oldstyle.build({"size": size, "flags": flags})


def reply(option, kind, data=b""):
    header = {"option": option, "reply": kind, "length": len(data)}
    return OptionReplyHeader.build(header) + data


def ack(option):
    return reply(option, Reply.ACK)


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return {"length": len(data), "data": data}


def export_info(size=SIZE, flags=FLAGS):
    return InfoExport.build({"type": Info.EXPORT, "size": size, "flags": flags})


def text_info(kind, text):
    return InfoText.build({"type": kind, "text": text})


def block_info(minimum, preferred, maximum):
    sizes = {"minimum": minimum, "preferred": preferred, "maximum": maximum}
    return InfoBlockSize.build({"type": Info.BLOCK_SIZE, **sizes})


def info(data, option=Option.GO):
    return reply(option, Reply.INFO, data)


def context(number, name=ALLOCATION, option=Option.SET_META_CONTEXT):
    data = MetaContextReply.build({"id": number, "name": name.encode()})
    return reply(option, Reply.META_CONTEXT, data)


def listed(name, description=b""):
    data = ServerReply.build({"name": string(name), "description": description})
    return reply(Option.LIST, Reply.SERVER, data)


def export_name(size=SIZE, flags=FLAGS, *, zeroes=False):
    return ExportNameReply.build({"size": size, "flags": flags}) + bytes(124 * zeroes)


def started(*server, **wants):
    """A handshake that has got so far; returns it and the last events."""
    handshake = ClientHandshake(Wants(**wants))
    events = []
    for data in server:
        if data is TLS:
            handshake.tls_started()
        else:
            events = handshake.receive_data(data)
    return handshake, events


def options(sent):
    """What a client sent after its flags: (option, data) pairs."""
    found = []
    while sent:
        header = OptionHeader.parse(sent)
        found.append((Option(header.option), sent[16 : 16 + header.length]))
        sent = sent[16 + header.length :]
    return found


TLS = object()
GO = ack(Option.GO)


# --- the whole table -------------------------------------------------------------------------

REACH = {
    State.GREETING: ([], {}),
    State.STARTTLS: ([greeting()], {"tls": TlsPolicy.REQUIRE}),
    State.TLS: ([greeting(), ack(Option.STARTTLS)], {"tls": TlsPolicy.REQUIRE}),
    State.EXTENDED: ([greeting()], {}),
    State.STRUCTURED: ([greeting()], {"extended": False}),
    State.SET_CONTEXTS: (
        [greeting(), ack(Option.EXTENDED_HEADERS)],
        {"queries": (ALLOCATION,)},
    ),
    State.GO: ([greeting(), info(export_info())], PLAIN),
    State.EXPORT_NAME: ([greeting(), reply(Option.GO, Reply.ERR_UNSUP)], PLAIN),
    State.INFO: ([greeting(), info(export_info(), Option.INFO)], {"mode": Mode.INFO, **PLAIN}),
    State.LIST: ([greeting()], {"mode": Mode.LIST, **PLAIN}),
    State.LIST_CONTEXTS: ([greeting()], {"mode": Mode.LIST_CONTEXTS, **PLAIN}),
    State.IDLE: ([greeting(), ack(Option.LIST)], {"mode": Mode.LIST, **PLAIN}),
    State.DENIED: (
        [greeting(), reply(Option.STARTTLS, Reply.ERR_POLICY)],
        {"tls": TlsPolicy.REQUIRE},
    ),
    State.ABORTING: ([greeting(), ack(Option.LIST), "abort"], {"mode": Mode.LIST, **PLAIN}),
    State.READY: ([greeting(), info(export_info()) + GO], PLAIN),
    State.ENDED: (
        [greeting(), ack(Option.LIST), "abort", ack(Option.ABORT)],
        {"mode": Mode.LIST, **PLAIN},
    ),
    State.FAILED: ([b"HTTP/1.1 400 Bad"], {}),
}


def reach(state):
    server, wants = REACH[state]
    handshake = ClientHandshake(Wants(**wants))
    for data in server:
        try:
            if data == "abort":
                handshake.abort()
            else:
                handshake.receive_data(data)
        except RemoteProtocolError:
            assert state in {State.DENIED, State.FAILED}
    assert state is handshake.state
    handshake.data_to_send()
    return handshake


def give(handshake, signal):
    """Make one thing happen."""
    asked = ASKS.get(handshake.state, Option.GO)
    replies = {
        Signal.ACK: (Reply.ACK, b""),
        Signal.SERVER: (Reply.SERVER, bytes(4)),
        Signal.INFO: (Reply.INFO, export_info()),
        Signal.CONTEXT: (Reply.META_CONTEXT, bytes(4) + ALLOCATION.encode()),
        Signal.UNKNOWN: (77, b""),
        Signal.UNSUP: (Reply.ERR_UNSUP, b"no"),
        Signal.TLS_REQD: (Reply.ERR_TLS_REQD, b"no"),
        Signal.SHUTDOWN: (Reply.ERR_SHUTDOWN, b"no"),
        Signal.ERROR: (Reply.ERR_POLICY, b"no"),
    }
    match signal:
        case Signal.OLDSTYLE:
            handshake.receive_data(oldstyle())
        case Signal.NEWSTYLE:
            handshake.receive_data(greeting(NO_ZEROES))
        case Signal.FIXED:
            handshake.receive_data(greeting())
        case Signal.EXPORT:
            handshake.receive_data(export_name())
        case Signal.UNASKED:
            handshake.receive_data(b"x" * 300)
        case Signal.TLS_STARTED:
            handshake.tls_started()
        case Signal.ASK:
            handshake.ask(Mode.LIST)
        case Signal.ABORT:
            handshake.abort()
        case Signal.EOF:
            handshake.eof()
        case _:
            handshake.receive_data(reply(asked, *replies[signal]))


PAIRS = [
    (state, signal)
    for state in State
    for signal in Signal
    # Anything looks like ten bytes of terms.
    if state is not State.EXPORT_NAME or signal in {Signal.EXPORT, Signal.EOF, *LOCAL}
]


@pytest.mark.parametrize(("state", "signal"), PAIRS, ids=lambda item: item.name)
def test_every_pair_of_state_and_signal(state, signal):
    handshake = reach(state)
    transition = TABLE.get((state, signal))
    if state is State.ENDED and signal not in LOCAL and signal is not Signal.EOF:
        give(handshake, signal)  # what comes after the end is not looked at
        assert handshake.state is State.ENDED
    elif transition is not None:
        try:
            give(handshake, signal)
        except Refused:
            assert signal in {Signal.UNSUP, Signal.TLS_REQD, Signal.SHUTDOWN, Signal.ERROR}
        assert handshake.state in transition.targets
    elif signal in LOCAL:
        with pytest.raises(LocalProtocolError, match=re.escape(signal.value)):
            give(handshake, signal)
        assert state is handshake.state
        assert handshake.data_to_send() == b""
    else:
        with pytest.raises(RemoteProtocolError):
            give(handshake, signal)
        assert handshake.state is State.FAILED


def test_every_state_can_be_reached_and_every_transition_is_in_the_picture():
    assert set(State) == set(REACH)
    for (state, _), transition in TABLE.items():
        assert {state, *transition.targets} <= set(State)
    targets = set().union(*(transition.targets for transition in TABLE.values()))
    assert set(State) - {State.GREETING, State.FAILED} == targets


# --- what is sent, what comes of it ----------------------------------------------------------


def test_everything_at_once():
    server = [
        greeting(),
        ack(Option.STARTTLS),
        TLS,
        ack(Option.EXTENDED_HEADERS),
        context(7, "qemu:dirty-bitmap:b") + context(0) + ack(Option.SET_META_CONTEXT),
        info(block_info(512, 4096, 1 << 25)) + info(export_info()),
        info(text_info(Info.NAME, "dísk".encode())) + info(text_info(Info.DESCRIPTION, b"a\x1bb")),
        info(b"\x00\x63 whatever this is") + GO,
    ]
    queries = (ALLOCATION, "qemu:dirty-bitmap:b", "x-unknown:one")
    handshake, events = started(
        *server, export="disk", tls=TlsPolicy.REQUIRE, queries=queries, infos=(3, 1)
    )
    expected = Negotiated(
        export="disk",
        size=SIZE,
        flags=FLAGS,
        blocks=BlockSizes(512, 4096, 1 << 25),
        blocks_advertised=True,
        name="dísk",
        description="a\N{REPLACEMENT CHARACTER}b",
        dialect=Dialect.EXTENDED,
        contexts={7: "qemu:dirty-bitmap:b", 0: ALLOCATION},
        tls=True,
    )
    assert [expected] == events
    sent = handshake.data_to_send()
    assert ClientFlags.parse(sent[:4]).flags == ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
    assert options(sent[4:]) == [
        (Option.STARTTLS, b""),
        (Option.EXTENDED_HEADERS, b""),
        (
            Option.SET_META_CONTEXT,
            MetaContextRequest.build(
                {"name": string("disk"), "queries": [string(q) for q in queries], "rest": b""}
            ),
        ),
        (
            Option.GO,
            InfoRequest.build({"name": string("disk"), "infos": [3, 1], "rest": b""}),
        ),
    ]


def test_extended_falls_back_to_structured_and_to_simple():
    no = [reply(o, Reply.ERR_UNSUP) for o in (Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY)]
    end = info(export_info()) + GO
    _, [structured] = started(greeting(), no[0], ack(Option.STRUCTURED_REPLY), end)
    assert (structured.dialect, structured.tls) == (Dialect.STRUCTURED, False)
    assert structured.refusals == ("server refused EXTENDED_HEADERS: ERR_UNSUP",)
    _, [simple] = started(greeting(), *no, end, queries=(ALLOCATION,))
    assert (simple.dialect, simple.contexts) == (Dialect.SIMPLE, {})
    assert BlockSizes(1, 4096, 32 << 20) == simple.blocks
    assert not simple.blocks_advertised


def test_xapi_nbd_is_reached_by_export_name_with_its_zeroes():
    refused = [
        reply(option, Reply.ERR_UNSUP)
        for option in (Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY, Option.GO)
    ]
    handshake, [] = started(greeting(FIXED), *refused, export="/vdi?session_id=x")
    sent = handshake.data_to_send()
    assert ClientFlags.parse(sent[:4]).flags == ClientFlag.FIXED_NEWSTYLE
    assert options(sent[4:])[-1] == (Option.EXPORT_NAME, b"/vdi?session_id=x")
    assert handshake.receive_data(export_name(zeroes=True)[:-1]) == []
    [terms] = handshake.receive_data(b"\0")
    assert (terms.size, terms.flags) == (SIZE, FLAGS)


def test_contexts_survive_the_fallback_to_export_name():
    _, [terms] = started(
        greeting(),
        ack(Option.STRUCTURED_REPLY),
        context(3) + ack(Option.SET_META_CONTEXT),
        reply(Option.GO, Reply.ERR_UNSUP),
        export_name(),
        extended=False,
        queries=(ALLOCATION,),
    )
    assert terms.contexts == {3: ALLOCATION}


def test_go_unsupported_after_extended_headers_is_a_violation():
    with pytest.raises(RemoteProtocolError, match="does not know GO"):
        started(greeting(), ack(Option.EXTENDED_HEADERS), reply(Option.GO, Reply.ERR_UNSUP))


def test_who_does_not_want_go_asks_for_nothing_else():
    bare = {"extended": False, "structured": False, "go": False}
    handshake, [] = started(greeting(), export="disk", **bare)
    assert options(handshake.data_to_send()[4:]) == [(Option.EXPORT_NAME, b"disk")]
    [terms] = handshake.receive_data(export_name())
    assert (terms.size, terms.dialect) == (SIZE, Dialect.SIMPLE)


def test_plain_newstyle_goes_straight_to_the_export():
    handshake, [] = started(greeting(0), export="disk")
    sent = handshake.data_to_send()
    assert sent[:4] == bytes(4)
    assert options(sent[4:]) == [(Option.EXPORT_NAME, b"disk")]
    [terms] = handshake.receive_data(export_name(zeroes=True))
    assert terms.dialect is Dialect.SIMPLE


def test_oldstyle_has_one_unnamed_export():
    handshake, [terms] = started(oldstyle(flags=FLAGS | 1 << 20))
    assert (terms.size, terms.flags) == (SIZE, FLAGS)
    assert handshake.data_to_send() == b""
    with pytest.raises(Refused, match="unnamed"):
        started(oldstyle(), export="disk")


@pytest.mark.parametrize("hello", [oldstyle(), greeting(NO_ZEROES)])
@pytest.mark.parametrize(
    ("wants", "option"),
    [
        ({"tls": TlsPolicy.REQUIRE}, Option.STARTTLS),
        ({"mode": Mode.LIST}, Option.LIST),
        ({"mode": Mode.INFO}, Option.INFO),
        ({"mode": Mode.LIST_CONTEXTS}, Option.LIST_META_CONTEXT),
    ],
)
def test_old_servers_cannot_do_what_needs_options(hello, wants, option):
    with pytest.raises(Refused) as caught:
        started(hello, **wants)
    assert option is caught.value.option


def test_list_then_describe_then_go_on_one_connection():
    handshake, [exports] = started(
        greeting(),
        ack(Option.STRUCTURED_REPLY),
        listed("", b"the default") + listed("dísk") + ack(Option.LIST),
        mode=Mode.LIST,
        extended=False,
    )
    assert Listed((Export("", "the default"), Export("dísk", ""))) == exports
    handshake.ask(Mode.LIST_CONTEXTS, "dísk")
    listed_contexts = context(0, option=Option.LIST_META_CONTEXT)
    [names] = handshake.receive_data(listed_contexts + ack(Option.LIST_META_CONTEXT))
    assert ContextsListed((ALLOCATION,)) == names
    handshake.ask(Mode.INFO, "dísk", (ALLOCATION,))
    handshake.receive_data(context(5) + ack(Option.SET_META_CONTEXT))
    [described] = handshake.receive_data(info(export_info(), Option.INFO) + ack(Option.INFO))
    assert isinstance(described, Described)
    assert described.terms.contexts == {5: ALLOCATION}
    handshake.ask(Mode.GO, "dísk")
    [terms] = handshake.receive_data(info(export_info()) + GO)
    # Selecting is per question: what INFO selected is not taken for granted.
    assert (terms.export, terms.contexts, terms.dialect) == ("dísk", {}, Dialect.STRUCTURED)


def test_refusals_carry_the_servers_words_and_leave_the_connection_usable():
    handshake, _ = started(greeting(), export="gone", **PLAIN)
    with pytest.raises(Refused, match=r"GO: ERR_UNKNOWN: no such export") as caught:
        handshake.receive_data(reply(Option.GO, Reply.ERR_UNKNOWN, b"no such export"))
    assert (caught.value.option, caught.value.reply) == (Option.GO, Reply.ERR_UNKNOWN)
    assert handshake.state is State.IDLE
    handshake.ask(Mode.GO, "there")
    [terms] = handshake.receive_data(info(export_info()) + GO)
    assert terms.export == "there"


def test_an_unknown_error_is_a_refusal_too():
    handshake, _ = started(greeting(), **PLAIN)
    with pytest.raises(Refused, match="0x80001234") as caught:
        handshake.receive_data(reply(Option.GO, 0x80001234, b"\x1b[2J"))
    assert caught.value.reply == 0x80001234
    assert caught.value.text == "\N{REPLACEMENT CHARACTER}[2J"


@pytest.mark.parametrize("option", [Option.EXTENDED_HEADERS, Option.GO])
def test_shutdown_leaves_nothing_but_to_abort(option):
    handshake, _ = started(greeting(), **(PLAIN if option is Option.GO else {}))
    with pytest.raises(Refused):
        handshake.receive_data(reply(option, Reply.ERR_SHUTDOWN))
    with pytest.raises(LocalProtocolError):
        handshake.ask(Mode.GO)
    handshake.abort()
    assert handshake.receive_data(ack(Option.ABORT)) == [Ended()]


@pytest.mark.parametrize("ending", ["ack", "tls-reqd", "eof"])
def test_abort_tolerates_every_way_a_server_takes_it(ending):
    handshake = reach(State.IDLE)
    handshake.abort()
    assert options(handshake.data_to_send()) == [(Option.ABORT, b"")]
    if ending == "eof":
        assert handshake.eof() == [Ended()]
    else:
        kind = Reply.ACK if ending == "ack" else Reply.ERR_TLS_REQD
        assert handshake.receive_data(reply(Option.ABORT, kind)) == [Ended()]
        assert handshake.eof() == []


# --- TLS -------------------------------------------------------------------------------------

TLS_REFUSALS = [*(r for r in Reply if r & 1 << 31), 0x80000000, 0xFFFFFFFF]


@pytest.mark.parametrize("refusal", TLS_REFUSALS, ids=hex)
def test_required_tls_is_never_downgraded_cve_2019_14842(refusal):
    handshake, _ = started(greeting(), tls=TlsPolicy.REQUIRE)
    handshake.data_to_send()
    with pytest.raises(Refused, match="STARTTLS"):
        handshake.receive_data(reply(Option.STARTTLS, refusal, b"sorry"))
    assert handshake.data_to_send() == b""
    with pytest.raises(LocalProtocolError):
        handshake.ask(Mode.GO)
    handshake.abort()
    assert options(handshake.data_to_send()) == [(Option.ABORT, b"")]


@pytest.mark.parametrize("policy", [TlsPolicy.ALLOW, TlsPolicy.REQUIRE])
@pytest.mark.parametrize("kind", [0, Reply.SERVER, Reply.INFO, 5, 0x7FFFFFFF])
def test_neither_yes_nor_no_to_starttls_is_a_violation(policy, kind):
    with pytest.raises(RemoteProtocolError):
        started(greeting(), reply(Option.STARTTLS, kind), tls=policy)


@pytest.mark.parametrize("refusal", TLS_REFUSALS, ids=hex)
def test_allowed_tls_goes_on_in_the_clear(refusal):
    handshake, _ = started(
        greeting(), reply(Option.STARTTLS, refusal), tls=TlsPolicy.ALLOW, **PLAIN
    )
    [terms] = handshake.receive_data(info(export_info()) + GO)
    assert not terms.tls
    assert "STARTTLS" in terms.refusals[0]


def test_nothing_is_asked_before_tls_has_begun():
    handshake, events = started(greeting(), ack(Option.STARTTLS), tls=TlsPolicy.ALLOW)
    assert [StartTls()] == events
    assert options(handshake.data_to_send()[4:]) == [(Option.STARTTLS, b"")]
    handshake.tls_started()
    assert options(handshake.data_to_send()) == [(Option.EXTENDED_HEADERS, b"")]


def test_plain_text_pipelined_behind_the_consent_to_tls():
    with pytest.raises(RemoteProtocolError, match="plain text"):
        started(greeting(), ack(Option.STARTTLS) + b"\x16", tls=TlsPolicy.ALLOW)
    handshake = reach(State.TLS)
    with pytest.raises(RemoteProtocolError):
        handshake.receive_data(b"\x16")
    with pytest.raises(LocalProtocolError):
        handshake.tls_started()


# --- hostile servers -------------------------------------------------------------------------


def header(option=Option.GO, kind=Reply.INFO, length=0, magic=0x0003E889045565A9):
    return b"".join(
        number.to_bytes(size, "big")
        for number, size in ((magic, 8), (int(option), 4), (int(kind), 4), (length, 4))
    )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (header(magic=0x0003E889045565A8), "wrong magic"),
        (header(option=Option.INFO), "reply to option 6"),
        (header(option=0xFFFFFFFF), "reply to option"),
        (header(length=0xFFFFFFFF), "the limit is"),
        (header(length=65537), "the limit is"),
        (header(kind=Reply.ERR_UNKNOWN, length=65537), "the limit is"),
        (reply(Option.GO, Reply.ERR_UNKNOWN, b"x" * 4097), "the limit is 4096"),
        (reply(Option.GO, Reply.ACK, b"x"), "with 1 bytes of data"),
        (GO, "without NBD_INFO_EXPORT"),
        (info(block_info(1, 512, 512)) + GO, "without NBD_INFO_EXPORT"),
        (info(export_info()) + GO + b"x", "nobody asked for"),
        (info(b""), "cut short"),
        (info(b"\0"), "cut short"),
        (info(export_info()[:-1]), "11 bytes instead of 12"),
        (info(export_info() + b"x"), "13 bytes instead of 12"),
        # CVE-2023-5215
        (info(export_info(size=1 << 63)), "more than a file offset"),
        (info(export_info(size=(1 << 64) - 1)), "more than a file offset"),
        (info(export_info()) + info(export_info(size=5)), "two answers"),
        (info(text_info(Info.NAME, b"a")) + info(text_info(Info.NAME, b"b")), "two answers"),
        (info(text_info(Info.NAME, b"a" * 4097)), "the limit is 4096"),
        (info(text_info(Info.NAME, b"a\0")), "NUL"),
        (info(text_info(Info.NAME, b"\xff")), "UTF-8"),
        (info(text_info(Info.DESCRIPTION, b"a" * 4097)), "the limit is 4096"),
        (info(block_info(1, 512, 512) + b"x"), "15 bytes instead of 14"),
        (info(block_info(0, 512, 512)), "minimum"),
        (info(block_info(3, 512, 512)), "minimum"),
        (info(block_info(1 << 17, 1 << 17, 1 << 17)), "minimum"),
        (info(block_info(1, 256, 512)), "preferred"),
        (info(block_info(1, 513, 1024)), "preferred"),
        (info(block_info(4096, 512, 4096)), "preferred"),
        (info(block_info(1, 4096, 4095)), "less than preferred"),
        (info(b"\0\x09") * 65, "more than 64 replies"),
    ],
)
def test_what_a_server_must_not_say_to_go(data, why):
    with pytest.raises(RemoteProtocolError, match=re.escape(why)):
        started(greeting(), data, **PLAIN)


@pytest.mark.parametrize("sizes", [(1, 512, 512), (65536, 65536, 65536), (1, 4096, 0xFFFFFFFF)])
def test_the_extremes_of_block_sizes_are_legal(sizes):
    _, [terms] = started(
        greeting(), info(export_info() * 1) + info(block_info(*sizes)) + GO, **PLAIN
    )
    assert BlockSizes(*sizes) == terms.blocks


def test_the_same_information_twice_is_tolerated():
    _, [terms] = started(greeting(), info(export_info()) * 2 + GO, **PLAIN)
    assert terms.size == SIZE


def test_a_hostile_length_is_refused_before_its_data_is_waited_for():
    handshake, _ = started(greeting(), **PLAIN)
    data = header(length=0xFFFFFFFF)
    handshake.receive_data(data[:-1])
    with pytest.raises(RemoteProtocolError):
        handshake.receive_data(data[-1:])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (context(1, "base:other"), "not asked for"),
        (context(1) + context(2), "given twice"),
        (context(1) + context(1, "x-a:b"), "given twice"),
        (context(1, "allocation"), "no namespace"),
        (reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, b"\0\0\0"), "cut short"),
        (reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, bytes(4) + b"a:\xff"), "UTF-8"),
        (
            reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, bytes(4) + b"a:" * 2049),
            "the limit is 4096",
        ),
        (context(1, option=Option.LIST_META_CONTEXT), "reply to option 9"),
    ],
)
def test_what_a_server_must_not_say_to_set_meta_context(data, why):
    with pytest.raises(RemoteProtocolError, match=re.escape(why)):
        started(
            greeting(),
            ack(Option.STRUCTURED_REPLY),
            data,
            extended=False,
            queries=(ALLOCATION, "x-a:b"),
        )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (listed("a" * 4097), "the limit is 4096"),
        (listed("", b"a" * 4097), "the limit is 4096"),
        (listed(b"\xff"), "UTF-8"),
        (listed("a\0b"), "NUL"),
        (reply(Option.LIST, Reply.SERVER, b""), "cut short"),
        (reply(Option.LIST, Reply.SERVER, b"\0\0\0\x02a"), "cut short"),
        (reply(Option.LIST, Reply.SERVER, b"\xff\xff\xff\xffa"), "cut short"),
        # CVE-2017-2630: a list without end, of short lines and of long ones.
        (listed("") * ((1 << 17) + 1), "more than 131072 replies"),
        (listed("a" * 4096, b"b" * 4096) * 2100, "more than 16777216 bytes"),
    ],
)
def test_what_a_server_must_not_put_in_its_list(data, why):
    with pytest.raises(RemoteProtocolError, match=re.escape(why)):
        started(greeting(), data, mode=Mode.LIST, **PLAIN)


@pytest.mark.parametrize("hello", [b"NBDMAGIX", b"\0", b"NBDMAGIC" + bytes(8), b"SSH-2.0-x"])
def test_not_an_nbd_server(hello):
    with pytest.raises(RemoteProtocolError):
        started(hello)


@pytest.mark.parametrize("hello", [oldstyle(size=1 << 63), greeting(0)])
def test_hostile_sizes_from_old_servers(hello):
    with pytest.raises(RemoteProtocolError, match="more than a file offset"):
        started(hello, export_name(size=1 << 63, zeroes=True))


@pytest.mark.parametrize(
    ("flags", "dialect", "meant"),
    [
        (0xFFFF & ~1, Dialect.EXTENDED, TransmissionFlag.READ_ONLY),
        (0x8000 | FLAGS, Dialect.SIMPLE, FLAGS),
        (FLAGS | TransmissionFlag.SEND_DF, Dialect.SIMPLE, FLAGS),
        (FLAGS | TransmissionFlag.SEND_FAST_ZERO, Dialect.SIMPLE, FLAGS),
        (FLAGS | TransmissionFlag.BLOCK_STATUS_PAYLOAD, Dialect.STRUCTURED, FLAGS),
        (
            FLAGS | TransmissionFlag.BLOCK_STATUS_PAYLOAD | TransmissionFlag.SEND_DF,
            Dialect.EXTENDED,
            FLAGS | TransmissionFlag.BLOCK_STATUS_PAYLOAD | TransmissionFlag.SEND_DF,
        ),
    ],
)
def test_flags_that_mean_nothing_are_dropped(flags, dialect, meant):
    answers = {
        Dialect.EXTENDED: [ack(Option.EXTENDED_HEADERS)],
        Dialect.STRUCTURED: [ack(Option.STRUCTURED_REPLY)],
        Dialect.SIMPLE: [],
    }
    _, [terms] = started(
        greeting(),
        *answers[dialect],
        info(export_info(flags=flags)) + GO,
        extended=dialect is Dialect.EXTENDED,
        structured=dialect is Dialect.STRUCTURED,
    )
    assert meant == terms.flags


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_the_servers_death_in_each_state_cve_2021_20286(state):
    handshake = reach(state)
    if state in {State.ABORTING, State.ENDED}:
        handshake.eof()
        return
    with pytest.raises(RemoteProtocolError, match="server closed the connection") as caught:
        handshake.eof()
    if state in ASKS:
        assert ASKS[state].name in str(caught.value) or "export" in str(caught.value)


# --- wishes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wants",
    [
        {"export": "a" * 4097},
        {"export": "é" * 2049},
        {"export": "a\0"},
        {"export": "\ud800"},
        {"queries": ("allocation",)},
        {"queries": ("base:\0",)},
        {"queries": (ALLOCATION, ALLOCATION)},
        {"queries": tuple(f"x-{n}:" + "a" * 4000 for n in range(17))},
        {"infos": (1, 1)},
        {"infos": (65536,)},
        {"infos": tuple(range(40000))},
        {"go": False},
    ],
)
def test_wishes_that_cannot_be_sent(wants):
    with pytest.raises(LocalProtocolError):
        Wants(**wants)


def test_a_malformed_question_changes_nothing():
    handshake = reach(State.IDLE)
    with pytest.raises(LocalProtocolError):
        handshake.ask(Mode.GO, "a\0b")
    assert handshake.state is State.IDLE
    assert handshake.data_to_send() == b""


def test_data_behind_an_answer_is_found_by_the_next_question():
    handshake, _ = started(greeting(), **PLAIN)
    with pytest.raises(Refused):
        handshake.receive_data(reply(Option.GO, Reply.ERR_UNKNOWN) + b"x")
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        handshake.ask(Mode.GO)


# --- any split, any bytes --------------------------------------------------------------------

TALK = [
    greeting(FIXED),
    reply(Option.EXTENDED_HEADERS, Reply.ERR_UNSUP, b"what?"),
    ack(Option.STRUCTURED_REPLY),
    context(9) + ack(Option.SET_META_CONTEXT),
    info(export_info()) + info(block_info(1, 512, 1024)) + info(b"\0\x08zzz"),
    GO,
]


@given(st.lists(st.integers(0, sum(map(len, TALK))), max_size=12))
def test_any_split_of_the_same_bytes_comes_to_the_same(cuts):
    whole, expected = started(*TALK, queries=(ALLOCATION,))
    data = b"".join(TALK)
    handshake = ClientHandshake(Wants(queries=(ALLOCATION,)))
    events = []
    for start, end in pairwise([0, *sorted(cuts), len(data)]):
        events += handshake.receive_data(data[start:end])
    assert expected == events
    assert whole.data_to_send() == handshake.data_to_send()


REPLIES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        reply,
        st.sampled_from(Option),
        st.sampled_from(Reply) | st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=30)
        | st.builds(
            lambda kind, rest: kind.to_bytes(2, "big") + rest,
            st.integers(0, 4),
            st.binary(max_size=16),
        ),
    ),
    st.sampled_from([*TALK, *(ack(option) for option in Option)]),
)


@settings(max_examples=500)
@given(
    st.sampled_from([b"", greeting(), greeting(FIXED), greeting(0)]),
    st.lists(REPLIES, max_size=12),
    st.builds(
        Wants,
        mode=st.sampled_from(Mode),
        tls=st.sampled_from(TlsPolicy),
        structured=st.booleans(),
        extended=st.booleans(),
        queries=st.sampled_from([(), (ALLOCATION,)]),
    ),
)
def test_whatever_a_server_says_is_an_answer_or_a_protocol_error(hello, replies, wants):
    handshake = ClientHandshake(wants)
    for data in [hello, *replies]:
        try:
            events = handshake.receive_data(data)
        except Refused:
            assert handshake.state in {State.IDLE, State.DENIED, State.FAILED}
            return
        except RemoteProtocolError:
            assert handshake.state is State.FAILED
            return
        for event in events:
            if isinstance(event, StartTls):
                handshake.tls_started()
            elif isinstance(event, Negotiated):
                assert 0 <= event.size < 1 << 63
                assert event.tls or wants.tls is not TlsPolicy.REQUIRE
