"""Other tools' restore points, stored as our own: with their times and names.

::

    xo:/backups#web/root@20260101T000000Z              repo:/path#web/root@01KDV...
      point, by time ── there already? (labels) ───────── told, not read
         └── disk ── what tells the changes since the point its parent was made of?
               │        proven ── changed ranges, a sample of the rest ── differs? ──┐
               └── not proven ─── all of it ─────────────────────────────────────────┴─> point

    labels   origin.kind  origin.repository  origin.point  origin.created

What is the same in two points, or in two VMs, is stored once. A point's id sorts by the time it
was made at, so that ``latest`` stays the newest one, whoever made it and whenever it was migrated.

Rule: a disk is read in part only if the parent's labels say that it was made of exactly that point
(kind, repository, id and time: names are used again) of a disk of that size.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nbdsrv.backup.migrated import MigratedDisk
from nbdsrv.disk.disk import Disk
from nbdsrv.errors import CorruptImage, DiskError, PointMissing
from nbdsrv.repository.native.point import DiskRecord, PointRecord
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.writer import NativePointWriter, begin
from nbdsrv.repository.repository import CHANGED_SINCE, Point, Repository
from nbdsrv.ulid import ulid_at

__all__ = [
    "CREATED",
    "KIND",
    "POINT",
    "REPOSITORY",
    "Migrated",
    "Migration",
    "SourceFailed",
    "identity_of",
]

KIND = "origin.kind"
REPOSITORY = "origin.repository"
POINT = "origin.point"
CREATED = "origin.created"
RECHECK = 1.0
"""Percent of what is said to be unchanged that is read all the same."""


class SourceFailed(DiskError):
    """A foreign point cannot be migrated: it is damaged. Others may be fine."""


@dataclass(slots=True)
class Migrated:
    """What became of one point.

    Attributes:
        group: of both points.
        id: of ours.
        origin: of the foreign one.
        created: seconds since 1970, of both.
        size: of its disks, bytes.
        copied: False if it was there already.
        parent: of ours.
        modes: disk to ``full``, ``incremental`` or ``scan``.
        read_bytes: of the foreign disks that were read.
        known_bytes: of these, what was stored already.
        new_bytes: stored, as they take place.
    """

    group: str
    id: str
    origin: str
    created: float
    size: int
    copied: bool = False
    parent: str | None = None
    modes: dict[str, str] = field(default_factory=dict)
    read_bytes: int = 0
    known_bytes: int = 0
    new_bytes: int = 0


def identity_of(repository: Repository) -> str:
    """What a repository is known by: the id its tool gave it, or its place."""
    if repository.identity:
        return repository.identity
    return repository.name if "://" in repository.name else os.path.abspath(repository.name)


class Migration:
    """Copies points of another tool's repository into ours. Belongs to one event loop.

    Points of a group must come from old to new: each is told in terms of the one before it.
    """

    def __init__(
        self,
        source: Repository,
        target: NativeRepository,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """``advance`` is told of bytes of disks that are done."""
        self._source = source
        self._target = target
        self._workers = target.workers
        self._identity = identity_of(source)
        self._advance = advance or (lambda _: None)

    async def copy(self, point: Point, disk: str | None = None) -> Migrated:
        """Copy one point; cancelled or failed, nothing of it is visible.

        Args:
            point: of the source.
            disk: the only one to copy; None for all.

        Raises:
            SourceFailed: the point is damaged, or cannot be read.
            RepositoryError: a native point cannot be called so.
            StoreError: the target cannot be written.
        """
        disks = [each for each in point.disks if disk in {None, each.name}]
        if "damaged" in point.flags or not disks:
            reason = point.facts.get("reason") or "it has no disks"
            raise SourceFailed(f"point {point.id} of {point.group!r}: {reason}")
        done = Migrated(point.group, "", point.id, point.created, sum(each.size for each in disks))
        names = {each.name for each in disks}
        there = await self._target.points(point.group)
        for each in there:
            if self._is_of(each, point) and names <= {each.name for each in each.disks}:
                done.id = each.id
                self._advance(done.size)
                return done
        parent = await self._parent(point, there)
        try:
            return await self._copied(point, sorted(names, key=_order(point)), parent, done)
        except CorruptImage as error:  # of the target: its parent's map
            if parent is None or isinstance(error, SourceFailed):
                raise
            return await self._copied(point, sorted(names, key=_order(point)), None, done)

    async def _copied(
        self, point: Point, names: list[str], parent: PointRecord | None, done: Migrated
    ) -> Migrated:
        done.read_bytes = done.known_bytes = done.new_bytes = 0
        writer = await begin(self._target.vault, self._workers, point.group, parent)
        try:
            for name in names:
                await self._copy_disk(point, name, parent, writer, done)
            record = await writer.commit_record(self._facts(point))
        except BaseException:
            await writer.abort()
            raise
        done.id, done.parent, done.copied = record.id, record.parent, True
        return done

    def _facts(self, point: Point) -> dict[str, Any]:
        labels = {
            KIND: self._source.kind,
            REPOSITORY: self._identity,
            POINT: point.id,
            CREATED: repr(point.created),
        }
        if point.flags:
            labels["origin.flags"] = ",".join(point.flags)
        created = max(point.created, 0.0)
        return {"id": ulid_at(created), "created": created, "labels": labels}

    # --- what is there -------------------------------------------------------------------------

    def _is_of(self, ours: Point, theirs: Point) -> bool:
        """Was this point of ours made of that one?"""
        return self._labels(ours.facts.get("labels")) == (theirs.id, repr(theirs.created))

    def _labels(self, labels: Mapping[str, str] | None) -> tuple[str, str] | None:
        """Id and time of the foreign point; None if it is none of this repository's."""
        found = labels or {}
        if (found.get(KIND), found.get(REPOSITORY)) != (self._source.kind, self._identity):
            return None
        return found.get(POINT, ""), found.get(CREATED, "")

    async def _parent(self, point: Point, there: Sequence[Point]) -> PointRecord | None:
        """The newest of ours that is not newer; one that was migrated from there, if there is."""
        older = [each for each in there if each.created <= point.created and each.disks]
        older.sort(
            key=lambda each: (
                self._labels(each.facts.get("labels")) is not None,
                each.created,
                each.id,
            )
        )
        while older:
            try:
                return await self._target.record(older.pop())
            except (PointMissing, CorruptImage):
                continue  # pruned meanwhile, or damaged: not built upon
        return None

    async def _since(
        self, point: Point, content: Disk, parent: PointRecord | None, before: DiskRecord | None
    ) -> tuple[str, str]:
        """The context that tells the changes since the parent, or "" and why there is none."""
        if parent is None or before is None:
            return "", "no earlier point has this disk"
        origin = self._labels(parent.labels)
        if origin is None:
            return "", f"{parent.id} was not made of a point of this repository"
        context = CHANGED_SINCE + origin[0]
        if context not in content.contexts:
            return "", f"nothing tells what changed since {origin[0]}"
        if before.size != content.size:
            return "", f"its size has changed from {before.size} to {content.size} bytes"
        for each in await self._source.points(point.group):
            if (each.id, repr(each.created)) == origin:
                return context, f"{context} tells what changed since {parent.id}"
        return "", f"{origin[0]} is another point now"

    # --- one disk ------------------------------------------------------------------------------

    async def _copy_disk(
        self,
        point: Point,
        name: str,
        parent: PointRecord | None,
        writer: NativePointWriter,
        done: Migrated,
    ) -> None:
        with reading(point, name):
            content = await self._source.open_disk(point, name)
        try:
            before = parent.disk(name) if parent is not None else None
            with reading(point, name):
                context, reason = await self._since(point, content, parent, before)
            mode = "incremental" if context else "scan" if before is not None else "full"
            facts = {"mode": mode, "reason": reason}
            told = await writer.disk(name, content.size, facts)
            work = MigratedDisk(
                content, told, self._workers, lambda: reading(point, name), self._advance
            )
            if await work.run(context, RECHECK):
                mode = told.facts["mode"] = "scan"
                told.facts["reason"] = f"{context} did not tell of all changes"
            told.facts["read_bytes"] = work.read_bytes
            told.facts["rechecked_bytes"] = work.rechecked_bytes
        finally:
            await content.close()
        done.modes[name] = mode
        done.read_bytes += work.read_bytes
        done.known_bytes += told.summary.duplicate_bytes
        done.new_bytes += told.summary.new_bytes


@contextmanager
def reading(point: Point, name: str) -> Iterator[None]:
    """What fails in the block is the source's fault."""
    try:
        yield
    except SourceFailed:
        raise
    except DiskError as error:
        text = f"point {point.id} of {point.group!r}, disk {name!r}: {error}"
        raise SourceFailed(text, error.errno, error.offset) from error


def _order(point: Point) -> Callable[[str], int]:
    """Disks stay in their VM's order."""
    numbers = {disk.name: number for number, disk in enumerate(point.disks)}
    return lambda name: numbers[name]
