"""A storage of Benji's, as a repository.

::

    benji:/srv/benji/data
        Listing ── heads ──> Points             group: the volume; id: the version's uid
        open_disk ── blocks ──> BenjiDisk       its only disk is called ``disk``

Benji's database is not asked: the storage has copies of all versions. A version that was removed
from the database but not yet from the storage, or the other way round, is as the storage has it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.benji.config import find
from nbdsrv.repository.benji.disk import BenjiDisk
from nbdsrv.repository.benji.hashing import BlockHash
from nbdsrv.repository.benji.keys import Keys, hmac_key
from nbdsrv.repository.benji.listing import Listing, Version
from nbdsrv.repository.benji.objects import Objects
from nbdsrv.repository.benji.versions import BlockMap, Head, read_blocks
from nbdsrv.repository.damage import Check
from nbdsrv.repository.repository import DiskFacts, Point, Repository, stamp_of
from nbdsrv.repository.shared import Shared
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Node

__all__ = ["DISK", "BenjiRepository", "open_benji"]

DISK = "disk"
"""A version has one disk, and no name for it."""
UNREADABLE = "unreadable"
"""The group of versions whose volume cannot be known."""
MAX_KEPT = 1 << 20
"""Blocks of maps that are kept: 48 MiB."""


class BenjiRepository(Repository):
    """One storage.

    Attributes:
        objects: of the storage.
        hashes: what its blocks are proven by.
        listing: of its versions.
    """

    kind = "benji"

    def __init__(self, objects: Objects, hashes: BlockHash, workers: Workers) -> None:
        """Becomes the owner of the objects' tree."""
        self.name = objects.tree.name
        self.objects = objects
        self.hashes = hashes
        self.workers = workers
        self.listing = Listing(objects)
        self._maps: OrderedDict[tuple[str, Node], BlockMap] = OrderedDict()
        self._lock = threading.Lock()
        self._shared = Shared(self.name, workers, objects.tree.close)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """By volume, then from old to new; heads are read once."""
        versions = await self.workers.run(self.listing.versions)
        points = [_point(version) for version in versions]
        points.sort(key=lambda point: (point.group, point.created, point.id))
        return [each for each in points if group in {None, each.group}]

    @property
    def unread(self) -> Sequence[str]:
        """Why some places were passed over when all points were last listed."""
        return self.listing.unread

    async def open_disk(self, point: Point, name: str) -> Disk:
        """The disk of a version; its list of blocks is read.

        Raises:
            PointMissing: the version is gone, or the disk another.
            CorruptImage: its list of blocks is broken.
        """
        self._shared.enter()
        try:
            return await self._open(point, name)
        except BaseException:
            await self._shared.leave()
            raise

    async def _open(self, point: Point, name: str) -> Disk:
        versions = await self.workers.run(self.listing.versions)
        version = next((each for each in versions if each.uid == point.id), None)
        if version is None:
            raise PointMissing(f"{self.name}: version {point.id!r} is gone")
        if version.head is None:
            raise CorruptImage(version.reason)
        if name != DISK:
            raise PointMissing(f"{self.name}: version {point.id!r} has one disk: {DISK!r}")
        blocks = await self.workers.run(self.blocks, version)
        others = {
            each.uid: lambda each=each: (each.head, self.blocks(each))
            for each in sorted(versions, key=_age)
            if each.head is not None
            and each.head.volume == version.head.volume
            and each.uid != version.uid
        }
        head = version.head
        shown = f"{self.name}#{head.volume}/{DISK}@{head.uid}"
        return BenjiDisk(
            self.workers,
            shown,
            self.objects,
            self.hashes,
            head,
            blocks,
            others,
            self._shared.leave,
            {
                "group": head.volume,
                "disk": DISK,
                "point": head.uid,
                "created": stamp_of(head.created),
                **_facts(head),
                **_disk_facts(head),
            },
        )

    def blocks(self, version: Version) -> BlockMap:
        """The blocks of a version. Blocking; any thread.

        Raises:
            CorruptImage: the list is broken, or gone.
        """
        key = (version.path, version.node)
        with self._lock:
            found = self._maps.get(key)
            if found is not None:
                self._maps.move_to_end(key)
                return found
        if version.head is None:
            raise CorruptImage(version.reason)
        try:
            found = read_blocks(self.objects, version.path, version.head)
        except ObjectMissing as error:
            raise PointMissing(f"{self.name}: version {version.uid!r} is gone") from error
        with self._lock:
            self._maps[key] = found
            while len(self._maps) > 1 and sum(map(len, self._maps.values())) > MAX_KEPT:
                self._maps.popitem(last=False)
        return found

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Versions, and are all blocks there? packs: their metadata too; chunks: their content.

        Raises:
            DiskError: the storage cannot be read at all.
        """
        from nbdsrv.repository.benji.verify import verify

        return await verify(self, level, points, disk, advance)

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so."""
        await self._shared.close()


def _age(version: Version) -> tuple[float, str]:
    return (version.head.created if version.head else 0.0), version.uid


def _point(version: Version) -> Point:
    head = version.head
    if head is None:
        facts = {"reason": version.reason}
        return Point(version.uid, UNREADABLE, version.node.modified, (), None, ("damaged",), facts)
    flags: list[str] = []
    if head.protected:
        flags.append("protected")
    if head.status != "valid":
        flags.append("partial")  # Benji has found broken blocks, or was not done
    disk = DiskFacts(DISK, head.size, _disk_facts(head))
    return Point(head.uid, head.volume, head.created, (disk,), None, tuple(flags), _facts(head))


def _facts(head: Head) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"snapshot": head.snapshot, "status": head.status}
    if head.labels:
        facts["labels"] = dict(head.labels)
    return facts


def _disk_facts(head: Head) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"block_size": head.block_size, **head.facts}
    if "bytes_written" in head.facts:
        facts["new_bytes"] = head.facts["bytes_written"]
    return facts


async def open_benji(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> BenjiRepository:
    """The storage a SOURCE names, or the configuration it names does.

    Versions are listed, so that a wrong key is noticed here.

    Raises:
        ConfigError: the configuration cannot be read, or a key is wanted.
        DiskError: there is no storage; the key is wrong.
    """
    opened: list[tuple[Objects, BlockHash]] = []
    try:
        await workers.look_up(lambda: opened.append(_open(source, passphrase)))
    except BaseException:  # cancelled: it has been opened all the same
        for objects, _ in opened:
            objects.tree.close()
        raise
    repository = BenjiRepository(*opened[0], workers)
    try:
        await workers.run(repository.listing.versions)
    except BaseException:
        await repository.close()
        raise
    return repository


def _open(source: Source, passphrase: Callable[[], str]) -> tuple[Objects, BlockHash]:
    location, configuration = find(source.location)
    tree = DirectoryTree(location)
    try:
        names = {node.name for node in tree.entries() if node.directory}
        if not names & {"versions", "blocks"}:
            text = "no storage of Benji's: it has neither versions nor blocks"
            raise RepositoryError(f"{location}: {text}; name its directory, or benji.yaml")
        storage = configuration.storage_at(location)
        keys = Keys(tree.name, configuration, passphrase)
        objects = Objects(tree, keys, hmac_key(configuration.path, storage))
        hashes = BlockHash(configuration.hash_function, configuration.path)
    except BaseException:
        tree.close()
        raise
    return objects, hashes
