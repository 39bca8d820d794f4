"""The client's transmission phase against scripted servers.

The servers' bytes are built with construct from ``structs``, not with the code under test.
"""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import structs
from protocol.answers import Data, Done, Failed, Hole, Status
from protocol.connection import ClientConnection
from protocol.constants import Command, CommandFlag, Dialect, Errno, ReplyType, TransmissionFlag
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.incoming import Payload
from protocol.payloads import STATUS_EXT_EXTENT, STATUS_EXTENT
from protocol.terms import BlockSizes, Negotiated

SIZE = 1 << 30
ALL = TransmissionFlag(sum(TransmissionFlag)) & ~TransmissionFlag.READ_ONLY
CONTEXTS = {1: "base:allocation", 7: "qemu:dirty-bitmap:b"}
SIMPLE, STRUCTURED, EXTENDED = Dialect.SIMPLE, Dialect.STRUCTURED, Dialect.EXTENDED
CHUNKED = (STRUCTURED, EXTENDED)
NONE, DATA, HOLE = ReplyType.NONE, ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE
STATUS, STATUS_EXT = ReplyType.BLOCK_STATUS, ReplyType.BLOCK_STATUS_EXT
ERROR, ERROR_OFFSET = ReplyType.ERROR, ReplyType.ERROR_OFFSET


def connection(dialect=STRUCTURED, **terms):
    defaults = {"export": "", "size": SIZE, "flags": ALL, "contexts": CONTEXTS}
    return ClientConnection(Negotiated(**{**defaults, "dialect": dialect, **terms}))


def simple(cookie, error=0, data=b""):
    return structs.SimpleReply.build({"error": error, "cookie": cookie}) + data


class Server:
    """Builds the chunks of one dialect, remembering the offsets extended headers repeat."""

    def __init__(self, dialect, offsets=None):
        self.dialect = dialect
        self.offsets = offsets or {}

    def chunk(self, cookie, kind, payload=b"", *, done=False, length=None, flags=0):
        fields = {
            "flags": flags | done,
            "type": kind,
            "cookie": cookie,
            "length": len(payload) if length is None else length,
        }
        if self.dialect is STRUCTURED:
            return structs.StructuredChunk.build(fields) + payload
        offset = self.offsets.get(cookie, 0)
        return structs.ExtendedChunk.build({**fields, "offset": offset}) + payload

    def data(self, cookie, offset, data, *, done=False):
        payload = structs.OffsetData.build({"offset": offset, "data": data})
        return self.chunk(cookie, DATA, payload, done=done)

    def hole(self, cookie, offset, length, *, done=False):
        payload = structs.OffsetHole.build({"offset": offset, "length": length})
        return self.chunk(cookie, HOLE, payload, done=done)

    def status(self, cookie, context, extents, *, done=False):
        listed = [{"length": length, "flags": flags} for length, flags in extents]
        if self.dialect is STRUCTURED:
            payload = structs.BlockStatus.build({"context": context, "extents": listed})
            return self.chunk(cookie, STATUS, payload, done=done)
        fields = {"context": context, "count": len(listed), "extents": listed}
        return self.chunk(cookie, STATUS_EXT, structs.BlockStatusExt.build(fields), done=done)

    def error(self, cookie, errno, text=b"", *, done=True):
        fields = {"error": errno, "text_length": len(text), "text": text}
        return self.chunk(cookie, ERROR, structs.ErrorChunk.build(fields), done=done)

    def error_offset(self, cookie, errno, offset, text=b"", *, done=False):
        fields = {"error": errno, "text_length": len(text), "text": text, "offset": offset}
        return self.chunk(cookie, ERROR_OFFSET, structs.ErrorOffsetChunk.build(fields), done=done)

    def done(self, cookie):
        return self.chunk(cookie, NONE, done=True)


def settled(answers):
    """Answers with the pieces of a chunk joined, and views turned into bytes."""
    joined = []
    for answer in answers:
        if isinstance(answer, Data):
            last = joined[-1] if joined else None
            data = bytes(answer.data)
            if (
                isinstance(last, tuple)
                and last[0] == answer.cookie
                and last[1] + len(last[2]) == answer.offset
            ):
                joined[-1] = (*last[:2], last[2] + data)
            else:
                joined.append((answer.cookie, answer.offset, data))
        else:
            joined.append(answer)
    return joined


# --- requests --------------------------------------------------------------------------------

