"""Copying points from one repository to another: only what the other does not have travels.

::

    source's map ── page by page ── as in a point that both have? ──> nothing is told
                                     │
                    chunk by chunk ──┼── zero ──────────────────────> told, not read
                                     ├── its id is known there ─────> told by its id, not read
                                     └── else ── read, verified ────> told, stored anew

A point keeps its id, so it is copied once, and the copy of its parent is the copy's parent. Ids
mean the same in two repositories if both are plain and have the same hash and chunks. If they are
not, every chunk is opened with one's keys and stored with the other's; what has not changed since a
point that both have is not read even then.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.repository.native.compared import Base, ComparedPage, State, compared, runs
from nbdsrv.repository.native.disk_writer import NativeDiskWriter
from nbdsrv.repository.native.layout import point_key, ulid_of
from nbdsrv.repository.native.point import DiskRecord, PointRecord
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.slots import Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.writer import NativePointWriter, begin
from nbdsrv.repository.repository import Point
from nbdsrv.store.store import ObjectMissing

__all__ = ["COPIED_FROM", "Transfer", "Transferred"]

COPIED_FROM = "copied_from"
"""Label of a copy: the id of the repository where the point was made."""
PIECE = 4 << 20
"""Bytes that are read and told at a time."""
READERS = 4
"""Pieces on their way at a time."""


@dataclass(slots=True)
class Transferred:
    """What became of one point.

    Attributes:
        copied: False if it was there already.
        parent: of the copy; None if the point's own is not there.
        read_bytes: of its disks, read from the source.
        known_bytes: of its disks that were there, and not read.
        new_bytes: stored, as they take place.
    """

    group: str
    id: str
    size: int
    copied: bool = False
    parent: str | None = None
    read_bytes: int = 0
    known_bytes: int = 0
    new_bytes: int = 0


class Transfer:
    """Copies points of one repository to another. Belongs to one event loop.

    Attributes:
        same_ids: do ids and maps mean the same in both?
    """

    def __init__(
        self,
        source: NativeRepository,
        target: NativeRepository,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """``advance`` is told of bytes of disks that are done.

        Raises:
            RepositoryError: it is the same repository.
        """
        one, other = source.vault, target.vault
        if one.repository == other.repository:
            raise RepositoryError(f"{target.name}: is the same repository as {source.name}")
        self._source = source
        self._target = target
        self._workers = source.workers
        self._advance = advance or (lambda _: None)
        self.same_ids = (
            one.sealing.id_key is None
            and other.sealing.id_key is None
            and one.config.hash == other.config.hash
            and one.config.chunk_size == other.config.chunk_size
            and one.config.page_slots == other.config.page_slots
        )

    async def copy(self, point: Point, disk: str | None = None) -> Transferred:
        """Copy one point, parents before children; cancelled or failed, nothing is visible.

        Args:
            point: of the source.
            disk: the only one to copy; None for all.

        Raises:
            CorruptImage: something in the source is damaged; nothing of the point is copied.
            PointMissing: it has been pruned, or has no such disk.
            StoreError: one of the stores fails.
        """
        record = await self._source.record(point)
        disks = [each for each in record.disks if disk in {None, each.name}]
        if disk is not None and not disks:
            raise PointMissing(f"{self._source.name}: point {record.id} has no disk {disk!r}")
        done = Transferred(record.group, record.id, sum(each.size for each in disks))
        there = await self._workers.run(self._there, record.group)
        if record.id in there:
            self._advance(done.size)
            return done
        parent = await self._parent(record) if record.parent in there else None
        writer = await begin(self._target.vault, self._workers, record.group, parent)
        try:
            for each in disks:
                await self._copy_disk(point, record, each, parent, writer, done)
            made = await writer.commit_record(self._facts(record))
        except BaseException:
            await writer.abort()
            raise
        done.copied, done.parent = True, made.parent
        return done

    def _there(self, group: str) -> set[str]:
        keys = (ulid_of(stored.key) for stored in self._target.vault.point_objects(group))
        return {ulid for ulid in keys if ulid is not None}

    async def _parent(self, record: PointRecord) -> PointRecord | None:
        """The target's copy of the parent; without it, and if it is damaged, all is compared."""
        assert record.parent is not None
        try:
            key = point_key(record.group, record.parent)
            return await self._workers.run(self._target.vault.point, key)
        except (ObjectMissing, CorruptImage):
            return None

    def _facts(self, record: PointRecord) -> dict[str, Any]:
        origin = str(self._source.vault.config.id)
        return {
            "id": record.id,
            "created": record.created,
            "host": record.host,
            "consistency": record.consistency,
            "labels": {COPIED_FROM: origin, **record.labels},
            "blobs": record.blobs,
            "lock_until": record.lock_until,
        }

    # --- one disk ------------------------------------------------------------------------------

    async def _copy_disk(
        self,
        point: Point,
        record: PointRecord,
        disk: DiskRecord,
        parent: PointRecord | None,
        writer: NativePointWriter,
        done: Transferred,
    ) -> None:
        facts = {
            "mode": disk.mode,
            "reason": disk.reason,
            "cbt": disk.cbt,
            "read_bytes": disk.read_bytes,
            "rechecked_bytes": disk.rechecked_bytes,
        }
        told = await writer.disk(disk.name, disk.size, facts)
        content = await self._source.open_unread(point, disk.name)
        try:
            work = _DiskTransfer(
                self._source.vault, content, told, done, self._advance, by_id=self.same_ids
            )
            root = await self._workers.run(self._source.vault.root, disk.root)
            base = await self._workers.run(self._base, record, disk, parent)
            if self.same_ids:
                told.expected_image_id = disk.image_id
            await work.run(root, base)
        finally:
            await content.close()
        done.new_bytes += told.summary.new_bytes

    def _base(
        self, record: PointRecord, disk: DiskRecord, parent: PointRecord | None
    ) -> Base | None:
        """The parent's map of the disk, in terms of the source's ids."""
        if parent is None or parent.disk(disk.name) is None:
            return None
        vault = self._target.vault if self.same_ids else self._source.vault
        try:
            before = parent if self.same_ids else vault.point(point_key(record.group, parent.id))
            its = before.disk(disk.name)
            if its is None or its.size != disk.size:
                return None
            return Base(vault, vault.root(its.root))
        except (ObjectMissing, CorruptImage):
            return None


