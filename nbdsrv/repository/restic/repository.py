"""A restic repository, for an event loop.

::

    restic:/path#HOST/PATH@SNAPSHOT
    ResticRepository ── points() ─── Snapshots ── Trees ─┐
         └── open_disk() ── Layout ──> ResticDisk ───────┴── BlobStore ── Index, packs
"""

import asyncio
import errno as os_errno
from collections.abc import Callable, Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing
from nbdsrv.export.grammar import Source
from nbdsrv.repository.damage import Check
from nbdsrv.repository.pieces import Pieces
from nbdsrv.repository.pieces_disk import content_of
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.restic.blobs import BlobStore
from nbdsrv.repository.restic.disk import ResticDisk
from nbdsrv.repository.restic.keys import open_keys, password_of
from nbdsrv.repository.restic.snapshots import Row, Snapshots
from nbdsrv.repository.restic.trees import Trees
from nbdsrv.repository.restic.verify import verify
from nbdsrv.repository.shared import Shared
from nbdsrv.store.tree import Tree

__all__ = ["ResticRepository", "open_restic"]


class ResticRepository(Repository):
    """Snapshots and the files in them. Belongs to one event loop."""

    kind = "restic"

    def __init__(
        self, workers: Workers, blobs: BlobStore, identity: str, version: int, asked: Sequence[str]
    ) -> None:
        """Becomes the owner of the tree in ``blobs``. Use ``open_restic``."""
        self.name = blobs.tree.name
        self.identity = identity
        self.version = version
        self.workers = workers
        self._blobs = blobs
        self._trees = Trees(blobs)
        self._snapshots = Snapshots(blobs, self._trees, asked)
        self._turn = asyncio.Lock()
        self._shared = Shared(self.name, workers, blobs.tree.close)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """All snapshots, or those of one host; each is read once and remembered."""
        return [row.point for row in await self._rows(group) if row.point is not None]

    async def _rows(self, group: str | None) -> list[Row]:
        self._shared.check()
        async with self._turn:
            return await self.workers.run(self._snapshots.rows, group)

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A file of a snapshot.

        Raises:
            PointMissing: it has no such file, or has been forgotten.
            CorruptImage: its trees are damaged.
            StoreError: the repository cannot be read.
        """
        self._shared.enter()
        try:
            return await self._open(point, name)
        except BaseException:
            await self._shared.leave()
            raise

    async def _open(self, point: Point, name: str) -> ResticDisk:
        rows = await self._rows(point.group)
        row = next((row for row in rows if row.point and row.point.id == point.id), None)
        if row is None or row.point is None:
            text = f"{self.name}: snapshot {point.id} of {point.group!r} has been forgotten"
            raise PointMissing(text, os_errno.ENOENT)
        found = row.point
        tree = row.record.tree if row.record is not None else None
        if tree is None or "damaged" in found.flags:
            raise CorruptImage(f"{self.name}: snapshot {found.id}: {found.facts.get('reason')}")
        if found.disk(name) is None:
            names = ", ".join(disk.name for disk in found.disks[:10]) or "none"
            text = f"{self.name}: snapshot {found.id} has no disk {name!r}; it has {names}"
            raise PointMissing(text, os_errno.ENOENT)
        pieces, content = await self.workers.run(self._look, tree, name)
        others = {
            each.point.id: self._other(each.record.tree, name)
            for each in rows
            if each.point is not None and each.record is not None and each.record.tree is not None
            if each is not row and each.point.disk(name) is not None
        }
        return ResticDisk(
            self.workers, self._blobs, found, name, pieces, content, others, self._shared.leave
        )

    def _look(self, tree: str, path: str) -> tuple[Pieces, str]:
        pieces = self._trees.pieces(tree, path)
        return pieces, content_of(pieces, self._blobs.blob)

    def _other(self, tree: str, path: str) -> Callable[[], Pieces]:
        return lambda: self._trees.pieces(tree, path)

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Snapshots, trees and the index; packs by their SHA-256; blobs by theirs."""
        rows = await self._rows(None)
        if points is not None:
            wanted = {(point.group, point.id) for point in points}
            rows = [row for row in rows if row.point and (row.group, row.point.id) in wanted]
        whole = points is None and disk is None
        return await self.workers.run(
            lambda: verify(
                self._blobs, self._trees, rows, level, disk, whole=whole, advance=advance
            )
        )

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so."""
        await self._shared.close()


async def open_restic(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> ResticRepository:
    """Open the repository a SOURCE names.

    Files that its selector may name are listed however small they are.

    Raises:
        ConfigError: there is no password.
        RepositoryError: no restic repository, or not its password.
        DiskError: it cannot be read.
    """
    from nbdsrv.repository.opening import open_tree

    def opened() -> tuple[Tree, BlobStore, str, int]:
        tree = open_tree(source)
        try:
            key, config = open_keys(tree, lambda: password_of(passphrase))
            blobs = BlobStore(tree, key)
            blobs.refresh()
            return tree, blobs, config.id, config.version
        except BaseException:
            tree.close()
            raise

    _, blobs, identity, version = await workers.run(opened)
    return ResticRepository(workers, blobs, identity, version, asked_paths(source.selector))


def asked_paths(selector: str) -> list[str]:
    """The paths a selector may mean: whatever may stand between a host and a snapshot."""
    paths: dict[str, None] = {}
    for body in {selector, selector.rpartition("@")[0]}:
        parts = body.split("/")
        for at in range(min(len(parts), 2)):
            path = "/".join(parts[at:])
            if path and len(path) <= 4096:
                paths[path] = None
    return list(paths)