REQUESTS = [
    (lambda c: c.read(512, 1024), Command.READ, 0, 512, 1024),
    (lambda c: c.read(512, 1024, unfragmented=True), Command.READ, CommandFlag.DF, 512, 1024),
    (lambda c: c.write(0, 5), Command.WRITE, 0, 0, 5),
    (lambda c: c.write(0, 5, fua=True), Command.WRITE, CommandFlag.FUA, 0, 5),
    (lambda c: c.flush(), Command.FLUSH, 0, 0, 0),
    (lambda c: c.trim(SIZE - 1, 1, fua=True), Command.TRIM, CommandFlag.FUA, SIZE - 1, 1),
    (lambda c: c.cache(0, SIZE), Command.CACHE, 0, 0, SIZE),
    (
        lambda c: c.write_zeroes(1, 2, fua=True, no_hole=True, fast=True),
        Command.WRITE_ZEROES,
        CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        1,
        2,
    ),
    (lambda c: c.block_status(0, SIZE), Command.BLOCK_STATUS, 0, 0, SIZE),
    (
        lambda c: c.block_status(0, 7, one=True),
        Command.BLOCK_STATUS,
        CommandFlag.REQ_ONE,
        0,
        7,
    ),
]


@pytest.mark.parametrize(("call", "command", "flags", "offset", "length"), REQUESTS)
def test_requests_on_the_wire(call, command, flags, offset, length):
    fields = {"type": command, "offset": offset, "length": length}
    compact = connection()
    cookie, sent = call(compact)
    assert structs.Request.build({**fields, "flags": flags, "cookie": cookie}) == sent
    assert (cookie,) == compact.inflight
    cookie, sent = call(connection(EXTENDED))
    if command is Command.WRITE:
        flags |= CommandFlag.PAYLOAD_LEN
    assert structs.ExtendedRequest.build({**fields, "flags": flags, "cookie": cookie}) == sent


def test_status_payload_names_the_contexts():
    cookie, sent = connection(EXTENDED).block_status(4096, 1 << 20, contexts=[7])
    header = structs.ExtendedRequest.parse(sent)
    assert (header.type, header.flags) == (Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN)
    assert (cookie, 4096, 12) == (header.cookie, header.offset, header.length)
    payload = structs.StatusPayload.parse(sent[32:])
    assert (payload.length, list(payload.contexts)) == (1 << 20, [7])


def test_disconnect_is_the_last_thing_sent():
    client = connection()
    assert structs.Request.parse(client.disconnect()).type == Command.DISC
    for call in (client.flush, client.disconnect, lambda: client.read(0, 1)):
        with pytest.raises(LocalProtocolError, match="ended"):
            call()


READ_ONLY = ALL | TransmissionFlag.READ_ONLY
TIGHT = BlockSizes(512, 4096, 65536)


@pytest.mark.parametrize(
    ("terms", "call"),
    [
        ({}, lambda c: c.read(0, 0)),
        ({}, lambda c: c.read(0, -1)),
        ({}, lambda c: c.read(-1, 1)),
        ({}, lambda c: c.read(SIZE, 1)),
        ({}, lambda c: c.read(SIZE - 1, 2)),
        ({}, lambda c: c.read(0, (32 << 20) + 1)),
        ({}, lambda c: c.write(0, (32 << 20) + 1)),
        ({}, lambda c: c.trim(0, SIZE + 1)),
        ({"size": 1 << 40}, lambda c: c.trim(0, 1 << 32)),
        ({"size": 1 << 40, "dialect": SIMPLE}, lambda c: c.write_zeroes(0, 1 << 32)),
        ({"blocks": TIGHT}, lambda c: c.read(1, 512)),
        ({"blocks": TIGHT}, lambda c: c.read(0, 513)),
        ({"blocks": TIGHT}, lambda c: c.write(0, 65536 + 512)),
        ({"blocks": TIGHT}, lambda c: c.block_status(256, 512)),
        ({"flags": READ_ONLY}, lambda c: c.write(0, 1)),
        ({"flags": READ_ONLY}, lambda c: c.trim(0, 1)),
        ({"flags": READ_ONLY}, lambda c: c.write_zeroes(0, 1)),
        ({"flags": ALL & ~TransmissionFlag.SEND_FLUSH}, lambda c: c.flush()),
        ({"flags": ALL & ~TransmissionFlag.SEND_TRIM}, lambda c: c.trim(0, 1)),
        ({"flags": ALL & ~TransmissionFlag.SEND_CACHE}, lambda c: c.cache(0, 1)),
        ({"flags": ALL & ~TransmissionFlag.SEND_WRITE_ZEROES}, lambda c: c.write_zeroes(0, 1)),
        ({"flags": ALL & ~TransmissionFlag.SEND_FUA}, lambda c: c.write(0, 1, fua=True)),
        ({"flags": ALL & ~TransmissionFlag.SEND_DF}, lambda c: c.read(0, 1, unfragmented=True)),
        (
            {"flags": ALL & ~TransmissionFlag.SEND_FAST_ZERO},
            lambda c: c.write_zeroes(0, 1, fast=True),
        ),
        (
            {"flags": ALL & ~TransmissionFlag.BLOCK_STATUS_PAYLOAD},
            lambda c: c.block_status(0, 1, contexts=[1]),
        ),
        ({"contexts": {}}, lambda c: c.block_status(0, 1)),
        ({}, lambda c: c.block_status(0, 1, contexts=[])),
        ({}, lambda c: c.block_status(0, 1, contexts=[2])),
    ],
)
def test_what_was_not_offered_is_not_sent(terms, call):
    client = connection(**terms)
    with pytest.raises(LocalProtocolError):
        call(client)
    assert client.inflight == ()


