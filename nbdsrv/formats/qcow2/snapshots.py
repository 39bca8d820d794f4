"""Internal snapshots: the directory of other L1 tables in the same file.

::

    snapshots_offset
    | SNAPSHOT | extra data | id | name | pad to 8 | SNAPSHOT | ...      ``nb_snapshots`` times

A snapshot has a disk size of its own. Version 2 may leave it out: then the disk has not been
resized since.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.structs import (
    MAX_SNAPSHOT_EXTRA,
    SNAPSHOT_EXTRA,
)
from protocol.terms import MAX_SIZE

__all__ = ["Snapshot", "find_snapshot", "read_snapshots"]

MAX_TABLE = 64 << 20
"""Bytes; QEMU's bound."""
_HEAD = Struct(">QIHHIIQII")
"""``SNAPSHOT``, for tables of tens of thousands; proven equal by a test."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table.

    Attributes:
        position: of the entry in the file.
        taken_at: seconds since the epoch.
        vm_state_size: bytes of a saved VM beside the disk.
        disk_size: bytes.
    """

    position: int
    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    taken_at: float
    vm_state_size: int
    disk_size: int


def read_snapshots(file: ImageFile, header: Header) -> tuple[Snapshot, ...]:
    """The whole table. Blocking.

    Raises:
        CorruptImage: it reaches beyond the file, or an entry makes no sense.
    """
    found = []
    start = at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        fixed = _HEAD.unpack(file.read(at, _HEAD.size, "a snapshot"))
        l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, _, state, extra_size = fixed
        if extra_size > MAX_SNAPSHOT_EXTRA:
            raise file.corrupt(at, f"a snapshot with {extra_size} bytes of extra data")
        rest = file.read(at + _HEAD.size, extra_size + id_size + name_size, "a snapshot")
        size = header.size
        if extra_size >= SNAPSHOT_EXTRA.sizeof():
            extra = SNAPSHOT_EXTRA.parse(rest)
            state, size = extra.vm_state_size_large, extra.disk_size
        id_end = extra_size + id_size
        found.append(
            Snapshot(
                position=at,
                id=os.fsdecode(rest[extra_size:id_end]),
                name=os.fsdecode(rest[id_end:]),
                l1_table_offset=l1_offset,
                l1_size=l1_size,
                taken_at=seconds + nanoseconds / 1e9,
                vm_state_size=state,
                disk_size=size,
            )
        )
        at += _HEAD.size + len(rest) + 7 & ~7
        if at - start > MAX_TABLE:
            raise file.corrupt(start, f"a snapshot table of more than {MAX_TABLE} bytes")
    return tuple(found)


def find_snapshot(
    file: ImageFile, header: Header, snapshots: Iterable[Snapshot], wanted: str
) -> Snapshot:
    """The snapshot with this id, else with this name; its L1 table is checked.

    Raises:
        DiskError: there is none, or more than one of that name.
        CorruptImage: its L1 table makes no sense.
    """
    known = tuple(snapshots)
    matches = [s for s in known if s.id == wanted] or [s for s in known if s.name == wanted]
    if not matches:
        names = ", ".join(repr(s.name) for s in known[:20]) or "none"
        raise DiskError(f"{file.path}: no snapshot {wanted!r}; there are: {names}")
    if len(matches) > 1:
        ids = ", ".join(repr(s.id) for s in matches[:20])
        raise DiskError(f"{file.path}: several snapshots {wanted!r}; name one by its id: {ids}")
    found = matches[0]
    if found.disk_size > MAX_SIZE:
        raise file.corrupt(found.position, f"a snapshot of {found.disk_size} bytes")
    header.check_l1(file, found.l1_table_offset, found.l1_size, found.disk_size, found.position)
    return found
