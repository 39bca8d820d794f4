"""An entry: one piece of content as it lies in a pack (docs/repository-format.md, "Entry").

::

    0    4     5    6     8      12     16    48    52             52 + clen
    |CHNK|codec|kind|  0  | ulen | clen | id  | crc |   payload    |
    |<------ authenticated, if encrypted ---->|

``ulen`` bytes of content with that ``id``, stored as ``clen`` bytes. ``crc`` is of the 48 bytes
before it, so that entries can be found again where a pack's directory is lost. Little-endian.

Who reads a frame of a chunk (``frames``) does without the header: its check says whose it is.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from nbdsrv.repository.native.frames import Framed, enclose_frames, open_frames
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Seal, expand
from nbdsrv.store.store import Data

__all__ = [
    "ENTRY_SIZE",
    "MAX_CONTENT",
    "Body",
    "Entry",
    "Kind",
    "Place",
    "enclose",
    "open_entry",
    "opened_entry",
    "parse_entry",
]

MAGIC = b"CHNK"
_HEAD = struct.Struct("<4sBBHII32s")
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
        frames: lengths of its frames, as ``frames`` has them, if it is a chunk.
    """

    pack: bytes
    offset: int
    length: int
    codec: int
    frames: bytes = b""


Body = Data | Framed
"""Content that is encoded and not enclosed yet: as it was compressed, or a chunk in frames."""


class Entry(NamedTuple):
    """A parsed header."""

    codec: int
    kind: int
    ulen: int
    clen: int
    id: bytes


def enclose(
    seal: Seal, offset: int, kind: Kind, codec: Codec, ulen: int, id_: bytes, body: Body
) -> tuple[bytes, Data]:
    """Header and payload of the entry that will lie at ``offset`` of its pack."""
    if isinstance(body, Framed):
        payload: Data = enclose_frames(body, seal, offset, id_, ulen)
        head = _HEAD.pack(MAGIC, codec, kind, 0, ulen, len(payload), id_)
    else:
        head = _HEAD.pack(MAGIC, codec, kind, 0, ulen, len(body) + seal.overhead, id_)
        payload = seal.close(offset, 0, head, body)
    return head + _CRC.pack(zlib.crc32(head)), payload


def parse_entry(data: Data, at: int = 0) -> Entry | None:
    """The header at ``data[at:]``; None if there is none, or it is damaged."""
    if len(data) - at < ENTRY_SIZE:
        return None
    head = bytes(data[at : at + _HEAD.size])
    if head[:4] != MAGIC or _CRC.unpack_from(data, at + _HEAD.size)[0] != zlib.crc32(head):
        return None
    _, codec, kind, _, ulen, clen, id_ = _HEAD.unpack(head)
    if ulen > MAX_CONTENT or clen > MAX_CONTENT:
        return None
    return Entry(codec, kind, ulen, clen, id_)


def open_entry(
    seal: Seal, hashing: Hashing, offset: int, id_: bytes, kind: Kind, data: Data
) -> Data:
    """The content of an entry, proven to be what ``id_`` names.

    Args:
        seal: of its pack.
        hashing: of the repository.
        offset: of the entry in its pack.
        id_: what it must be.
        kind: likewise.
        data: the entry from its header to the end of its payload.

    Raises:
        BrokenPayload: it is not.
    """
    return opened_entry(seal, hashing, offset, id_, kind, data)[1]


def opened_entry(
    seal: Seal, hashing: Hashing, offset: int, id_: bytes, kind: Kind, data: Data
) -> tuple[Entry, Data, Body]:
    """The same with its header, and the body for another pack."""
    view = memoryview(data)
    entry = parse_entry(view)
    if entry is None:
        raise BrokenPayload("no entry begins there")
    if entry.id != id_ or entry.kind != kind:
        raise BrokenPayload("another entry lies there")
    payload = view[ENTRY_SIZE:]
    if entry.clen != len(payload):
        raise BrokenPayload(f"the entry has {entry.clen} bytes, not {len(payload)}")
    body: Body
    if entry.codec == Codec.FRAMES:
        content: Data
        content, body = open_frames(payload, seal, offset, id_, entry.ulen)
    else:
        body = seal.open(offset, 0, bytes(view[: _HEAD.size]), payload)
        content = expand(entry.codec, body, entry.ulen)
    if hashing.id_of(content) != id_:
        raise BrokenPayload("its content is not what its id says")
    return entry, content, body
