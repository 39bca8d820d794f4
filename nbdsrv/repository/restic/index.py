"""Which pack a blob lies in: restic's index, kept small.

::

    index/<id> ... ── records of 49 bytes ──> buckets by the first two bytes of a blob's id
                      id 32 | pack 4 | offset 4 | length 4 | expanded 4 | how 1

A repository of a million blobs (a TiB of images) takes 50 MB so, as Python objects it would take
ten times that. A bucket holds a few dozen records and is searched as bytes are.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nbdsrv.repository.pieces import ID_SIZE
from nbdsrv.repository.restic.records import MAX_BLOB, MAX_PACK, BlobEntry
from nbdsrv.repository.restic.sealed import OVERHEAD, Broken, SealKey

__all__ = ["MAX_BLOBS", "BlobPlace", "Index", "pack_header"]

MAX_BLOBS = 1 << 23
"""Blobs of a repository: 8 TiB of images, 400 MB of index."""
HEADER_LENGTH = struct.Struct("<I")
MAX_HEADER = 16 << 20
"""Bytes of a pack's header; restic's own bound."""

_RECORD = struct.Struct("<32sIIIIB")
_SIZE = _RECORD.size
_PLAIN, _COMPRESSED = 0, 1
_HEADER_ENTRIES = {
    0: struct.Struct("<xI32s"),
    1: struct.Struct("<xI32s"),
    2: struct.Struct("<xII32s"),
    3: struct.Struct("<xII32s"),
}


class BlobPlace(NamedTuple):
    """Where a blob lies.

    Attributes:
        pack: name of the pack.
        offset: in it, bytes.
        length: as it lies there, bytes.
        size: of the blob itself, bytes.
        compressed: by zstd?
    """

    pack: str
    offset: int
    length: int
    size: int
    compressed: bool


class Index:
    """Blobs by id. Thread-safe for readers while nobody adds.

    Attributes:
        count: of records.
    """

    def __init__(self) -> None:
        self.count = 0
        self._packs: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._buckets: dict[bytes, bytearray] = {}

    def packs(self) -> Iterable[str]:
        """The names of all packs."""
        return [pack.hex() for pack in self._packs]

    def knows_pack(self, name: str) -> bool:
        """Does any record lead to that pack?"""
        return bytes.fromhex(name) in self._numbers

    def add(self, pack: str, blobs: Sequence[BlobEntry]) -> None:
        """All blobs of a pack, or none.

        Raises:
            Broken: they cannot lie so, or there are too many.
        """
        for blob in blobs:
            size = blob.uncompressed_length or blob.length - OVERHEAD
            if blob.offset + blob.length > MAX_PACK or size > MAX_BLOB:
                raise Broken(f"a blob of {size} bytes at {blob.offset} of pack {pack}")
        if self.count + len(blobs) > MAX_BLOBS:
            raise Broken(f"more than {MAX_BLOBS} blobs, which is what is read of a repository")
        name = bytes.fromhex(pack)
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._packs)
            self._packs.append(name)
        buckets, make = self._buckets, _RECORD.pack
        for blob in blobs:
            compressed = blob.uncompressed_length > 0
            size = blob.uncompressed_length or blob.length - OVERHEAD
            id_ = bytes.fromhex(blob.id)
            record = make(id_, number, blob.offset, blob.length, size, compressed)
            bucket = buckets.get(id_[:2])
            if bucket is None:
                buckets[id_[:2]] = bytearray(record)
            else:
                bucket += record
        self.count += len(blobs)

    def places(self, id_: bytes) -> list[BlobPlace]:
        """Everywhere it is said to lie."""
        found: list[BlobPlace] = []
        for at in self._found(id_):
            _, number, offset, length, size, how = _RECORD.unpack_from(self._buckets[id_[:2]], at)
            place = BlobPlace(
                self._packs[number].hex(), offset, length, size, compressed=how == _COMPRESSED
            )
            if place not in found:
                found.append(place)
        return found

    def size(self, id_: bytes) -> int | None:
        """Bytes of a blob; None if it is not known."""
        for at in self._found(id_):
            return int(_RECORD.unpack_from(self._buckets[id_[:2]], at)[4])
        return None

    def _found(self, id_: bytes) -> Iterator[int]:
        bucket = self._buckets.get(id_[:2])
        if bucket is None:
            return
        at = bucket.find(id_)
        while at >= 0:
            if at % _SIZE == 0:
                yield at
                at = bucket.find(id_, at + _SIZE)
            else:
                at = bucket.find(id_, at + 1)


def pack_header(key: SealKey, sealed: bytes, end: int) -> list[BlobEntry]:
    """The blobs a pack says it holds.

    Args:
        key: the repository's.
        sealed: the header as it lies in the pack.
        end: bytes of the pack before its header.

    Raises:
        Broken: it is none, or does not fit the pack.
    """
    header = key.opened(sealed)
    found: list[BlobEntry] = []
    at = offset = 0
    while at < len(header):
        layout = _HEADER_ENTRIES.get(header[at])
        if layout is None or at + layout.size > len(header):
            raise Broken(f"its header has an entry of type {header[at]} at {at}")
        length, *rest, id_ = layout.unpack_from(header, at)
        expanded = rest[0] if rest else 0
        if length < OVERHEAD or offset + length > end or expanded > MAX_BLOB:
            raise Broken(f"its header has a blob of {length} bytes at {offset}")
        kind = "tree" if header[at] & 1 else "data"
        found.append(BlobEntry(id_.hex(), kind, offset, length, expanded))
        offset += length
        at += layout.size
    if offset != end:
        raise Broken(f"its header tells of {offset} bytes, there are {end}")
    return found


assert _RECORD.size == ID_SIZE + 17
