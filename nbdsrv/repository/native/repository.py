"""Our own repository, for an event loop.

::

    NativeRepository ── points() ───> Listing ──> Point ...
         │    └── open_disk() ─ lease, point, root ──> PointDisk ─┐
         └── begin() ──> NativePointWriter                        │
    Vault  <── closed behind the repository and the last disk ────┘
"""

import errno as os_errno
from collections.abc import Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing
from nbdsrv.repository.native.damage import is_outage
from nbdsrv.repository.native.disk import PointDisk
from nbdsrv.repository.native.layout import point_key
from nbdsrv.repository.native.listing import Listing
from nbdsrv.repository.native.pins import pins
from nbdsrv.repository.native.point import DiskRecord, PointRecord
from nbdsrv.repository.native.readers import Readers
from nbdsrv.repository.native.slots import Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.repository import Point, PointWriter, Repository
from nbdsrv.repository.shared import Shared
from nbdsrv.store.store import ObjectMissing, StoreError

__all__ = ["NativeRepository"]


class NativeRepository(Repository):
    """An open vault, shared by everything that is opened from it.

    Attributes:
        vault: its objects and keys.
        workers: what blocks happens there.
    """

    kind = "repo"

    def __init__(self, vault: Vault, workers: Workers) -> None:
        """Becomes the owner of ``vault``."""
        self.name = vault.name
        self.vault = vault
        self.workers = workers
        self._listing = Listing(vault, workers)
        self._readers = Readers(vault.store)
        self._shared = Shared(self.name, workers, vault.close)
        self._users = 1  # itself, and every open disk

    async def groups(self) -> Sequence[str]:
        """By a listing alone: no point is read."""
        return await self.workers.run(self.vault.groups)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """All points, or those of one group; each is read once and remembered."""
        return [row.point for row in await self._listing.rows(group)]

    async def pinned(self) -> frozenset[str]:
        """``group/ulid`` of the points that overlays stand on."""
        found = await self.workers.run(pins, self.vault.store)
        return frozenset(pin.point for pin in found)

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A disk of a point; a lease names the point while it is open.

        Raises:
            PointMissing: it has no such disk, or has been pruned.
            CorruptImage: the point or the root of the map is damaged.
            StoreError: the store does not answer.
        """
        disk = await self.open_unread(point, name)
        try:
            await disk.prepare()
        except BaseException:
            await disk.close()
            raise
        return disk

    async def open_unread(self, point: Point, name: str) -> PointDisk:
        """The same, for who will not read much of it: its map stays where it is."""
        self._shared.enter()
        held = f"{point.group}/{point.id}"
        try:
            await self.workers.run(self._readers.enter, held)
        except BaseException:  # cancelled: it has entered all the same
            await self._leave(held)
            raise
        try:
            return await self._open(point, name, held)
        except BaseException:
            await self._leave(held)
            raise

    async def _open(self, point: Point, name: str, held: str) -> PointDisk:
        # Read anew, behind the lease: a point that is there now stays.
        record = await self.record(point)
        disk = record.disk(name)
        if disk is None:
            names = ", ".join(each.name for each in record.disks) or "none"
            text = f"{self.name}: point {point.id} of {point.group!r} has no disk {name!r}"
            raise PointMissing(f"{text}; it has {names}", os_errno.ENOENT)
        root = await self.workers.run(self._root, disk)
        others: dict[str, DiskRecord] = {}
        for row in await self._listing.rows(point.group):
            if row.record is not None and row.record.id != record.id:
                other = row.record.disk(name)
                if other is not None:
                    others[row.record.id] = other
        return PointDisk(
            self.workers, self.vault, record, disk, root, others, lambda: self._leave(held)
        )

    async def record(self, point: Point) -> PointRecord:
        """What the point's object says, the VM's configuration included.

        Raises:
            PointMissing: it has been pruned.
            CorruptImage: it is damaged.
            StoreError: the store does not answer.
        """
        try:
            key = point_key(point.group, point.id)
            return await self.workers.run(self.vault.point, key)
        except ObjectMissing as error:
            text = f"{self.name}: point {point.id} of {point.group!r} has been pruned"
            raise PointMissing(text, os_errno.ENOENT) from error
        except CorruptImage as error:
            if isinstance(error.__cause__, StoreError) and is_outage(error, self.vault.store):
                raise error.__cause__ from error
            raise
        except ValueError as error:
            raise PointMissing(f"{self.name}: {error}", os_errno.ENOENT) from error

    def _root(self, disk: DiskRecord) -> Root:
        root = self.vault.root(disk.root)
        if root.size != disk.size:
            text = (
                f"corrupt repository: {self.name}: the map of {disk.name!r} has {root.size} bytes"
            )
            raise CorruptImage(f"{text}, its point says {disk.size}")
        return root

    async def begin(self, group: str, *, parent: Point | None = None) -> PointWriter:
        """Begin a new point.

        Raises:
            PointMissing: ``parent`` has been pruned.
            RepositoryError: the group's name is too long.
            StoreError: the repository cannot be written.
        """
        from nbdsrv.repository.native.writer import begin

        self._shared.check()
        before = await self.record(parent) if parent is not None else None
        return await begin(self.vault, self.workers, group, before)

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so; the last one closes the vault."""
        await self._shared.close()

    async def _leave(self, held: str) -> None:
        try:
            await self.workers.run(self._readers.leave, held)
        finally:
            await self._shared.leave()
