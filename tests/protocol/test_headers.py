"""The precompiled frames are byte-equal with their construct twins, in both directions.

::

    headers.REQUEST            key cookie offset length               structs.Request
    headers.EXTENDED_REQUEST   key cookie offset length               structs.ExtendedRequest
    headers.SIMPLE_REPLY       magic error cookie                     structs.SimpleReply
    headers.SIMPLE_WORDS       SIMPLE_OK cookie                       structs.SimpleReply, no error
    headers.STRUCTURED_HEADER  key cookie length                      structs.StructuredChunk
    headers.EXTENDED_HEADER    key cookie offset length               structs.ExtendedChunk
    headers.SERVER_REPLY       magic option reply length name-length  OptionReplyHeader, ServerReply
    headers.STRUCTURED_DATA    key cookie length data-offset          StructuredChunk, OffsetData
    headers.EXTENDED_DATA      key cookie offset length data-offset   ExtendedChunk, OffsetData
"""

from collections.abc import Callable
from struct import Struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import headers, structs
from protocol.constants import Command, CommandFlag, Option, Reply, ReplyFlag, ReplyType
from protocol.handshake.options import server_reply

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)

Key = Callable[[int, int], int]


def twins_agree(frame: Struct, twin: Any, key: Key, fields: dict[str, int]) -> None:
    """Both build the same bytes, and each takes apart what the other has built."""
    built = twin.build(fields)
    words = (key(fields["type"], fields["flags"]), *list(fields.values())[2:])
    assert built == frame.pack(*words)
    assert words == frame.unpack(built)
    parsed = twin.parse(frame.pack(*words))
    assert fields == {name: parsed[name] for name in fields}
    assert twin.sizeof() == frame.size