class _DiskTransfer:
    """One disk on its way."""

    def __init__(
        self,
        vault: Vault,
        content: Disk,
        told: NativeDiskWriter,
        done: Transferred,
        advance: Callable[[int], None],
        *,
        by_id: bool,
    ) -> None:
        self._vault = vault
        self._content = content
        self._told = told
        self._done = done
        self._advance = advance
        self._by_id = by_id
        self._workers = content.workers

    async def run(self, root: Root, base: Base | None) -> None:
        """Tell everything that is not as in ``base``, then what the target asks for besides."""
        try:
            await self._tell_all(root, base)
        except BaseExceptionGroup as group:
            raise _first(group) from group
        # What lies in packs that are about to be deleted: until nothing more is asked for.
        buffer = bytearray(PIECE)
        while wanted := await self._told.wanted():
            for offset, length in wanted:
                for at in range(offset, offset + length, PIECE):
                    await self._read(buffer, at, min(PIECE, offset + length - at))

    async def _tell_all(self, root: Root, base: Base | None) -> None:
        unit = max(root.chunk_size, self._told.granularity)
        ranges: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue(READERS)
        async with asyncio.TaskGroup() as group:
            for _ in range(READERS):
                group.create_task(self._carry(ranges))
            states = bytearray()  # of the unit that the last page ends within
            behind = 0
            async for each in self._pages(root, base):
                states += await self._left(each, root) if self._by_id else each.states
                last = each.number == len(root) - 1
                per_unit = unit // root.chunk_size
                whole = len(states) if last else len(states) // per_unit * per_unit
                for at, end, state in runs(states[:whole], per_unit):
                    start = behind + at * root.chunk_size
                    stop = min(behind + end * root.chunk_size, root.size)
                    await self._tell(ranges, start, stop, state)
                behind += whole * root.chunk_size
                del states[:whole]
            for _ in range(READERS):
                await ranges.put(None)

    async def _pages(self, root: Root, base: Base | None) -> AsyncIterator[ComparedPage]:
        pages = compared(self._vault, root, base)
        while (page := await self._workers.run(next, pages, None)) is not None:
            yield page

    async def _left(self, compared_page: ComparedPage, root: Root) -> bytes:
        """The states of a page, once the target has taken what it knows by its ids."""
        number, page, states = compared_page
        if page is None:
            return states
        first = number * root.page_slots
        wanted = [
            (first + index, page.id(index))
            for index, state in enumerate(states)
            if state == State.DATA
        ]
        missing = set(await self._told.adopt(wanted)) if wanted else set()
        unit = self._told.granularity
        left = bytearray(states)
        for chunk, _ in wanted:
            if chunk not in missing:
                left[chunk - first] = State.SAME
                length = min(unit, self._told.size - chunk * unit)
                self._done.known_bytes += length
        return bytes(left)

    async def _tell(
        self, ranges: "asyncio.Queue[tuple[int, int] | None]", start: int, stop: int, state: int
    ) -> None:
        if state == State.ZERO:
            await self._told.zero(start, stop - start)
        if state != State.DATA:
            self._advance(stop - start)
            return
        for at in range(start, stop, PIECE):
            await ranges.put((at, min(PIECE, stop - at)))

    async def _carry(self, ranges: "asyncio.Queue[tuple[int, int] | None]") -> None:
        buffer = bytearray(PIECE)
        while (wanted := await ranges.get()) is not None:
            await self._read(buffer, *wanted)
            self._advance(wanted[1])

    async def _read(self, buffer: bytearray, offset: int, length: int) -> None:
        with memoryview(buffer)[:length] as view:
            await self._content.read_into(offset, view)
        self._done.read_bytes += length
        await self._told.data(offset, buffer, length)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What happened first; the others were cancelled for it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
