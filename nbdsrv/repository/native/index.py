"""Where the content of an id lies: what makes deduplication, and finds what has moved.

::

    index/<ulid>.ix  a segment for each backup; a collector makes one of them all

    0        8          24    28    32  64      + 32 packs      + 1024   + 48 count
    |NBDINDX1|repository|count|packs|row|names  |fan-out 256 u32|records |hash of all before|

    row      bytes of a record u32, 0[28]
    record   id[32] pack u32 offset u32 clen u32 codec u8 kind u8 0[2] frames[..]   sorted by id
    fan-out  number of records whose id's first byte is at most 0, 1, 2 ...

The index is a cache: packs list themselves, and it can be made anew from them. It is searched as it
lies in memory, 64 bytes a chunk (256 MiB for a TiB of chunks); a dict would take five times that.

``frames`` are lengths as slots have them, so that a chunk that is stored already is read as fast as
one that has just been stored.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.entry import Place
from nbdsrv.repository.native.hashing import ID_SIZE, Hashing
from nbdsrv.repository.native.pack import MAX_ROW, Listed

__all__ = ["MAX_SEGMENT", "Index", "Segment", "encode_segment"]

MAGIC = b"NBDINDX1"
_HEADER = struct.Struct("<8s16sIII28x")
_FAN = struct.Struct("<256I")
_LEAST = 48
"""Bytes of a record, without frames."""
MAX_SEGMENT = 1 << 30
"""Bytes of a segment: 16 million chunks, four TiB of them."""


class Segment:
    """One segment, searched by id.

    Attributes:
        names: of the packs its records lie in.
    """

    __slots__ = ("_count", "_data", "_fan", "_record", "_start", "names")

    def __init__(
        self,
        data: bytes,
        names: Sequence[bytes],
        start: int,
        count: int,
        record: struct.Struct,
    ) -> None:
        """Use ``parse``."""
        self._record = record
        self._data = data
        self.names = names
        self._start = start
        self._count = count
        self._fan = (0, *_FAN.unpack_from(data, start - _FAN.size))

    @classmethod
    def parse(cls, key: str, data: bytes, repository: bytes, hashing: Hashing) -> "Segment":
        """A segment as it is stored at ``key``.

        Raises:
            CorruptImage: it is none of this repository. The rest of the index is as good.
        """
        view = memoryview(data)
        if len(data) < _HEADER.size + _FAN.size + ID_SIZE:
            raise CorruptImage(f"corrupt repository: {key}: it is too short for an index")
        magic, owner, count, packs, row = _HEADER.unpack_from(data)
        start = _HEADER.size + packs * ID_SIZE + _FAN.size
        whole = start + count * row
        fits = _LEAST <= row <= MAX_ROW and len(data) == whole + ID_SIZE
        if magic != MAGIC or owner != repository or not fits:
            raise CorruptImage(f"corrupt repository: {key}: no index of this repository")
        if hashing.name_of(view[:whole]) != view[whole:]:
            raise CorruptImage(f"corrupt repository: {key}: it has been changed")
        names = [
            data[at : at + ID_SIZE]
            for at in range(_HEADER.size, _HEADER.size + packs * ID_SIZE, ID_SIZE)
        ]
        return cls(data, names, start, count, _record(row - _LEAST))

    def __len__(self) -> int:
        return self._count

    def find(self, id_: bytes) -> Iterator[tuple[Place, int]]:
        """(place, kind) of all records of an id."""
        data, start, record = self._data, self._start, self._record
        size = record.size
        low, high = self._fan[id_[0]], self._fan[id_[0] + 1]
        high = min(high, self._count)
        while low < high:
            middle = (low + high) // 2
            at = start + middle * size
            if data[at : at + ID_SIZE] < id_:
                low = middle + 1
            else:
                high = middle
        while low < self._count:
            found, pack, offset, clen, codec, kind, frames = record.unpack_from(
                data, start + low * size
            )
            if found != id_:
                return
            if pack < len(self.names):
                name = self.names[pack]
                yield Place(name, offset, clen, codec, frames.rstrip(b"\0")), kind
            low += 1

    def __iter__(self) -> Iterator[tuple[bytes, Place, int]]:
        """(id, place, kind) of all records, by id."""
        end = self._start + self._count * self._record.size
        names = self.names
        view = memoryview(self._data)[self._start : end]
        for id_, pack, offset, clen, codec, kind, frames in self._record.iter_unpack(view):
            if pack < len(names):
                place = Place(names[pack], offset, clen, codec, frames.rstrip(b"\0"))
                yield id_, place, kind


@lru_cache
def _record(width: int) -> struct.Struct:
    """A record with ``width`` bytes for frames."""
    return struct.Struct(f"<32sIIIBBxx{width}s")


def encode_segment(
    rows: Iterable[tuple[bytes, Place, int]], repository: bytes, hashing: Hashing
) -> bytes:
    """A segment of these (id, place, kind), in any order."""
    names: dict[bytes, int] = {}
    records = []
    fan = [0] * 256
    rows = list(rows)
    width = max((len(place.frames) for _, place, _ in rows), default=0)
    record = _record(width + width % 2)
    for id_, (pack, offset, clen, codec, frames), kind in rows:
        number = names.setdefault(pack, len(names))
        records.append(record.pack(id_, number, offset, clen, codec, kind, frames))
        fan[id_[0]] += 1
    records.sort()
    total = 0
    for first, count in enumerate(fan):
        total += count
        fan[first] = total
    head = _HEADER.pack(MAGIC, repository, len(records), len(names), record.size)
    data = b"".join((head, *names, _FAN.pack(*fan), *records))
    return data + hashing.name_of(data)


class Index:
    """All segments, and what has been added since. Not thread-safe but for reading.

    Attributes:
        usable: names of the packs a record may lead to; None: any.
    """

    def __init__(self, usable: "set[bytes] | frozenset[bytes] | None" = None) -> None:
        self.usable = usable
        self._segments: list[Segment] = []
        self._small: dict[bytes, list[tuple[Place, int]]] = {}

    def add_segment(self, segment: Segment) -> None:
        """Small ones go into a dict: a search through hundreds of segments would take too long."""
        if len(segment) > SMALL:
            self._segments.append(segment)
            return
        for id_, place, kind in segment:
            self.add(id_, place, kind)

    def add_pack(self, name: bytes, listed: Iterable[Listed]) -> None:
        """What a pack says of itself."""
        for row in listed:
            self.add(row.id, row.place(name), row.kind)

    def add(self, id_: bytes, place: Place, kind: int) -> None:
        """One record."""
        self._small.setdefault(id_, []).append((place, kind))

    def find(self, id_: bytes, kind: int) -> Place | None:
        """Where content of that id lies as an entry of that kind, in a usable pack.

        The kind counts: packs of chunks and of pages are kept apart, and a disk may hold what
        happens to be a page of some map.
        """
        for place, found in self._find(id_):
            if found == kind:
                return place
        return None

    def find_all(self, id_: bytes) -> Iterator[Place]:
        """Everywhere it lies, in usable packs of whatever kind."""
        for place, _ in self._find(id_):
            yield place

    def _find(self, id_: bytes) -> Iterator[tuple[Place, int]]:
        usable = self.usable
        for place, kind in self._small.get(id_, ()):
            if usable is None or place.pack in usable:
                yield place, kind
        for segment in self._segments:
            for place, kind in segment.find(id_):
                if usable is None or place.pack in usable:
                    yield place, kind

    def __iter__(self) -> Iterator[tuple[bytes, Place, int]]:
        """(id, place, kind) of everything in usable packs, in no order."""
        usable = self.usable
        for id_, places in self._small.items():
            for place, kind in places:
                if usable is None or place.pack in usable:
                    yield id_, place, kind
        for segment in self._segments:
            for id_, place, kind in segment:
                if usable is None or place.pack in usable:
                    yield id_, place, kind

    def packs(self) -> set[bytes]:
        """Names of the packs it knows of, usable or not."""
        known = {place.pack for places in self._small.values() for place, _ in places}
        for segment in self._segments:
            known.update(segment.names)
        return known


SMALL = 1 << 16
"""Records of a segment that is small: an increment of 16 GiB."""