def test_long_requests_without_data_need_extended_headers():
    cookie, sent = connection(EXTENDED, size=1 << 40).block_status(0, 1 << 40)
    assert (cookie, 1 << 40) == (1, structs.ExtendedRequest.parse(sent).length)


# --- good answers ----------------------------------------------------------------------------


def test_simple_replies_out_of_order():
    client = connection(SIMPLE)
    first, _ = client.read(10, 4)
    second, _ = client.write(0, 4)
    third, _ = client.read(20, 2)
    answers = client.receive_data(
        simple(third, data=b"zz") + simple(second) + simple(first, data=b"abcd")
    )
    expected = [
        (third, 20, b"zz"),
        Done(third, None),
        Done(second, None),
        (first, 10, b"abcd"),
        Done(first, None),
    ]
    assert expected == settled(answers)
    assert client.inflight == ()


@pytest.mark.parametrize("dialect", CHUNKED)
def test_chunks_in_any_order_interleaved(dialect):
    client = connection(dialect)
    first, _ = client.read(1000, 100)
    second, _ = client.read(0, 2)
    server = Server(dialect, {first: 1000, second: 0})
    answers = client.receive_data(
        server.data(first, 1050, b"b" * 50)
        + server.data(second, 1, b"y")
        + server.hole(first, 1010, 40)
        + server.data(second, 0, b"x", done=True)
        + server.data(first, 1000, b"a" * 10)
        + server.done(first)
    )
    expected = [
        (first, 1050, b"b" * 50),
        (second, 1, b"y"),
        Hole(first, 1010, 40),
        (second, 0, b"x"),
        Done(second, None),
        (first, 1000, b"a" * 10),
        Done(first, None),
    ]
    assert expected == settled(answers)


@pytest.mark.parametrize("dialect", CHUNKED)
def test_block_status_of_two_contexts(dialect):
    client = connection(dialect)
    cookie, _ = client.block_status(4096, 8192)
    server = Server(dialect, {cookie: 4096})
    high = 3 << 40 if dialect is EXTENDED else 3
    answers = client.receive_data(
        server.status(cookie, 7, [(4096, high), (4095, 0), (1 << 20, 1)])
        + server.status(cookie, 1, [(512, 0)], done=True)
    )
    # Flags of more than 32 bits are what they are (libnbd's CVE-2023-5871 was an assertion).
    expected = [
        Status(cookie, 7, ((4096, high), (4095, 0), (1 << 20, 1))),
        Status(cookie, 1, ((512, 0),)),
        Done(cookie, None),
    ]
    assert expected == answers


def test_block_status_of_a_chosen_context():
    client = connection(EXTENDED)
    cookie, _ = client.block_status(0, 512, contexts=[7])
    server = Server(EXTENDED)
    answers = client.receive_data(server.status(cookie, 7, [(512, 1)], done=True))
    assert [Status(cookie, 7, ((512, 1),)), Done(cookie, None)] == answers
    cookie, _ = client.block_status(0, 512, contexts=[7])
    with pytest.raises(RemoteProtocolError, match="context 1"):
        client.receive_data(server.status(cookie, 1, [(512, 1)], done=True))


def test_the_last_extent_ends_where_the_export_does():
    client = connection(size=1000, contexts={1: "base:allocation"})
    cookie, _ = client.block_status(500, 500)
    answers = client.receive_data(
        Server(STRUCTURED).status(cookie, 1, [(400, 0), (0xFFFFFFFF, 3)], done=True)
    )
    assert Status(cookie, 1, ((400, 0), (100, 3))) == answers[0]


@pytest.mark.parametrize("dialect", CHUNKED)
def test_errors_with_words_and_places(dialect):
    client = connection(dialect)
    cookie, _ = client.read(100, 100)
    server = Server(dialect, {cookie: 100})
    answers = client.receive_data(
        server.data(cookie, 100, b"a" * 50)
        + server.error_offset(cookie, Errno.EIO, 120, b"bad \x1b[2J\nsector")
        + server.error_offset(cookie, 9999, 199)
        + server.data(cookie, 150, b"b" * 49)
        + server.done(cookie)
    )
    first = Failed(
        cookie,
        Errno.EIO,
        "bad \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}sector",
        120,
    )
    expected = [
        (cookie, 100, b"a" * 50),
        first,
        Failed(cookie, Errno.EINVAL, "", 199),
        (cookie, 150, b"b" * 49),
        Done(cookie, first),
    ]
    assert expected == settled(answers)


