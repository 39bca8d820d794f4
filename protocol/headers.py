"""The hot frames, precompiled.

A read request costs a Python server about four microseconds altogether, so its frames are
decoded and built with ``struct.Struct`` and with as few fields as will do. Neighbouring
fields that are constant or compared together are taken as one integer:

::

    request   | magic:4 flags:2 type:2 | cookie:8 | offset:8 | length:4 (8 if extended) |
              '------- key:8 ---------'
    chunk     | magic:4 flags:2 type:2 | cookie:8 | length:4 | offset:8 ...data

so a plain READ is recognised, and its magic checked, by one comparison with
``READ_KEY``, and its whole structured reply header is one ``pack_into``.

Rule: every Struct here has a twin in ``structs``; tests/protocol/test_headers.py proves them
equal for all field values.
"""

from struct import Struct

from protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    ReplyFlag,
    ReplyType,
)

__all__ = [
    "EXTENDED_DATA",
    "EXTENDED_HEADER",
    "EXTENDED_REQUEST",
    "REQUEST",
    "SERVER_REPLY",
    "SIMPLE_OK",
    "SIMPLE_REPLY",
    "STRUCTURED_DATA",
    "STRUCTURED_HEADER",
    "chunk_key",
    "extended_chunk_key",
    "extended_request_key",
    "request_key",
]

REQUEST = Struct(">QQQI")
"""key, cookie, offset, length."""
EXTENDED_REQUEST = Struct(">QQQQ")
"""key, cookie, offset, length."""

SERVER_REPLY = Struct(">QIIII")
"""magic, option, reply, length, length of the name; a repository is listed as thousands of them."""

SIMPLE_REPLY = Struct(">IIQ")
"""magic, error, cookie."""
SIMPLE_OK = SIMPLE_REPLY_MAGIC << 32
"""``SIMPLE_REPLY`` seen as two 64-bit words: this one, then the cookie."""
SIMPLE_WORDS = Struct(">QQ")
"""SIMPLE_OK, cookie."""

STRUCTURED_HEADER = Struct(">QQI")
"""key, cookie, payload length."""
EXTENDED_HEADER = Struct(">QQQQ")
"""key, cookie, request offset, payload length."""

STRUCTURED_DATA = Struct(">QQIQ")
"""key, cookie, payload length (data + 8), data offset; the data follows."""
EXTENDED_DATA = Struct(">QQQQQ")
"""key, cookie, request offset, payload length (data + 8), data offset; the data follows."""


def request_key(command: int, flags: int = 0) -> int:
    """The first eight bytes of a compact request, as one integer."""
    return REQUEST_MAGIC << 32 | flags << 16 | command


def extended_request_key(command: int, flags: int = 0) -> int:
    """The first eight bytes of an extended request, as one integer."""
    return EXTENDED_REQUEST_MAGIC << 32 | flags << 16 | command


def chunk_key(kind: int, flags: int = 0) -> int:
    """The first eight bytes of a structured reply chunk, as one integer."""
    return STRUCTURED_REPLY_MAGIC << 32 | flags << 16 | kind


def extended_chunk_key(kind: int, flags: int = 0) -> int:
    """The first eight bytes of an extended reply chunk, as one integer."""
    return EXTENDED_REPLY_MAGIC << 32 | flags << 16 | kind


READ_KEY = request_key(Command.READ)
WRITE_KEY = request_key(Command.WRITE)
EXTENDED_READ_KEY = extended_request_key(Command.READ)
EXTENDED_WRITE_KEY = extended_request_key(Command.WRITE, CommandFlag.PAYLOAD_LEN)
DATA_DONE_KEY = chunk_key(ReplyType.OFFSET_DATA, ReplyFlag.DONE)
DATA_KEY = chunk_key(ReplyType.OFFSET_DATA)
DONE_KEY = chunk_key(ReplyType.NONE, ReplyFlag.DONE)
EXTENDED_DATA_DONE_KEY = extended_chunk_key(ReplyType.OFFSET_DATA, ReplyFlag.DONE)
EXTENDED_DATA_KEY = extended_chunk_key(ReplyType.OFFSET_DATA)
EXTENDED_DONE_KEY = extended_chunk_key(ReplyType.NONE, ReplyFlag.DONE)