@given(U16, U16, U64, U64, U32)
def test_request(kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
    fields = {"type": kind, "flags": flags, "cookie": cookie, "offset": offset, "length": length}
    twins_agree(headers.REQUEST, structs.Request, headers.request_key, fields)


@given(U16, U16, U64, U64, U64)
def test_extended_request(kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
    fields = {"type": kind, "flags": flags, "cookie": cookie, "offset": offset, "length": length}
    key = headers.extended_request_key
    twins_agree(headers.EXTENDED_REQUEST, structs.ExtendedRequest, key, fields)


@given(U16, U16, U64, U32)
def test_structured_header(kind: int, flags: int, cookie: int, length: int) -> None:
    fields = {"type": kind, "flags": flags, "cookie": cookie, "length": length}
    twins_agree(headers.STRUCTURED_HEADER, structs.StructuredChunk, headers.chunk_key, fields)


@given(U16, U16, U64, U64, U64)
def test_extended_header(kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
    fields = {"type": kind, "flags": flags, "cookie": cookie, "offset": offset, "length": length}
    key = headers.extended_chunk_key
    twins_agree(headers.EXTENDED_HEADER, structs.ExtendedChunk, key, fields)


@given(U32, U64)
def test_simple_reply(error: int, cookie: int) -> None:
    built = structs.SimpleReply.build({"error": error, "cookie": cookie})
    magic = headers.SIMPLE_OK >> 32
    assert built == headers.SIMPLE_REPLY.pack(magic, error, cookie)
    assert (magic, error, cookie) == headers.SIMPLE_REPLY.unpack(built)
    assert structs.SimpleReply.sizeof() == headers.SIMPLE_REPLY.size


@given(U64)
def test_simple_reply_without_error_as_two_words(cookie: int) -> None:
    built = structs.SimpleReply.build({"error": 0, "cookie": cookie})
    assert built == headers.SIMPLE_WORDS.pack(headers.SIMPLE_OK, cookie)
    assert (headers.SIMPLE_OK, cookie) == headers.SIMPLE_WORDS.unpack(built)


@given(U16, U16, U64, U32, U64)
def test_structured_data(kind: int, flags: int, cookie: int, length: int, offset: int) -> None:
    chunk = {"type": kind, "flags": flags, "cookie": cookie, "length": length}
    payload = structs.OffsetData.build({"offset": offset, "data": b""})
    built = structs.StructuredChunk.build(chunk) + payload
    words = (headers.chunk_key(kind, flags), cookie, length, offset)
    assert built == headers.STRUCTURED_DATA.pack(*words)
    assert words == headers.STRUCTURED_DATA.unpack(built)


@given(U16, U16, U64, U64, U64, U64)
def test_extended_data(
    kind: int, flags: int, cookie: int, at: int, length: int, offset: int
) -> None:
    chunk = {"type": kind, "flags": flags, "cookie": cookie, "offset": at, "length": length}
    payload = structs.OffsetData.build({"offset": offset, "data": b""})
    built = structs.ExtendedChunk.build(chunk) + payload
    words = (headers.extended_chunk_key(kind, flags), cookie, at, length, offset)
    assert built == headers.EXTENDED_DATA.pack(*words)
    assert words == headers.EXTENDED_DATA.unpack(built)


DONE = ReplyFlag.DONE
KEYS = {
    "READ_KEY": (structs.Request, Command.READ, 0),
    "WRITE_KEY": (structs.Request, Command.WRITE, 0),
    "EXTENDED_READ_KEY": (structs.ExtendedRequest, Command.READ, 0),
    "EXTENDED_WRITE_KEY": (structs.ExtendedRequest, Command.WRITE, CommandFlag.PAYLOAD_LEN),
    "DATA_KEY": (structs.StructuredChunk, ReplyType.OFFSET_DATA, 0),
    "DATA_DONE_KEY": (structs.StructuredChunk, ReplyType.OFFSET_DATA, DONE),
    "DONE_KEY": (structs.StructuredChunk, ReplyType.NONE, DONE),
    "EXTENDED_DATA_KEY": (structs.ExtendedChunk, ReplyType.OFFSET_DATA, 0),
    "EXTENDED_DATA_DONE_KEY": (structs.ExtendedChunk, ReplyType.OFFSET_DATA, DONE),
    "EXTENDED_DONE_KEY": (structs.ExtendedChunk, ReplyType.NONE, DONE),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_the_first_eight_bytes_of_its_frame(name: str) -> None:
    twin, kind, flags = KEYS[name]
    fields = {"flags": flags, "type": kind, "cookie": 0, "offset": 0, "length": 0}
    assert twin.build(fields)[:8] == getattr(headers, name).to_bytes(8, "big")


def test_every_key_and_every_frame_is_proven() -> None:
    frames = {name for name in vars(headers) if isinstance(getattr(headers, name), Struct)}
    listed = {line.split()[0][8:] for line in (__doc__ or "").splitlines() if "headers." in line}
    assert frames == listed
    assert set(KEYS) == {name for name in vars(headers) if name.endswith("_KEY")}


def test_exported_names_exist() -> None:
    assert set(headers.__all__) <= set(vars(headers))


@given(U16, U16, st.integers(0, 2**32 - 1))
def test_only_the_right_magic_makes_a_key(kind: int, flags: int, magic: int) -> None:
    """One comparison with READ_KEY checks magic, flags and type at once."""
    key = magic << 32 | flags << 16 | kind
    plain = magic == 0x25609513 and not flags and kind == Command.READ
    assert plain == (key == headers.READ_KEY)


@given(st.text(max_size=50), st.text(max_size=50))
def test_server_reply(name: str, description: str) -> None:
    encoded, text = name.encode(), description.encode()
    data = structs.ServerReply.build(
        {"name": {"length": len(encoded), "data": encoded}, "description": text}
    )
    head = {"option": Option.LIST, "reply": Reply.SERVER, "length": len(data)}
    assert server_reply(name, description) == structs.OptionReplyHeader.build(head) + data