@pytest.mark.parametrize("dialect", CHUNKED)
def test_an_unknown_error_chunk_fails_just_that_request(dialect):
    client = connection(dialect)
    cookie, _ = client.read(0, 4)
    other, _ = client.flush()
    server = Server(dialect)
    payload = structs.ErrorChunk.build({"error": 5, "text_length": 2, "text": b"hm"}) + b"more"
    failure = Failed(cookie, Errno.EIO, "hm", None)
    answers = client.receive_data(server.chunk(cookie, 0x8003, payload, done=True))
    assert [failure, Done(cookie, failure)] == answers
    assert [Done(other, None)] == client.receive_data(server.done(other))


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("errno", [*Errno][1:])
def test_each_error_number(dialect, errno):
    client = connection(dialect)
    cookie, _ = client.trim(0, 4)
    reply = simple(cookie, errno) if dialect is SIMPLE else Server(dialect).error(cookie, errno)
    failure = Failed(cookie, errno, "", None)
    assert [failure, Done(cookie, failure)] == client.receive_data(reply)
    assert client.leaving is (errno is Errno.ESHUTDOWN)
    if client.leaving:
        with pytest.raises(LocalProtocolError, match="shutting down"):
            client.flush()
        client.disconnect()
        client.eof()


def test_simple_replies_to_what_needs_no_chunks_after_structured_reply():
    client = connection()
    flush, _ = client.flush()
    status, _ = client.block_status(0, 1)
    answers = client.receive_data(simple(flush) + simple(status, Errno.EIO))
    failure = Failed(status, Errno.EIO, "", None)
    assert [Done(flush, None), failure, Done(status, failure)] == answers


def test_unknown_reply_flags_are_ignored():
    client = connection()
    cookie, _ = client.flush()
    reply = Server(STRUCTURED).chunk(cookie, NONE, done=True, flags=0xFFFE)
    assert [Done(cookie, None)] == client.receive_data(reply)


def test_the_shell_may_read_data_to_where_it_belongs():
    client = connection()
    cookie, _ = client.read(4096, 8)
    reply = Server(STRUCTURED).data(cookie, 4096, b"abcdefgh", done=True)
    assert client.payload is None
    assert client.receive_data(reply[:28]) == []
    assert Payload(cookie, 4096, 8) == client.payload
    assert client.payload_received(3) == []
    with pytest.raises(LocalProtocolError):
        client.payload_received(6)
    assert [(cookie, 4099, b"de")] == settled(client.receive_data(b"de"))
    assert Payload(cookie, 4101, 3) == client.payload
    assert [Done(cookie, None)] == client.payload_received(3)
    assert client.payload is None
    with pytest.raises(LocalProtocolError):
        client.payload_received(1)


def test_data_is_passed_on_and_not_kept():
    client = connection()
    cookie, _ = client.read(0, 32 << 20)
    reply = Server(STRUCTURED).data(cookie, 0, b"", done=True)[:16] + (8 + (32 << 20)).to_bytes(4)
    client.receive_data(reply + bytes(8))
    buffer = bytearray(1 << 20)
    for number in range(32):
        [piece, *rest] = client.receive_data(buffer)
        assert piece.data.obj is buffer
        assert piece.offset == number << 20
    assert [Done(cookie, None)] == rest


# --- hostile answers -------------------------------------------------------------------------


