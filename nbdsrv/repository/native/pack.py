"""A pack: many entries in one object (docs/repository-format.md, "Pack").

::

    0        8    9  10    16         32      64
    |NBDPACK1|kind|cph| 0  | repository| salt  |entry|entry| ... |directory|trailer|
                                                              48 + frames    24
    directory   id[32] offset u32 clen u32 ulen u32 codec u8 kind u8 0[2] frames[..]  sorted by id
    trailer     count u32, bytes of the directory u32, crc of it u32, bytes of a row u32, "NBDPEND1"

``frames`` are the lengths of a chunk's frames, u16 each; a directory's rows have room for those of
the chunk that has most.

The salt is random also where nothing is encrypted: the same chunks packed again make a pack of
another name, which a collector that has condemned the first does not take for it.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from nbdsrv.repository.native.entry import (
    ENTRY_SIZE,
    MAX_CONTENT,
    Body,
    Kind,
    Place,
    enclose,
    parse_entry,
)
from nbdsrv.repository.native.frames import FRAME, Framed, lengths_size, table_of
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Sealing
from nbdsrv.store.store import Data

__all__ = [
    "HEADER_SIZE",
    "MAX_PACK",
    "MAX_ROW",
    "RECORD_SIZE",
    "TRAILER_SIZE",
    "Listed",
    "Pack",
    "PackHeader",
    "PackKind",
    "parse_directory",
    "parse_header",
    "parse_trailer",
    "row_size",
    "scan",
]

MAGIC = b"NBDPACK1"
END = b"NBDPEND1"
_HEADER = struct.Struct("<8sBB6x16s32s")
_TRAILER = struct.Struct("<IIII8s")
HEADER_SIZE = _HEADER.size
TRAILER_SIZE = _TRAILER.size
RECORD_SIZE = 48
"""Bytes of a row of the directory, without frames."""
MAX_ROW = RECORD_SIZE + 2 * MAX_CONTENT // FRAME
SALT_SIZE = 32
MAX_PACK = 256 << 20
"""Bytes of a pack at most, eight times the usual: one is held in memory when it is checked."""


class PackKind:
    """What a pack holds: the byte at 8."""

    CHUNKS = 0
    METAS = 1
    POINT = 2
    TRACE = 3


class PackHeader(NamedTuple):
    """What a pack says of itself."""

    kind: int
    encrypted: bool
    repository: bytes
    salt: bytes


class Listed(NamedTuple):
    """A row of a directory: an entry, and where it lies."""

    id: bytes
    offset: int
    clen: int
    ulen: int
    codec: int
    kind: int
    frames: bytes = b""

    def place(self, pack: bytes) -> Place:
        """Of the entry, in the pack of that name."""
        return Place(pack, self.offset, self.clen, self.codec, self.frames)


class Pack:
    """A pack that is being filled, in memory. Not thread-safe.

    Attributes:
        size: bytes so far, without the directory.
        listed: what is in it.
        name: the hash of its bytes, once ``finish`` has been called; before that empty.
    """

    __slots__ = ("_data", "_hashing", "_seal", "listed", "name", "size")

    def __init__(self, kind: int, repository: bytes, sealing: Sealing, hashing: Hashing) -> None:
        salt = os.urandom(SALT_SIZE)
        self._seal = sealing.seal(salt)
        self._hashing = hashing
        encrypted = sealing.id_key is not None
        self._data = bytearray(_HEADER.pack(MAGIC, kind, encrypted, repository, salt))
        self.size = len(self._data)
        self.listed: list[Listed] = []
        self.name = b""

    def add(self, kind: Kind, codec: Codec, ulen: int, id_: bytes, body: Body) -> Listed:
        """Append an entry; ``body`` is encoded already.

        Raises:
            ValueError: ``ulen`` is more than any reader would take.
        """
        if ulen > MAX_CONTENT:
            raise ValueError(f"an entry of {ulen} bytes; {MAX_CONTENT} is the most")
        header, payload = enclose(self._seal, self.size, kind, codec, ulen, id_, body)
        frames = b""
        if isinstance(body, Framed):
            frames = body.lengths
        row = Listed(id_, self.size, len(payload), ulen, int(codec), int(kind), frames)
        self._data += header
        self._data += payload
        self.size = len(self._data)
        self.listed.append(row)
        return row

    def finish(self) -> bytearray:
        """The whole pack, ready to be put under ``name``; nothing can be added any more."""
        record = _record(row_size(self.listed) - RECORD_SIZE)
        rows = b"".join(
            record.pack(row.id, row.offset, row.clen, row.ulen, row.codec, row.kind, row.frames)
            for row in sorted(self.listed)
        )
        data, self._data = self._data, bytearray()
        data += rows
        data += _TRAILER.pack(len(self.listed), len(rows), zlib.crc32(rows), record.size, END)
        self.name = self._hashing.name_of(data)
        return data


def row_size(rows: Iterable[Listed]) -> int:
    """Bytes of a row in a directory of these."""
    longest = max((row.ulen for row in rows if row.codec == Codec.FRAMES), default=0)
    return RECORD_SIZE + lengths_size(longest)


def parse_header(data: Data, repository: bytes) -> PackHeader:
    """The first ``HEADER_SIZE`` bytes of a pack of this repository.

    Raises:
        BrokenPayload: they are not that.
    """
    if len(data) < HEADER_SIZE:
        raise BrokenPayload("it is shorter than a pack's header")
    magic, kind, cipher, owner, salt = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise BrokenPayload("it does not begin like a pack")
    if owner != repository:
        raise BrokenPayload("it belongs to another repository")
    if cipher > 1:
        raise BrokenPayload(f"cipher {cipher} is unknown")
    return PackHeader(kind, bool(cipher), owner, salt)


def parse_trailer(data: Data, size: int) -> tuple[int, int]:
    """Offset and length of the directory of a pack of ``size`` bytes, from its last 24.

    Raises:
        BrokenPayload: the pack does not end as packs do.
    """
    if len(data) < TRAILER_SIZE:
        raise BrokenPayload("it is shorter than a pack's trailer")
    if size > MAX_PACK:
        raise BrokenPayload(f"it has {size} bytes, more than a pack may have")
    count, length, _, width, end = _TRAILER.unpack_from(data, len(data) - TRAILER_SIZE)
    room = size - HEADER_SIZE - TRAILER_SIZE
    # Each row stands for an entry, which takes more room than its row.
    fits = RECORD_SIZE <= width <= MAX_ROW and length == count * width
    if end != END or not fits or length + count * ENTRY_SIZE > room:
        raise BrokenPayload("it does not end like a pack")
    return size - TRAILER_SIZE - length, length


def parse_directory(data: Data, offset: int) -> list[Listed]:
    """The rows, from directory and trailer; ``offset`` is where the directory begins.

    Raises:
        BrokenPayload: it is damaged, or names what cannot be.
    """
    rows = memoryview(data)[:-TRAILER_SIZE]
    _, _, crc, width, _ = _TRAILER.unpack_from(data, len(rows))
    if zlib.crc32(rows) != crc or not RECORD_SIZE <= width <= MAX_ROW or len(rows) % width:
        raise BrokenPayload("its directory is damaged")
    record = _record(width - RECORD_SIZE)
    found = [
        Listed(id_, at, clen, ulen, codec, kind, frames.rstrip(b"\0"))
        for id_, at, clen, ulen, codec, kind, frames in record.iter_unpack(rows)
    ]
    end = HEADER_SIZE
    for row in sorted(found, key=_offset_of):
        if row.offset < end or row.ulen > MAX_CONTENT:
            raise BrokenPayload("its directory names entries that cannot be")
        end = row.offset + ENTRY_SIZE + row.clen
    if end > offset:
        raise BrokenPayload("its directory names bytes that are not there")
    return found


@lru_cache
def _record(width: int) -> struct.Struct:
    """A row with ``width`` bytes for frames."""
    return struct.Struct(f"<32sIIIBBxx{width}s")


def _offset_of(row: Listed) -> int:
    return row.offset


def scan(data: Data) -> Iterator[Listed]:
    """The entries of a pack whose directory is lost, found by their headers."""
    raw = bytes(data) if not isinstance(data, bytes) else data
    at = HEADER_SIZE
    while (at := raw.find(b"CHNK", at)) >= 0:
        entry = parse_entry(raw, at)
        if entry is None or at + ENTRY_SIZE + entry.clen > len(raw):
            at += 1
            continue
        end = at + ENTRY_SIZE + entry.clen
        frames = b""
        if entry.codec == Codec.FRAMES:
            frames = table_of(memoryview(raw)[at + ENTRY_SIZE : end], entry.ulen)
        yield Listed(entry.id, at, entry.clen, entry.ulen, entry.codec, entry.kind, frames)
        at = end
