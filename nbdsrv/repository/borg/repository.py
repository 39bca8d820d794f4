"""A borg repository, for an event loop.

::

    borg:/path#HOST/PATH@ARCHIVE
    BorgRepository ── points() ─── Archives ─┐
         └── open_disk() ── BorgDisk ────────┴── BorgProcesses ── worker.py, which runs borg's code

Read with no lock, which leaves read-only mounts as they are and backups alone. What
``borg compact`` moves meanwhile is found again; what it deletes because its archive was deleted is
an error.
"""

import asyncio
import errno as os_errno
from collections.abc import Callable, Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, CorruptImage, PointMissing, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.borg.archives import Archives, Row
from nbdsrv.repository.borg.disk import BorgDisk, chunk_of, zero_ids
from nbdsrv.repository.borg.process import BorgProcesses
from nbdsrv.repository.borg.verify import verify
from nbdsrv.repository.damage import Check
from nbdsrv.repository.pieces import Pieces
from nbdsrv.repository.pieces_disk import content_of
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.restic.repository import asked_paths
from nbdsrv.repository.shared import Shared

__all__ = ["BorgRepository", "open_borg"]

MAX_CONFIG = 1 << 20
"""Bytes of a repository's config, which holds a key at most."""


class BorgRepository(Repository):
    """Archives and the files in them. Belongs to one event loop."""

    kind = "borg"

    def __init__(self, workers: Workers, borg: BorgProcesses, asked: Sequence[str]) -> None:
        """Becomes the owner of ``borg``. Use ``open_borg``."""
        self.name = borg.name
        self.identity = str(borg.facts.get("id", ""))
        self.workers = workers
        self.borg = borg
        self._archives = Archives(borg, asked)
        self._turn = asyncio.Lock()
        self._shared = Shared(self.name, workers, borg.close)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """All archives, or those of one host; the items of each are read once."""
        return [row.point for row in await self._rows(group) if row.point is not None]

    async def _rows(self, group: str | None) -> list[Row]:
        self._shared.check()
        async with self._turn:
            return await self.workers.run(self._archives.rows, group)

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A file of an archive.

        Raises:
            PointMissing: it has no such file, or has been deleted.
            CorruptImage: its metadata are damaged.
            DiskError: borg cannot read it.
        """
        self._shared.enter()
        try:
            return await self._open(point, name)
        except BaseException:
            await self._shared.leave()
            raise

    async def _open(self, point: Point, name: str) -> BorgDisk:
        rows = await self._rows(point.group)
        row = next((row for row in rows if row.point and row.point.id == point.id), None)
        if row is None or row.point is None:
            text = f"{self.name}: archive {point.id} of {point.group!r} has been deleted"
            raise PointMissing(text, os_errno.ENOENT)
        found = row.point
        if "damaged" in found.flags:
            raise CorruptImage(f"{self.name}: archive {found.id}: {found.facts.get('reason')}")
        if found.disk(name) is None:
            names = ", ".join(disk.name for disk in found.disks[:10]) or "none"
            text = f"{self.name}: archive {found.id} has no disk {name!r}; it has {names}"
            raise PointMissing(text, os_errno.ENOENT)
        pieces, zeroes, content = await self.workers.run(self._look, found.id, name)
        others = {
            each.point.id: self._other(each.point.id, name)
            for each in rows
            if each is not row and each.point is not None and each.point.disk(name) is not None
        }
        return BorgDisk(
            self.workers,
            self.borg,
            found,
            name,
            pieces,
            zeroes,
            content,
            others,
            self._shared.leave,
        )

    def _look(self, archive: str, path: str) -> tuple[Pieces, frozenset[bytes], str]:
        pieces = self._archives.pieces(archive, path)
        content = content_of(pieces, lambda id_: chunk_of(self.borg, id_))
        return pieces, zero_ids(self.borg, pieces), content

    def _other(self, archive: str, path: str) -> Callable[[], Pieces]:
        return lambda: self._archives.pieces(archive, path)

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Archives and items; chunks by their CRC; chunks by their ids."""
        rows = await self._rows(None)
        if points is not None:
            wanted = {(point.group, point.id) for point in points}
            rows = [row for row in rows if row.point and (row.group, row.point.id) in wanted]
        return await self.workers.run(
            lambda: verify(self.borg, self._archives, rows, level, disk, advance=advance)
        )

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so; the last one ends borg."""
        await self._shared.close()


async def open_borg(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> BorgRepository:
    """Open the repository a SOURCE names.

    Files that its selector may name are listed however small they are.

    Raises:
        ConfigError: it is encrypted, and there is no passphrase.
        RepositoryError: no borg repository, not its passphrase, or borg is not installed.
        DiskError: it cannot be read.
    """

    def opened() -> BorgProcesses:
        _check_place(source)
        try:
            secret: str | None = passphrase()
        except ConfigError:
            secret = None  # it may need none, or borg's own variables give it
        return BorgProcesses(source.location, secret)

    borg = await workers.run(opened)
    return BorgRepository(workers, borg, asked_paths(source.selector))


def _check_place(source: Source) -> None:
    """Is there something that may be one? What borg reads whole must be short."""
    from nbdsrv.repository.opening import open_tree

    tree = open_tree(source)
    try:
        config = tree.find("config")
        data = tree.find("data")
        if config is None or config.directory or data is None or not data.directory:
            text = f"{tree.name}: no borg repository: it has no config or no data/"
            raise RepositoryError(text)
        if config.size > MAX_CONFIG:
            text = f"corrupt repository: {tree.full('config')}: {config.size} bytes"
            raise CorruptImage(text)
    finally:
        tree.close()