def reading(server, cookie):
    """Chunks that must not answer READ 1000+100."""
    data, hole, chunk = server.data, server.hole, server.chunk
    whole = data(cookie, 1000, bytes(100))
    return {
        "before": data(cookie, 999, bytes(100)),
        "behind": data(cookie, 1001, bytes(100)),
        "far": data(cookie, 1 << 63, b"x"),
        "wrapping": data(cookie, (1 << 64) - 1, b"xx"),
        "too long": data(cookie, 1000, bytes(101)),
        "length 4 GiB": chunk(cookie, DATA, bytes(8), length=0xFFFFFFFF),
        "no data": data(cookie, 1000, b""),
        "no offset": chunk(cookie, DATA, b"abc"),
        "hole before": hole(cookie, 999, 1),
        "hole behind": hole(cookie, 1100, 1),
        "hole too long": hole(cookie, 1000, 0xFFFFFFFF),
        "empty hole": hole(cookie, 1000, 0),
        "long hole chunk": chunk(cookie, HOLE, bytes(13)),
        "short hole chunk": chunk(cookie, HOLE, bytes(11)),
        "same twice": whole + whole,
        "overlap left": data(cookie, 1050, b"xx") + data(cookie, 1049, b"xx"),
        "overlap right": data(cookie, 1050, b"xx") + data(cookie, 1051, b"xx"),
        "overlap inside": data(cookie, 1050, b"xxx") + hole(cookie, 1051, 1),
        "overlap around": hole(cookie, 1050, 1) + data(cookie, 1000, bytes(100)),
        "overlap between": hole(cookie, 1000, 10) + hole(cookie, 1020, 9) + hole(cookie, 1009, 12),
        "after its error": server.error_offset(cookie, 5, 1050) + whole,
        "error before": server.error_offset(cookie, 5, 999),
        "error behind": server.error_offset(cookie, 5, 1100),
        "nothing": server.done(cookie),
        "one byte missing": data(cookie, 1000, bytes(99), done=True),
        "middle missing": hole(cookie, 1000, 49) + hole(cookie, 1050, 50) + server.done(cookie),
        "none without done": chunk(cookie, NONE),
        "none with payload": chunk(cookie, NONE, b"x", done=True),
        "status": server.status(cookie, 1, [(100, 0)], done=True),
        "unknown chunk": chunk(cookie, 3, done=True),
        "unknown chunk with payload": chunk(cookie, 0x7FFF, b"abc"),
        "other status": chunk(cookie, STATUS if server.dialect is EXTENDED else STATUS_EXT),
        "error 0": server.error(cookie, 0),
        "short error": chunk(cookie, ERROR, bytes(5)),
        "short error with offset": chunk(cookie, ERROR_OFFSET, bytes(13)),
        "short unknown error": chunk(cookie, 0xFFFF, bytes(5)),
        "text longer than chunk": chunk(cookie, ERROR, b"\0\0\0\5\0\2x"),
        "text over the offset": chunk(cookie, ERROR_OFFSET, b"\0\0\0\5\0\1" + bytes(8)),
        "text over 4096": server.error(cookie, 5, b"x" * 4097),
        "error of 4 GiB": chunk(cookie, ERROR, length=0xFFFFFFFF),
        "unknown error of 4 GiB": chunk(cookie, 0x8123, length=0xFFFFFFFF),
        "cookie of nobody": server.done(cookie + 1),
        "cookie 0": server.done(0),
    }


NAMES = list(reading(Server(STRUCTURED), 1))


@pytest.mark.parametrize("dialect", CHUNKED)
@pytest.mark.parametrize("name", NAMES)
def test_what_must_not_answer_a_read(dialect, name):
    client = connection(dialect)
    cookie, _ = client.read(1000, 100)
    reply = reading(Server(dialect, {cookie: 1000}), cookie)[name]
    with pytest.raises(RemoteProtocolError) as caught:
        client.receive_data(reply)
    assert client.inflight  # not answered, whatever it was
    with pytest.raises(LocalProtocolError, match="broken"):
        client.flush()
    with pytest.raises(RemoteProtocolError, match=re.escape(str(caught.value))):
        client.receive_data(b"")


@pytest.mark.parametrize("dialect", CHUNKED)
@pytest.mark.parametrize("length", [0, 8, 109, 0xFFFFFFFF])
def test_a_data_chunk_is_judged_by_its_header_alone(dialect, length):
    client = connection(dialect)
    cookie, _ = client.read(1000, 100)
    with pytest.raises(RemoteProtocolError, match="OFFSET_DATA"):
        client.receive_data(Server(dialect, {cookie: 1000}).chunk(cookie, DATA, length=length))


@pytest.mark.parametrize("dialect", CHUNKED)
def test_an_unfragmented_read_takes_one_chunk(dialect):
    client = connection(dialect)
    cookie, _ = client.read(0, 8, unfragmented=True)
    server = Server(dialect)
    with pytest.raises(RemoteProtocolError, match="DF"):
        client.receive_data(server.data(cookie, 0, b"abcd") + server.data(cookie, 4, b"abcd"))


@pytest.mark.parametrize("dialect", CHUNKED)
def test_a_cookie_is_answered_once(dialect):
    client = connection(dialect)
    cookie, _ = client.flush()
    reply = Server(dialect).done(cookie)
    assert [Done(cookie, None)] == client.receive_data(reply)
    with pytest.raises(RemoteProtocolError, match="awaits none"):
        client.receive_data(reply)


def test_a_simple_reply_comes_once_too_and_leaves_what_was_complete():
    client = connection(SIMPLE)
    cookie, _ = client.read(0, 2)
    with pytest.raises(RemoteProtocolError, match="awaits none"):
        client.receive_data(simple(cookie, data=b"ab") + simple(cookie, data=b"cd"))
    assert [(cookie, 0, b"ab"), Done(cookie, None)] == settled(client.salvaged)


