"""Which points there are, read once: a point's object never changes. One that was pruned may come
back from another repository, though, and then it lies elsewhere.

::

    list points/<group>/ ──> keys ── known? ──> PointRecord (without the VM's configuration)
                               └── new: read, several at a time
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.abreast import THREADS_AFAR
from nbdsrv.repository.native.damage import is_outage
from nbdsrv.repository.native.layout import group_of, ulid_of, ulid_time
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.repository import UNREAD, DiskFacts, Point
from nbdsrv.store.store import ObjectMissing, Stored

__all__ = ["Listing", "Row", "described"]

MAX_KNOWN = 1 << 14
"""Points kept in memory, some 3 KiB each."""
BATCH = 16
"""Points a thread reads before others have their turn."""
PARALLEL = 8
"""Threads at work for one listing; ``THREADS_AFAR`` where each point is a request."""
MAX_UNREAD = THREADS_AFAR
"""Points of one listing that the store does not give before it is asked for no more."""


@dataclass(slots=True)
class Row:
    """One point: what it says, or why it says nothing.

    Attributes:
        key: of its object.
        record: None if it says nothing.
        error: why: it is damaged, unless
        unread: the store did not give it.
    """

    key: str
    record: PointRecord | None
    error: DiskError | None = None
    unread: bool = False
    _point: Point | None = None

    @property
    def point(self) -> Point:
        """As all repositories describe points."""
        if self.record is None:
            return lost_point(self.key, str(self.error), UNREAD if self.unread else "damaged")
        if self.record.lock_until:
            return described(self.record)  # locked today, not tomorrow
        if self._point is None:
            self._point = described(self.record)
        return self._point


class Listing:
    """The points of one vault. Belongs to one event loop."""

    def __init__(self, vault: Vault, workers: Workers) -> None:
        self._vault = vault
        self._workers = workers
        self._known: OrderedDict[Stored, Row] = OrderedDict()

    async def rows(self, group: str | None = None) -> list[Row]:
        """All points, or those of one group; by group, then from old to new.

        One that the store does not give (503, no permission) hides no other.

        Raises:
            DiskError: the store does not answer, or so many times that it may be taken for down.
        """
        objects = await self._workers.run(self._objects, group)
        found: dict[str, Row] = {}
        unknown = []
        for stored in objects:
            row = self._known.get(stored)
            if row is None:
                unknown.append(stored)
            else:
                self._known.move_to_end(stored)
                found[stored.key] = row
        afar = self._vault.store.distant
        step, at_once = (1, THREADS_AFAR) if afar else (BATCH, PARALLEL)
        batches = [unknown[at : at + step] for at in range(0, len(unknown), step)]
        turn = asyncio.Semaphore(at_once)

        unread: list[DiskError] = []

        async def read(batch: Sequence[Stored]) -> list[Row]:
            async with turn:
                if len(unread) > MAX_UNREAD:
                    return []  # each of them may take a minute to fail
                rows = await self._workers.run(self._read, batch)
                unread.extend(row.error for row in rows if row.unread and row.error is not None)
                return rows

        read_rows = await asyncio.gather(*map(read, batches))
        if len(unread) > MAX_UNREAD:
            raise unread[0]
        for rows in read_rows:
            for row in rows:
                found[row.key] = row
        for stored in unknown:
            row = found.get(stored.key)
            if row is not None and row.record is not None:
                self._keep(stored, row)
        return [found[stored.key] for stored in objects if stored.key in found]

    def _objects(self, group: str | None) -> list[Stored]:
        try:
            found = self._vault.point_objects(group)
        except ValueError:
            return []  # no group can have that name
        return sorted(found, key=lambda stored: (group_of(stored.key) or "", stored.key))

    def _read(self, objects: Sequence[Stored]) -> list[Row]:
        rows = []
        for stored in objects:
            key = stored.key
            try:
                record = self._vault.point(key)
                rows.append(Row(key, msgspec.structs.replace(record, blobs={})))
            except ObjectMissing:
                continue  # pruned meanwhile
            except DiskError as error:
                sure = isinstance(error, CorruptImage) and not is_outage(error, self._vault.store)
                rows.append(Row(key, None, error, unread=not sure))
        return rows

    def _keep(self, stored: Stored, row: Row) -> None:
        self._known[stored] = row
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def described(record: PointRecord) -> Point:
    """A point of ours as all repositories describe them."""
    disks = tuple(
        DiskFacts(
            disk.name,
            disk.size,
            {
                "mode": disk.mode,
                "reason": disk.reason,
                "read_bytes": disk.read_bytes,
                "new_bytes": disk.new_bytes,
                "zero_bytes": disk.zero_bytes,
                "unchanged_bytes": disk.unchanged_bytes,
                "image_id": disk.image_id,
            },
        )
        for disk in record.disks
    )
    facts = {
        "host": record.host,
        "consistency": record.consistency,
        "previous": record.previous,
        "labels": dict(record.labels),
        "lock_until": record.lock_until,
    }
    locked = ("locked",) if record.lock_until > time.time() else ()
    return Point(record.id, record.group, record.created, disks, record.parent, locked, facts)


def lost_point(key: str, reason: str, flag: str) -> Point:
    """One whose object cannot be read: its key still says which it was."""
    id_ = ulid_of(key) or ""
    group = group_of(key) or ""
    return Point(id_, group, ulid_time(id_), (), None, (flag,), {"reason": reason})
