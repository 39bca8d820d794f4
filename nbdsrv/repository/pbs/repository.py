"""A datastore of Proxmox Backup Server as a repository.

::

    PbsRepository ── points() ──> Listing ── manifests ──> Point ...
         └── open_disk() ─ lock, key, index ──> PbsDisk ── Chunks ──> .chunks/
    Shared  <── closed behind the repository and the last disk

Nothing in it is written, and no server has to run.
"""

import errno as os_errno
from collections.abc import Callable, Sequence
from functools import partial

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.formats.turns import in_turns
from nbdsrv.repository.damage import Check
from nbdsrv.repository.opening import open_tree
from nbdsrv.repository.pbs.chunks import Chunks
from nbdsrv.repository.pbs.disk import PbsDisk
from nbdsrv.repository.pbs.index import FixedIndex, open_index
from nbdsrv.repository.pbs.keys import KEYFILE, CryptKey, load_keys
from nbdsrv.repository.pbs.layout import CHUNKS
from nbdsrv.repository.pbs.listing import Listing, Row
from nbdsrv.repository.pbs.lock import hold, release
from nbdsrv.repository.pbs.manifest import Archive
from nbdsrv.repository.pbs.verify import verify
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.shared import Shared
from nbdsrv.store.tree import Tree

__all__ = ["PbsRepository", "open_pbs"]


class PbsRepository(Repository):
    """An open datastore. Belongs to one event loop."""

    kind = "pbs"

    def __init__(self, tree: Tree, keys: Sequence[CryptKey], workers: Workers) -> None:
        """Becomes the owner of ``tree``."""
        self.name = tree.name
        self._tree = tree
        self._workers = workers
        self._shared = Shared(tree.name, workers, tree.close)
        self._listing = Listing(tree, keys)
        self._keyed = bool(keys)
        self._chunks = Chunks(tree)

    async def groups(self) -> Sequence[str]:
        """By listings alone: no manifest is read."""
        return await self._workers.run(self._listing.groups)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """Each manifest is read once, and again when its directory has changed."""
        return [row.point for row in await self._workers.run(self._listing.rows, group)]

    @property
    def unread(self) -> Sequence[str]:
        """Why some places were passed over when all points were last listed."""
        return self._listing.unread

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A disk of a snapshot; while it is open its directory is locked against pruning.

        Raises:
            PointMissing: it has no such disk, or has been removed.
            RepositoryError: it is being written or removed, or its key is not there.
            CorruptImage: manifest or index are damaged.
        """
        self._shared.enter()
        opened: list[tuple[int | None, FixedIndex]] = []
        try:
            return await self._workers.run(self._open, point, name, opened)
        except BaseException:  # cancelled: it has been opened all the same
            for lock, index in opened:
                index.close()
                release(lock)
            await self._shared.leave()
            raise

    def _open(
        self, point: Point, name: str, opened: list[tuple[int | None, FixedIndex]]
    ) -> PbsDisk:
        """In a thread."""
        rows = self._listing.rows(point.group)
        row = next((row for row in rows if row.point.id == point.id), None)
        if row is None:
            text = f"{self.name}: point {point.id} of {point.group!r} has been removed"
            raise PointMissing(text, os_errno.ENOENT)
        if row.manifest is None:
            raise CorruptImage(str(row.point.facts["reason"]))
        disk = row.point.disk(name)
        if disk is None:
            raise self._no_disk(row, name)
        name, archive = disk.name, row.archives[disk.name]
        key = self._key(row, archive)
        lock = hold(self._tree, row.path)
        try:
            index = self._index(row, archive)
        except BaseException:
            release(lock)
            raise
        opened.append((lock, index))
        facts = {
            "group": point.group,
            "disk": name,
            "point": point.id,
            "created": row.point.stamp,
            **row.point.facts,
            "crypt_mode": archive.crypt_mode,
        }
        others = {
            each.point.id: partial(self._index, each, each.archives[name])
            for each in rows
            if each is not row and name in each.archives
        }
        full = f"{self.name}#{point.group}/{name}@{point.id}"
        return PbsDisk(
            self._workers,
            full,
            index,
            self._chunks,
            key,
            others,
            facts,
            partial(self._leave, lock),
        )

    def _index(self, row: Row, archive: Archive) -> FixedIndex:
        path = f"{row.path}/{archive.filename}"
        return open_index(self._tree, path, size=archive.size, csum=bytes.fromhex(archive.csum))

    def _no_disk(self, row: Row, name: str) -> PointMissing | CorruptImage:
        if "reason" in row.point.facts:
            return CorruptImage(f"corrupt repository: {row.point.facts['reason']}")
        names = ", ".join(row.archives) or "none"
        text = f"{self.name}: point {row.point.id} of {row.point.group!r} has no disk {name!r}"
        return PointMissing(f"{text}; it has {names}", os_errno.ENOENT)

    def _key(self, row: Row, archive: Archive) -> CryptKey | None:
        """The key an archive takes; None for plain ones."""
        if archive.crypt_mode != "encrypt":
            return None
        assert row.manifest is not None
        key = self._listing.key_of(row.manifest)
        if key is None:
            told = row.manifest.fingerprint
            which = f" with the key {told[:16]}..." if told else ""
            text = f"{self.name}: point {row.point.id} of {row.point.group!r} is encrypted{which}"
            other = ", and that is none of the keys given" if self._keyed else ""
            raise RepositoryError(f"{text}{other}; name its key file in {KEYFILE}")
        return key

    async def _leave(self, lock: int | None) -> None:
        try:
            await self._workers.look_up(release, lock)
        finally:
            await self._shared.leave()

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Manifests, indexes and chunks; each chunk once.

        structure: manifests, signatures, checksums of indexes, every chunk is there; packs: also
        the CRC of every chunk and the checksums of blobs; chunks: also the digest of every chunk's
        content, which for encrypted ones takes the key.
        """
        self._shared.enter()
        try:
            rows = await self._workers.run(self._chosen, points)
            steps = verify(
                self._tree, self._listing, rows, level, disk, advance, every=points is None
            )
            return await in_turns(self._workers, steps)
        finally:
            await self._shared.leave()

    def _chosen(self, points: Sequence[Point] | None) -> Sequence[Row]:
        if points is None:
            return self._listing.rows()
        wanted = {(point.group, point.id) for point in points}
        names = sorted({point.group for point in points})
        rows = (row for group in names for row in self._listing.rows(group))
        return [row for row in rows if (row.point.group, row.point.id) in wanted]

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so; the last one closes the tree."""
        await self._shared.close()


async def open_pbs(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> PbsRepository:
    """The datastore a SOURCE names, and the keys that ``NBDSRV_PBS_KEYFILE`` names.

    Raises:
        ConfigError: a key file cannot be read, or wants a passphrase and there is none.
        RepositoryError: this is no datastore, or the passphrase opens no key file.
        StoreError: there is no such directory.
    """
    tree = await workers.run(open_tree, source)
    try:
        node = await workers.run(tree.find, CHUNKS)
        if node is None or not node.directory:
            text = f"{source.text}: no datastore of Proxmox Backup Server: it has no {CHUNKS}"
            raise RepositoryError(text)
        keys = await workers.run(load_keys, passphrase)
    except BaseException:
        await workers.look_up(tree.close)
        raise
    return PbsRepository(tree, keys, workers)
