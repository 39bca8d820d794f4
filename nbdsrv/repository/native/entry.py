"""An entry: one piece of content as it lies in a pack (docs/repository-format.md, "Entry").

::

    0    4     5    6     8      12     16    48      52    56             56 + clen
    |CHNK|codec|kind|  0  | ulen | clen | id  |number | crc |   payload    |
    |<----------- authenticated, if encrypted ------->|

``ulen`` bytes of content with that ``id``, stored as ``clen`` bytes. ``crc`` is of the 52 bytes
before it, so that entries can be found again where a pack's directory is lost. Little-endian.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from nbdsrv.repository.native.frames import expand_frames
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Seal, expand
from nbdsrv.store.store import Data

__all__ = [
    "ENTRY_SIZE",
    "MAX_CONTENT",
    "Entry",
    "Kind",
    "Place",
    "check_entry",
    "content_of",
    "enclose",
    "entry_body",
    "open_entry",
    "parse_entry",
]

MAGIC = b"CHNK"
_HEAD = struct.Struct("<4sBBHII32sI")
_CRC = struct.Struct("<I")
ENTRY_SIZE = _HEAD.size + _CRC.size
MAX_CONTENT = 64 << 20
"""Bytes of one entry: what a root of a disk of 128 TiB takes, and far more than a chunk."""


class Kind(IntEnum):
    """What an entry's content is."""

    CHUNK = 0
    PAGE = 1
    ROOT = 2
    BLOB = 3
    POINT = 4


class Place(NamedTuple):
    """Where an entry lies.

    Attributes:
        pack: the name of the pack, 32 bytes.
        offset: of the entry's header in the pack, bytes.
        length: of its payload (``clen``), bytes.
        codec: how its body is encoded.
    """

    pack: bytes
    offset: int
    length: int
    codec: int


class Entry(NamedTuple):
    """A parsed header."""

    codec: int
    kind: int
    ulen: int
    clen: int
    id: bytes
    number: int


def enclose(
    seal: Seal, number: int, kind: Kind, codec: Codec, ulen: int, id_: bytes, body: Data
) -> tuple[bytes, Data]:
    """Header and payload of an entry; ``body`` is encoded already, ``id_`` the content's."""
    clen = len(body) + seal.overhead
    head = _HEAD.pack(MAGIC, codec, kind, 0, ulen, clen, id_, number)
    return head + _CRC.pack(zlib.crc32(head)), seal.close(number, head, body)


def parse_entry(data: Data, at: int = 0) -> Entry | None:
    """The header at ``data[at:]``; None if there is none, or it is damaged."""
    if len(data) - at < ENTRY_SIZE:
        return None
    head = bytes(data[at : at + _HEAD.size])
    if head[:4] != MAGIC or _CRC.unpack_from(data, at + _HEAD.size)[0] != zlib.crc32(head):
        return None
    _, codec, kind, _, ulen, clen, id_, number = _HEAD.unpack(head)
    if ulen > MAX_CONTENT or clen > MAX_CONTENT:
        return None
    return Entry(codec, kind, ulen, clen, id_, number)


def check_entry(data: Data, id_: bytes, kind: Kind, ulen: int, clen: int) -> None:
    """Does that entry begin there? ``data`` is at least its header.

    Raises:
        BrokenPayload: it does not.
    """
    entry = parse_entry(data)
    if entry is None:
        raise BrokenPayload("no entry begins there")
    if (entry.id, entry.kind, entry.ulen, entry.clen) != (id_, kind, ulen, clen):
        raise BrokenPayload("another entry lies there")


def entry_body(seal: Seal, id_: bytes, kind: Kind, data: Data) -> tuple[Entry, Data]:
    """Header and body of an entry, decrypted and still encoded: what another pack can take.

    Args:
        seal: of its pack.
        id_: what it must be.
        kind: likewise.
        data: the entry from its header to the end of its payload.

    Raises:
        BrokenPayload: it is not. What the body holds is not proven yet.
    """
    view = memoryview(data)
    entry = parse_entry(view)
    if entry is None:
        raise BrokenPayload("no entry begins there")
    if entry.id != id_ or entry.kind != kind:
        raise BrokenPayload("another entry lies there")
    payload = view[ENTRY_SIZE:]
    if entry.clen != len(payload):
        raise BrokenPayload(f"the entry has {entry.clen} bytes, not {len(payload)}")
    return entry, seal.open(entry.number, bytes(view[: _HEAD.size]), payload)


def content_of(entry: Entry, body: Data) -> Data:
    """The content in a body. That it is what the id names is not proven.

    Raises:
        BrokenPayload: there is none in it.
    """
    if entry.codec == Codec.FRAMES:
        return expand_frames(body, entry.id, entry.ulen)
    return expand(entry.codec, body, entry.ulen)


def open_entry(seal: Seal, hashing: Hashing, id_: bytes, kind: Kind, data: Data) -> Data:
    """The content of an entry, proven to be what ``id_`` names.

    Args:
        seal: of its pack.
        hashing: of the repository.
        id_: what it must be.
        kind: likewise.
        data: the entry from its header to the end of its payload.

    Raises:
        BrokenPayload: it is not.
    """
    entry, body = entry_body(seal, id_, kind, data)
    content = content_of(entry, body)
    if hashing.id_of(content) != id_:
        raise BrokenPayload("its content is not what its id says")
    return content