@pytest.mark.parametrize("dialect", CHUNKED)
@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.write(0, 4),
        lambda c: c.flush(),
        lambda c: c.trim(0, 4),
        lambda c: c.cache(0, 4),
        lambda c: c.write_zeroes(0, 4),
        lambda c: c.block_status(0, 4),
    ],
)
def test_data_for_what_is_not_a_read(dialect, call):
    for build in (lambda s, n: s.data(n, 0, b"abcd"), lambda s, n: s.hole(n, 0, 4)):
        client = connection(dialect)
        cookie, _ = call(client)
        with pytest.raises(RemoteProtocolError, match="invalid answer"):
            client.receive_data(build(Server(dialect), cookie))


@pytest.mark.parametrize(
    ("dialect", "call", "reply"),
    [
        (STRUCTURED, lambda c: c.read(0, 1), lambda n: simple(n, data=b"x")),
        (STRUCTURED, lambda c: c.read(0, 1), lambda n: simple(n, 5)),
        (STRUCTURED, lambda c: c.block_status(0, 1), simple),
        (EXTENDED, lambda c: c.flush(), lambda n: simple(n) + bytes(16)),
        (EXTENDED, lambda c: c.flush(), lambda n: Server(STRUCTURED).done(n) + bytes(12)),
        (STRUCTURED, lambda c: c.flush(), lambda n: Server(EXTENDED).done(n)),
        (SIMPLE, lambda c: c.flush(), lambda n: Server(STRUCTURED).done(n)),
        (SIMPLE, lambda c: c.flush(), lambda n: Server(EXTENDED).done(n)),
        (SIMPLE, lambda c: c.flush(), lambda _: b"\x96\x74\x46\x68" + bytes(12)),
        (SIMPLE, lambda c: c.flush(), lambda n: simple(n + 1)),
        (EXTENDED, lambda c: c.read(4, 4), lambda n: Server(EXTENDED, {n: 5}).error(n, 5)),
        (EXTENDED, lambda c: c.flush(), lambda n: Server(EXTENDED, {n: 1}).done(n)),
        (
            EXTENDED,
            lambda c: c.flush(),
            lambda n: Server(EXTENDED).chunk(n, ERROR, length=(1 << 64) - 1),
        ),
    ],
)
def test_replies_of_another_dialect(dialect, call, reply):
    client = connection(dialect)
    cookie, _ = call(client)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(reply(cookie))


def status_lies(server, cookie):
    """Chunks that must not answer BLOCK_STATUS 1000+100 with REQ_ONE unset."""
    fixed, each = (4, 8) if server.dialect is STRUCTURED else (8, 16)
    kind = STATUS if server.dialect is STRUCTURED else STATUS_EXT
    lies = {
        "unknown context": server.status(cookie, 2, [(100, 0)]),
        "same context twice": server.status(cookie, 1, [(100, 0)]) * 2,
        "a context missing": server.status(cookie, 1, [(100, 0)], done=True),
        "no context": server.done(cookie),
        "no extents": server.status(cookie, 1, []),
        "empty extent": server.status(cookie, 1, [(0, 0)]),
        "empty among others": server.status(cookie, 1, [(5, 0), (0, 0), (5, 1)]),
        "extent behind the end": server.status(cookie, 1, [(100, 0), (1, 1)]),
        "huge extent in between": server.status(cookie, 1, [(0xFFFFFFFF, 0), (1, 1)]),
        "more extents than bytes": server.status(cookie, 1, [(1, n) for n in range(101)]),
        "half an extent": server.chunk(cookie, kind, bytes(fixed + each + 4)),
        "length 4 GiB": server.chunk(cookie, kind, length=0xFFFFFFFC),
        "data": server.data(cookie, 1000, b"x"),
    }
    other = STRUCTURED if server.dialect is EXTENDED else EXTENDED
    foreign = Server(other).status(cookie, 1, [(100, 0)])[32 if other is EXTENDED else 20 :]
    lies["the other width"] = server.chunk(cookie, STATUS + STATUS_EXT - kind, foreign)
    if server.dialect is EXTENDED:
        payload = structs.BlockStatusExt.build(
            {"context": 1, "count": 2, "extents": [{"length": 100, "flags": 0}]}
        )
        lies["count"] = server.chunk(cookie, kind, payload)
        lies["huge count"] = server.chunk(cookie, kind, b"\0\0\0\1\xff\xff\xff\xff" + bytes(16))
        lies["2^64 sum"] = server.status(cookie, 1, [((1 << 64) - 1, 0), ((1 << 64) - 1, 0)])
    return lies


