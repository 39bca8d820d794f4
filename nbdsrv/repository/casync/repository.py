"""casync's images as a repository: one index, or a directory of them.

::

    casync:/backups/vm1.caibx    CasyncRepository ── points() ──> Listing ── ends of *.caibx
    casync:/backups                    └── open_disk() ──> CasyncDisk ── ChunkStores ──> *.castr

Stores on other hosts (http, ssh, S3) are casync's own to read.
"""

import errno as os_errno
import os
from collections.abc import Callable, Sequence
from functools import partial

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.formats.turns import in_turns
from nbdsrv.repository.casync.disk import CasyncDisk, Zeroes
from nbdsrv.repository.casync.index import BlobIndex
from nbdsrv.repository.casync.listing import Entry, Listing, Row
from nbdsrv.repository.casync.stores import STORE, ChunkStores, Place, beside, named_stores
from nbdsrv.repository.casync.verify import verify
from nbdsrv.repository.damage import Check
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.shared import Shared
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Tree

__all__ = ["CasyncRepository", "open_casync"]


class CasyncRepository(Repository):
    """Indexes and their stores. Belongs to one event loop."""

    kind = "casync"

    def __init__(
        self, tree: Tree, only: str | None, stores: Sequence[Place], workers: Workers
    ) -> None:
        """Becomes the owner of ``tree`` and of the trees of ``stores``.

        Args:
            tree: where the indexes lie.
            only: the one index it is about; None for all.
            stores: where chunks are; none for those beside an index.
            workers: for everything that blocks.
        """
        self.name = tree.full(only or "")
        self._tree = tree
        self._workers = workers
        self._stores = stores
        self._shared = Shared(tree.name, workers, self._close_trees)
        self._listing = Listing(tree, only)

    async def groups(self) -> Sequence[str]:
        """By listings alone: no index is read."""
        return await self._workers.run(self._listing.groups)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """Head and tail of each index are read once, and again when it has changed."""
        return [row.point for row in await self._workers.run(self._listing.rows, group)]

    @property
    def unread(self) -> Sequence[str]:
        """Why some places were passed over when all points were last listed."""
        return self._listing.unread

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A disk of a point.

        Raises:
            PointMissing: there is no such disk, or its index has been removed.
            RepositoryError: there is no chunk store beside it.
            CorruptImage: the index is broken.
        """
        self._shared.enter()
        opened: list[BlobIndex] = []
        try:
            return await self._workers.run(self._open, point, name, opened)
        except BaseException:  # cancelled: it has been opened all the same
            for index in opened:
                index.close()
            await self._shared.leave()
            raise

    def _open(self, point: Point, name: str, opened: list[BlobIndex]) -> CasyncDisk:
        """In a thread."""
        rows = self._listing.rows(point.group)
        row = next((row for row in rows if row.point.id == point.id), None)
        if row is None:
            raise self._gone(point)
        entry = row.entries.get(name)
        if entry is None:
            names = ", ".join(row.entries) or "none"
            text = f"{self.name}: point {point.id} of {point.group!r} has no disk {name!r}"
            raise PointMissing(f"{text}; it has {names}", os_errno.ENOENT)
        if entry.facts is None:
            raise CorruptImage(entry.reason)
        stores = self._stores_of(entry.path)
        if not stores and entry.facts.facts["chunks"]:
            text = f"{self._tree.full(entry.path)}: there is no chunk store (*.castr) beside it"
            raise RepositoryError(f"{text}; name it in {STORE}")
        try:
            index = self._index(entry)
        except ObjectMissing as error:
            raise self._gone(point) from error
        opened.append(index)
        others = {
            each.point.id: partial(self._index, each.entries[name])
            for each in rows
            if each is not row and name in each.entries and each.entries[name].facts is not None
        }
        facts = {"group": point.group, "disk": name, "point": point.id}
        facts |= {"created": row.point.stamp, **entry.facts.facts}
        return CasyncDisk(
            self._workers,
            f"{self.name}#{point.group}/{name}@{point.id}",
            index,
            Zeroes(index),
            ChunkStores(stores, index.digest),
            others,
            facts,
            self._shared.leave,
        )

    def _index(self, entry: Entry) -> BlobIndex:
        return BlobIndex(self._tree, entry.path, entry.length)

    def _stores_of(self, path: str) -> Sequence[Place]:
        return self._stores or beside(self._tree, path)

    def _gone(self, point: Point) -> PointMissing:
        text = f"{self.name}: point {point.id} of {point.group!r} has been removed"
        return PointMissing(text, os_errno.ENOENT)

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Indexes, and every chunk once: structure: it is there; packs and chunks: it is intact."""
        self._shared.enter()
        try:
            rows = await self._workers.run(self._chosen, points)
            steps = verify(self._tree, rows, self._stores_of, level, disk, advance)
            check = await in_turns(self._workers, steps)
            if points is None:
                check.unread += self._listing.unread
            return check
        finally:
            await self._shared.leave()

    def _chosen(self, points: Sequence[Point] | None) -> Sequence[Row]:
        rows = self._listing.rows()
        if points is None:
            return rows
        wanted = {(point.group, point.id) for point in points}
        return [row for row in rows if (row.point.group, row.point.id) in wanted]

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so; the last one closes the trees."""
        await self._shared.close()

    def _close_trees(self) -> None:
        for tree in (self._tree, *(place.tree for place in self._stores)):
            tree.close()


async def open_casync(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> CasyncRepository:
    """The index, or the directory of indexes, that a SOURCE names. Nothing is encrypted.

    Raises:
        StoreError: there is no such file or directory, or no such store.
    """
    del passphrase
    return await workers.run(_open, source.location, workers)


def _open(location: str, workers: Workers) -> CasyncRepository:
    only = None
    if os.path.isfile(location):
        location, only = os.path.split(location)
    tree = DirectoryTree(location or ".")
    try:
        stores = named_stores()
    except BaseException:
        tree.close()
        raise
    return CasyncRepository(tree, only, stores, workers)
