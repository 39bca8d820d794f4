"""A restore point: the one object that makes it exist (docs/repository-format.md, "Point").

::

    points/<group>/<ulid>.pt      a pack of one entry: zstd of this JSON
        disks[]  ── root ──> metas/..  ── pages ──> metas/..  ── slots ──> packs/..
        parent       the point its unchanged chunks were taken from
        previous     the point before it in the group: one that was hidden is missed

Everything it names is durable before it is put.
"""

import re

import msgspec

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place, open_entry
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.layout import group_of, ulid_of
from nbdsrv.repository.native.pack import (
    HEADER_SIZE,
    MAX_PACK,
    Pack,
    PackKind,
    parse_directory,
    parse_header,
    parse_trailer,
)
from nbdsrv.repository.native.sealing import BrokenPayload, Sealing, compress
from nbdsrv.repository.native.slots import MAX_SIZE

__all__ = ["DiskRecord", "PointRecord", "Ref", "decode_point", "encode_point"]

MAX_POINT = 16 << 20
"""Bytes of a point's object: a thousand disks with configurations of their VM."""
LATEST = 253_402_300_800
"""Seconds since 1970 of the year 10000, which no calendar of ours can tell."""
_HEX_ID = re.compile(r"[0-9a-f]{64}")


class Ref(msgspec.Struct, frozen=True, kw_only=True):
    """An entry, by content and place; ``id`` and ``pack`` in hex."""

    id: str
    pack: str
    offset: int
    length: int
    codec: int

    @classmethod
    def of(cls, id_: bytes, place: Place) -> "Ref":
        """From what a pack says."""
        pack, offset, length, codec, _ = place
        return cls(id=id_.hex(), pack=pack.hex(), offset=offset, length=length, codec=codec)

    @property
    def place(self) -> Place:
        """Where it lies."""
        return Place(bytes.fromhex(self.pack), self.offset, self.length, self.codec)


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a point.

    Attributes:
        name: unique in the point.
        size: bytes.
        root: of its map.
        image_id: equal for equal disks, hex; see ``slots.Root.image_id``.
        mode: ``full``, ``incremental`` or ``scan``.
        reason: why that mode.
        cbt: who can tell what changes from here on, and from which state: ``kind`` and ``id``;
            None if nobody can.
        read_bytes: that were read from the source.
        new_bytes: that were stored, compressed.
        zero_bytes: that are zeroes.
        unchanged_bytes: that are as in the parent.
        rechecked_bytes: of those said to be unchanged, how many were read all the same.
    """

    name: str
    size: int
    root: Ref
    image_id: str
    mode: str = "full"
    reason: str = ""
    cbt: dict[str, str] | None = None
    read_bytes: int = 0
    new_bytes: int = 0
    zero_bytes: int = 0
    unchanged_bytes: int = 0
    rechecked_bytes: int = 0


class PointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a point's object says. Unknown fields of later versions are ignored.

    Attributes:
        id: its ULID.
        group: the VM's name.
        created: seconds since 1970, by the clock of the host that made it.
        parent: id of the point its unchanged chunks come from.
        previous: id of the point that was the group's latest.
        host: that made it.
        consistency: ``crash``, ``filesystem``, ``application`` or "" where nothing is known.
        labels: what its user calls it; and where it came from, if it was copied.
        disks: see ``DiskRecord``.
        blobs: the VM's configuration, by name.
        lock_until: seconds since 1970; until then it is not pruned.
    """

    v: int = 1
    id: str
    group: str
    created: float
    parent: str | None = None
    previous: str | None = None
    host: str = ""
    consistency: str = ""
    labels: dict[str, str] = {}
    disks: list[DiskRecord] = []
    blobs: dict[str, str] = {}
    lock_until: float = 0

    def disk(self, name: str) -> DiskRecord | None:
        """The disk of that name."""
        return next((disk for disk in self.disks if disk.name == name), None)


def encode_point(
    record: PointRecord, repository: bytes, sealing: Sealing, hashing: Hashing
) -> bytearray:
    """The object to put at ``layout.point_key``."""
    content = msgspec.json.encode(record)
    pack = Pack(PackKind.POINT, repository, sealing, hashing)
    codec, body = compress(content)
    pack.add(Kind.POINT, codec, len(content), hashing.id_of(content), body)
    return pack.finish()


def decode_point(
    key: str, data: bytes, repository: bytes, sealing: Sealing, hashing: Hashing
) -> PointRecord:
    """The record in the object at ``key``.

    Raises:
        CorruptImage: it is none, or another's.
    """
    try:
        header = parse_header(data, repository)
        offset, _ = parse_trailer(data, len(data))
        rows = parse_directory(memoryview(data)[offset:], offset)
        if len(rows) != 1 or header.kind != PackKind.POINT:
            raise BrokenPayload("no restore point")
        entry = memoryview(data)[HEADER_SIZE:offset]
        seal = sealing.seal(header.salt)
        content = open_entry(seal, hashing, rows[0].offset, rows[0].id, Kind.POINT, entry)
        record = msgspec.json.decode(content, type=PointRecord)
        if record.v != 1:
            raise BrokenPayload(f"a point of version {record.v}; use a newer nbdsrv")
        # A point moved to another name would hide the one that stood there.
        if (record.group, record.id) != (group_of(key), ulid_of(key)):
            raise BrokenPayload(f"it is the point {record.id} of {record.group!r}")
        _check(record)
    except RecursionError as error:
        raise CorruptImage(f"corrupt repository: {key}: nested too deeply") from error
    except (BrokenPayload, msgspec.MsgspecError, ValueError) as error:
        raise CorruptImage(f"corrupt repository: {key}: {error}") from error
    return record


def _check(record: PointRecord) -> None:
    """What it says must be possible, whoever wrote it."""
    if not 0 <= record.created < LATEST:
        raise BrokenPayload("it was made at no time")
    if len({disk.name for disk in record.disks}) != len(record.disks):
        raise BrokenPayload("two of its disks have the same name")
    for disk in record.disks:
        root = disk.root
        if not 0 <= disk.size <= MAX_SIZE:
            raise BrokenPayload(f"a disk of {disk.size} bytes")
        if _HEX_ID.fullmatch(root.id) is None or _HEX_ID.fullmatch(root.pack) is None:
            raise BrokenPayload("the map of a disk has no name")
        if root.offset < HEADER_SIZE or root.length < 0:
            raise BrokenPayload("the map of a disk lies nowhere")
        if root.offset + ENTRY_SIZE + root.length > MAX_PACK:
            raise BrokenPayload("the map of a disk lies beyond any pack's end")