@pytest.mark.parametrize(
    ("dialect", "name"),
    [(dialect, name) for dialect in CHUNKED for name in status_lies(Server(dialect), 1)],
)
def test_what_must_not_answer_a_block_status(dialect, name):
    client = connection(dialect)
    cookie, _ = client.block_status(1000, 100)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(status_lies(Server(dialect, {cookie: 1000}), cookie)[name])


@pytest.mark.parametrize("extents", [[(5, 0), (5, 1)], [(11, 0)]])
def test_one_extent_means_one_within_the_request(extents):
    client = connection()
    cookie, _ = client.block_status(0, 10, one=True)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(Server(STRUCTURED).status(cookie, 1, extents))


def test_no_more_extents_than_the_specification_has_room_for():
    client = connection(EXTENDED, size=1 << 40, contexts={1: "base:allocation"})
    cookie, _ = client.block_status(0, 1 << 40)
    server = Server(EXTENDED)
    most = b"\0\0\0\1\0\x10\0\0" + b"\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\0" * (1 << 20)
    [status, _] = client.receive_data(server.chunk(cookie, STATUS_EXT, most, done=True))
    assert len(status.extents) == 1 << 20
    cookie, _ = client.block_status(0, 1 << 40)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(server.chunk(cookie, STATUS_EXT, length=8 + 16 * ((1 << 20) + 1)))


def test_a_reply_shattered_beyond_reason():
    client = connection()
    cookie, _ = client.read(0, 1 << 20)
    server = Server(STRUCTURED)
    shards = b"".join(server.hole(cookie, offset, 1) for offset in range(0, 1 << 18, 2))
    with pytest.raises(RemoteProtocolError, match="separate chunks"):
        client.receive_data(shards)


def test_errors_without_end():
    client = connection()
    cookie, _ = client.flush()
    with pytest.raises(RemoteProtocolError, match="error chunks"):
        client.receive_data(Server(STRUCTURED).error(cookie, 5, done=False) * ((1 << 16) + 1))


@pytest.mark.parametrize("dialect", Dialect)
def test_data_nobody_asked_for(dialect):
    with pytest.raises(RemoteProtocolError):
        connection(dialect).receive_data(bytes(32))


# --- death -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", Dialect)
def test_the_servers_death_at_every_byte(dialect):
    server = Server(dialect)
    reply = simple(1, data=b"abcd") if dialect is SIMPLE else server.data(1, 0, b"abcd", done=True)
    for cut in range(len(reply)):
        client = connection(dialect)
        client.read(0, 4)
        client.receive_data(reply[:cut])
        with pytest.raises(RemoteProtocolError, match="1 requests unanswered") as caught:
            client.eof()
        where = "" if cut == 0 else "bytes of data short at" if cut >= len(reply) - 4 else "within"
        assert where in str(caught.value)
    client = connection(dialect)
    client.read(0, 4)
    client.receive_data(reply)
    with pytest.raises(RemoteProtocolError, match=r"server closed the connection$"):
        client.eof()


def test_the_end_after_disconnect():
    client = connection()
    cookie, _ = client.flush()
    client.disconnect()
    assert [Done(cookie, None)] == client.receive_data(Server(STRUCTURED).done(cookie))
    client.eof()
    owed = connection()
    owed.flush()
    owed.disconnect()
    with pytest.raises(RemoteProtocolError, match="1 requests unanswered"):
        owed.eof()


# --- any split, any bytes, any order ---------------------------------------------------------


def conversation(dialect):
    """One of everything; the client, and what the server says to it."""
    client = connection(dialect)
    read, _ = client.read(100, 300)
    broken, _ = client.read(0, 10)
    write, _ = client.write(0, 4)
    if dialect is SIMPLE:
        return client, simple(write) + simple(read, data=b"r" * 300) + simple(broken, 5)
    status, _ = client.block_status(0, 4096)
    server = Server(dialect, {read: 100})
    return client, b"".join(
        [
            server.data(read, 200, b"b" * 200),
            server.status(status, 7, [(100, 1), (4000, 0)]),
            server.error_offset(broken, 5, 4, b"bad sector"),
            server.hole(read, 100, 50),
            server.done(write),
            server.status(status, 1, [(4096, 3)], done=True),
            server.data(read, 150, b"a" * 50, done=True),
            server.done(broken),
        ]
    )


