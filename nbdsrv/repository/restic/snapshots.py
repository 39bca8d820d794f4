"""The snapshots of a repository, as restore points.

::

    snapshots/<id>  {time, tree, hostname, paths, tags}
         │                 group: hostname     id: 8 letters of <id>, as restic prints them
         └── tree ── files of at least 1 MiB ── disks, named by their paths

A snapshot never changes, so each is read once. One that cannot be read has no group: it stands
under ``UNKNOWN``, damaged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.repository import DiskFacts, Point
from nbdsrv.repository.restic.blobs import BlobStore, is_id
from nbdsrv.repository.restic.records import SnapshotRecord, decoded
from nbdsrv.repository.restic.sealed import Broken
from nbdsrv.repository.restic.trees import MIN_DISK, Trees, is_outage
from nbdsrv.store.store import ObjectMissing

__all__ = ["UNKNOWN", "Row", "Snapshots"]

UNKNOWN = "unknown-host"
"""Group of snapshots that name no host."""
MAX_SNAPSHOT = 4 << 20
"""Bytes of a snapshot's file."""
MAX_SNAPSHOTS = 100_000
SHORT = 8
"""Letters of an id that restic shows."""


@dataclass(slots=True)
class Row:
    """One snapshot.

    Attributes:
        name: its whole id.
        record: None if it cannot be read.
        failure: why.
        tried: the index with which its trees were looked at.
        outage: was it, or one of them, not to be read? Then it is tried with each listing.
    """

    name: str
    record: SnapshotRecord | None
    created: float = 0
    failure: str = ""
    tried: int = 0
    outage: bool = False
    point: Point | None = field(default=None, repr=False)

    @property
    def group(self) -> str:
        """The host, or that none is known."""
        return (self.record.hostname if self.record else "") or UNKNOWN


class Snapshots:
    """All snapshots. Everything here blocks; one thread at a time."""

    def __init__(self, blobs: BlobStore, trees: Trees, asked: Sequence[str]) -> None:
        """``asked``: paths of files that are disks, however small."""
        self._blobs = blobs
        self._trees = trees
        self._asked = asked
        self._rows: dict[str, Row] = {}

    def rows(self, group: str | None) -> list[Row]:
        """By group, then from old to new; each has its ``point``.

        Raises:
            StoreError: they cannot be listed.
            CorruptImage: there are too many.
        """
        tree = self._blobs.tree
        names = [
            node.name
            for node in tree.entries("snapshots")
            if not node.directory and is_id(node.name)
        ]
        if len(names) > MAX_SNAPSHOTS:
            text = f"corrupt repository: {tree.full('snapshots')}: {len(names)} snapshots"
            raise CorruptImage(f"{text}; at most {MAX_SNAPSHOTS} are read")
        if any(name not in self._rows for name in names):
            self._blobs.refresh()
        rows: dict[str, Row] = {}
        for name in names:
            row = self._rows.get(name)
            if row is None or (row.record is None and row.outage):
                row = self._read(name)
            if row is not None:
                rows[name] = row
        self._rows = rows
        shown = _short_names(rows)
        found = [row for row in rows.values() if group in {None, row.group}]
        for row in found:
            self._describe(row, shown)
        found.sort(key=lambda row: (row.group, row.created, row.name))
        return found

    def _read(self, name: str) -> Row | None:
        path = f"snapshots/{name}"
        try:
            data = self._blobs.document(path, MAX_SNAPSHOT, 4 * MAX_SNAPSHOT)
            record = decoded(data, SnapshotRecord)
            return Row(name, record, record.created)
        except ObjectMissing:
            return None  # forgotten meanwhile
        except (Broken, DiskError) as error:
            where = self._blobs.tree.full(path)
            if isinstance(error, DiskError):
                return Row(name, None, 0, str(error), outage=is_outage(error))
            return Row(name, None, 0, f"corrupt repository: {where}: {error}")

    def _describe(self, row: Row, shown: dict[str, str]) -> None:
        """Make the point, unless it is known; what was damaged is tried with each new index."""
        id_ = shown[row.name]
        point = row.point
        if point is not None and point.id == id_:
            settled = not point.flags or "reason" not in point.facts
            if settled or (row.tried == self._blobs.generation and not row.outage):
                return
        row.tried = self._blobs.generation
        row.point = self._point(row, id_, shown)

    def _point(self, row: Row, id_: str, shown: dict[str, str]) -> Point:
        record = row.record
        if record is None or record.tree is None:
            reason = row.failure or f"corrupt repository: snapshot {row.name} has no tree"
            return _damaged(row, id_, reason)
        try:
            found = self._trees.find(record.tree, self._asked)
        except DiskError as error:
            row.outage = is_outage(error)
            return _damaged(row, id_, str(error))
        row.outage = found.outage
        disks = tuple(
            DiskFacts(path, file.size, {"modified": file.modified})
            for path, file in found.files.items()
        )
        facts = _facts(row, record)
        if not found.complete:
            facts["not_listed"] = "some directories or files; name them by path"
        if found.failure:
            facts["reason"] = found.failure
        flags = ("partial",) if found.failure else ()
        parent = shown.get(record.parent) if record.parent else None
        return Point(id_, row.group, row.created, disks, parent, flags, facts)


def _facts(row: Row, record: SnapshotRecord) -> dict[str, Any]:
    return {
        "snapshot": row.name,
        "tags": record.tags or [],
        "paths": record.paths or [],
        "username": record.username,
        "program_version": record.program_version,
        "encrypted": True,
        "smallest_listed": MIN_DISK,
    }


def _damaged(row: Row, id_: str, reason: str) -> Point:
    facts = {"snapshot": row.name, "reason": reason}
    return Point(id_, row.group, row.created, (), None, ("damaged",), facts)


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Eight letters, or all where that would be two snapshots' name."""
    by_short: dict[str, list[str]] = {}
    for name in names:
        by_short.setdefault(name[:SHORT], []).append(name)
    return {
        name: short if len(same) == 1 else name for short, same in by_short.items() for name in same
    }