@pytest.mark.parametrize("dialect", Dialect)
@settings(max_examples=150)
@given(cuts=st.lists(st.integers(0, 800), max_size=20), one_by_one=st.booleans())
def test_any_split_of_the_same_bytes_comes_to_the_same(dialect, cuts, one_by_one):
    client, said = conversation(dialect)
    expected = settled(client.receive_data(said))
    client, said = conversation(dialect)
    at = range(len(said)) if one_by_one else sorted(min(cut, len(said)) for cut in cuts)
    answers = []
    for start, end in pairwise([0, *at, len(said)]):
        answers = settled(answers + settled_pieces(client.receive_data(said[start:end])))
    assert expected == answers
    assert client.inflight == ()


def settled_pieces(answers):
    """Copies, as the buffer of a piece is gone with it."""
    return [
        Data(a.cookie, a.offset, memoryview(bytes(a.data))) if isinstance(a, Data) else a
        for a in answers
    ]


@st.composite
def chunkings(draw):
    """An export's contents, and one read of it cut and shuffled into chunks."""
    length = draw(st.integers(1, 400))
    offset = draw(st.integers(0, 1000))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=30)) | {0, length})
    ranges = draw(st.permutations([*pairwise(cuts)]))
    return offset, length, [(start, end, draw(st.booleans())) for start, end in ranges]


@pytest.mark.parametrize("dialect", CHUNKED)
@given(chunking=chunkings(), last=st.booleans())
def test_reassembly_is_the_read(dialect, chunking, last):
    offset, length, ranges = chunking
    contents = bytes(number % 251 + 1 for number in range(length))
    client = connection(dialect)
    cookie, _ = client.read(offset, length)
    server = Server(dialect, {cookie: offset})
    got = bytearray(contents)
    expected = bytearray(contents)
    for number, (start, end, is_hole) in enumerate(ranges):
        done = last and number == len(ranges) - 1
        got[start:end] = b"\xff" * (end - start)
        if is_hole:
            expected[start:end] = bytes(end - start)
            reply = server.hole(cookie, offset + start, end - start, done=done)
        else:
            reply = server.data(cookie, offset + start, contents[start:end], done=done)
        for answer in client.receive_data(reply):
            if isinstance(answer, Data):
                at = answer.offset - offset
                got[at : at + len(answer.data)] = answer.data
            elif isinstance(answer, Hole):
                at = answer.offset - offset
                got[at : at + answer.length] = bytes(answer.length)
    if not last:
        assert [Done(cookie, None)] == client.receive_data(server.done(cookie))
    assert client.inflight == ()
    assert expected == got


@pytest.mark.parametrize("dialect", CHUNKED)
@given(
    spans=st.lists(st.tuples(st.integers(-2, 60), st.integers(0, 20)), max_size=12),
)
def test_spans_are_kept_as_a_set_of_bytes_would(dialect, spans):
    """The interval list against the plainest model of it."""
    client = connection(dialect)
    cookie, _ = client.read(10, 50)
    server = Server(dialect, {cookie: 10})
    seen = set()
    for start, length in spans:
        offset = max(start + 10, 0)
        touched = set(range(offset, offset + length))
        legal = touched and touched <= set(range(10, 60)) and not touched & seen
        seen |= touched
        if not legal:
            with pytest.raises(RemoteProtocolError):
                client.receive_data(server.hole(cookie, offset, length))
            return
        assert [Hole(cookie, offset, length)] == client.receive_data(
            server.hole(cookie, offset, length)
        )
    if len(seen) == 50:
        assert [Done(cookie, None)] == client.receive_data(server.done(cookie))
    else:
        with pytest.raises(RemoteProtocolError):
            client.receive_data(server.done(cookie))


@pytest.mark.parametrize("dialect", Dialect)
@settings(max_examples=400)
@given(data=st.data())
def test_whatever_a_server_says_is_an_answer_or_a_protocol_error(dialect, data):
    client, said = conversation(dialect)
    requested = {(read, offset) for read in (1, 2) for offset in range(400)}
    mutated = bytearray(said)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    done = set()
    try:
        for answer in client.receive_data(mutated):
            assert answer.cookie not in done
            if isinstance(answer, Data):
                assert (answer.cookie, answer.offset) in requested
            if isinstance(answer, Done):
                done.add(answer.cookie)
    except RemoteProtocolError:
        assert all(cookie not in done for cookie in client.inflight)


@given(st.lists(st.tuples(st.integers(1, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)), max_size=5))
def test_extent_structs_are_the_reference_ones(extents):
    for codec, reference in (
        (STATUS_EXTENT, structs.BlockStatus),
        (STATUS_EXT_EXTENT, structs.BlockStatusExt),
    ):
        listed = [{"length": length, "flags": flags} for length, flags in extents]
        fields = {"context": 1, "count": len(listed), "extents": listed}
        built = reference.build(fields)
        packed = b"".join(codec.pack(*extent) for extent in extents)
        assert built.endswith(packed)
        assert len(built) - len(packed) == (4 if codec is STATUS_EXTENT else 8)
