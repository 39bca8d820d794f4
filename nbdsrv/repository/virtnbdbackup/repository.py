"""Directories virtnbdbackup wrote to, as a repository.

::

    virtnbdbackup:/backups/web1     one VM's directory, or one above several
        Listing ── chains ──> Points            one for each checkpoint, copy, difference
        open_disk ── OpenFiles ──> VirtnbdDisk  (a raw disk's image: RawDisk)

Nothing is written, and no checkpoint of libvirt's is asked for: the files alone are read.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, PointMissing, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.raw import RawDisk
from nbdsrv.repository.damage import Check
from nbdsrv.repository.repository import DiskFacts, Point, Repository
from nbdsrv.repository.shared import Shared
from nbdsrv.repository.virtnbdbackup.chains import PointFiles, chain_of
from nbdsrv.repository.virtnbdbackup.data_file import DataFile, open_data
from nbdsrv.repository.virtnbdbackup.disk import VirtnbdDisk
from nbdsrv.repository.virtnbdbackup.index import Index
from nbdsrv.repository.virtnbdbackup.listing import Directory, Listing
from nbdsrv.repository.virtnbdbackup.open_files import OpenFile, OpenFiles
from nbdsrv.store.tree import Tree

__all__ = ["DOUBT", "VirtnbdRepository", "open_virtnbdbackup"]

log = logging.getLogger(__name__)

DOUBT = "zeroes-in-doubt"
"""The flag of a point whose increments may have lost what the guest had zeroed."""
MAX_REASONS = 4


class VirtnbdRepository(Repository):
    """One directory tree.

    Attributes:
        tree: where it lies.
        listing: what is in it.
        files: of it that are open.
    """

    kind = "virtnbdbackup"

    def __init__(self, tree: Tree, workers: Workers) -> None:
        """Becomes the owner of ``tree``."""
        self.name = tree.name
        self.tree = tree
        self.workers = workers
        self.listing = Listing(tree)
        self.files = OpenFiles(tree, workers)
        self._shared = Shared(self.name, workers, tree.close)
        self._points: dict[int, tuple[Directory, Sequence[Point]]] = {}
        self._listing = threading.Lock()
        self._warned: set[str] = set()

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """By directory; what has been seen before is not read again."""
        return await self.workers.run(self._list, group)

    async def directories(self, group: str | None = None) -> Sequence[Directory]:
        """What the points are made of.

        Raises:
            DiskError: it cannot be read.
        """
        return await self.workers.run(self.listing.directories, group)

    def _list(self, group: str | None) -> Sequence[Point]:
        with self._listing:  # in whatever threads several ask
            return self._listed(group)

    def _listed(self, group: str | None) -> Sequence[Point]:
        found: list[Point] = []
        for directory in self.listing.directories(group):
            known = self._points.get(id(directory))
            if known is None or known[0] is not directory:
                points = [self._point(directory, each) for each in directory.points]
                # One for each directory that is there: those that are gone make room.
                gone = [key for key, (old, _) in self._points.items() if old.path == directory.path]
                for key in gone:
                    self._points.pop(key, None)
                known = self._points[id(directory)] = directory, points
            found += known[1]
        return found

    def _point(self, directory: Directory, files: PointFiles) -> Point:
        disks: list[DiskFacts] = []
        reasons: list[str] = []
        flags: list[str] = []
        doubts: list[str] = []
        parent: str | None = None
        for file in files.files:
            try:
                if file.disk in files.twice:
                    raise RepositoryError(_several(self.tree, directory, file))
                chain = chain_of(self.tree, file, directory.makers)
            except DiskError as error:
                reasons.append(str(error))
                continue
            reasons += [each.cut for each in chain if each.cut]
            doubts += [
                f"{each.node.name}: {why}" for each in chain if (why := directory.logs.doubt(each))
            ]
            if parent is None and len(chain) > 1:
                parent = chain[1].checkpoint
            disks.append(DiskFacts(file.disk, file.size, self._disk_facts(directory, chain)))
        if reasons:
            flags.append("partial" if disks else "damaged")
        facts: dict[str, Any] = {}
        if doubts:
            flags.append(DOUBT)
            facts["doubt"] = doubts[0] if len(doubts) == 1 else f"{doubts[0]} ({len(doubts)} files)"
        if reasons:
            facts["reason"] = "; ".join(dict.fromkeys(reasons[:MAX_REASONS]))
        checkpoints = {each.checkpoint for each in files.files if each.checkpoint}
        if len(checkpoints) == 1:
            facts["checkpoint"] = checkpoints.pop()
        versions = {directory.logs.version(each) for each in files.files} - {None}
        if versions:
            facts["tool_version"] = ", ".join(sorted(map(str, versions)))
        return Point(
            files.id,
            directory.group,
            files.created,
            tuple(disks),
            parent,
            tuple(flags),
            facts,
        )

    def _disk_facts(self, directory: Directory, chain: Sequence[DataFile]) -> Mapping[str, Any]:
        file = chain[0]
        facts: dict[str, Any] = {
            "mode": str(file.level),
            "file": file.path,
            "files": len(chain),
            "compression": "lz4" if file.meta and file.meta.packed else "none",
        }
        if file.meta is not None:
            facts |= {
                "new_bytes": file.meta.data_size,
                "date": file.meta.date,
                "stream_version": file.meta.version,
                "disk_format": file.meta.disk_format,
            }
        else:
            facts |= {"new_bytes": file.node.size, "disk_format": "raw"}
        return facts

    @property
    def unread(self) -> Sequence[str]:
        """Why some places were passed over when all points were last listed."""
        return self.listing.unread

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A disk of a point; its files are looked through when it is first read.

        Raises:
            PointMissing: it has no such disk, or has been deleted.
            CorruptImage: a file is missing or broken, which is named.
        """
        self._shared.check()
        directory, file = await self._find(point, name)
        chain = chain_of(self.tree, file, directory.makers)
        shown = f"{self.name}#{point.group}/{name}@{point.id}"
        self._warn(point, shown, chain)
        facts = {
            "group": point.group,
            "disk": name,
            "point": point.id,
            "created": point.stamp,
            "parent": point.parent,
            **self._disk_facts(directory, chain),
        }
        if file.plain:
            return await self._open_image(file, facts)
        others = await self.workers.run(self._others, directory, point.id, name, chain)
        opened: list[OpenFile] = []
        self._shared.enter()
        try:
            for each in chain:
                opened.append(await self.files.acquire(each))  # noqa: PERF401 - see below
        except BaseException:
            await self._leave(opened)  # those that are open by now
            raise
        return VirtnbdDisk(
            self.workers,
            shown,
            opened,
            others,
            self._indexes,
            lambda: self._leave(opened),
            facts,
        )

    def _warn(self, point: Point, shown: str, chain: Sequence[DataFile]) -> None:
        """Once for each disk: clients open it again and again."""
        if shown in self._warned:
            return
        self._warned.add(shown)
        for each in chain:
            if each.cut:
                log.warning("virtnbdbackup.cut disk=%s why=%s", shown, each.cut)
        if DOUBT in point.flags:
            why = point.facts.get("doubt")
            log.warning("virtnbdbackup.zeroes_in_doubt disk=%s why=%s", shown, why)

    async def _open_image(self, file: DataFile, facts: Mapping[str, object]) -> RawDisk:
        opened: list[ImageFile] = []
        try:
            await self.workers.look_up(lambda: opened.append(open_data(self.tree, file.path)))
        except BaseException:  # cancelled: it has been opened all the same
            for each in opened:
                each.close()
            raise
        return _PlainDisk(self.workers, opened[0], facts)

    async def _find(self, point: Point, name: str) -> tuple[Directory, DataFile]:
        for directory in await self.directories(point.group):
            for files in directory.points:
                if files.id != point.id:
                    continue
                for file in files.files:
                    if file.disk == name and name in files.twice:
                        raise CorruptImage(_several(self.tree, directory, file))
                    if file.disk == name:
                        return directory, file
                names = ", ".join(each.disk for each in files.files)
                text = f"{self.name}: point {point.id} of {point.group!r} has no disk {name!r}"
                raise PointMissing(f"{text}; it has {names}")
        raise PointMissing(f"{self.name}: point {point.id} of {point.group!r} is gone")

    def _others(
        self, directory: Directory, id_: str, disk: str, chain: Sequence[DataFile]
    ) -> Mapping[str, Sequence[DataFile]]:
        """The chains of the disk's other points that have a file in common with this one."""
        mine = {each.path for each in chain}
        found: dict[str, Sequence[DataFile]] = {}
        for files in directory.points:
            for file in files.files:
                if files.id == id_ or file.disk != disk or disk in files.twice or file.plain:
                    continue
                try:
                    other = chain_of(self.tree, file, directory.makers)
                except DiskError:
                    continue  # it is damaged: nobody can read what it was
                if any(each.path in mine for each in other):
                    found[files.id] = other
        return found

    async def _indexes(self, files: Sequence[DataFile]) -> Sequence[Index]:
        found: list[Index] = []
        for each in files:
            used = await self.files.acquire(each)
            try:
                found.append(await self.files.indexed(used))
            finally:
                await self.files.release(used)
        return found

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Chains and frames; packs: also the sums beside the files; chunks: also what LZ4 proves.

        Raises:
            DiskError: the repository cannot be read at all.
        """
        from nbdsrv.repository.virtnbdbackup.verify import verify

        return await verify(self, level, points, disk, advance)

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so."""
        await self._shared.close()

    async def _leave(self, opened: Sequence[OpenFile]) -> None:
        try:
            for each in opened:
                await self.files.release(each)
        finally:
            await self._shared.leave()


class _PlainDisk(RawDisk):
    """The plain image of a raw disk; without ``facts`` an overlay would not know its point."""

    def __init__(self, workers: Workers, file: ImageFile, facts: Mapping[str, object]) -> None:
        super().__init__(workers, file)
        self._facts = facts

    @property
    def facts(self) -> Mapping[str, object]:
        """What is known of the point."""
        return self._facts


def _several(tree: Tree, directory: Directory, file: DataFile) -> str:
    where = tree.full(directory.path)
    return f"{where}: several files are {file.disk} at {file.checkpoint or file.level}"


async def open_virtnbdbackup(
    source: Source, workers: Workers, passphrase: Callable[[], str]
) -> VirtnbdRepository:
    """The repository a SOURCE names. Its files are not encrypted.

    Raises:
        DiskError: there is no such directory.
    """
    from nbdsrv.repository.opening import open_tree

    del passphrase
    return VirtnbdRepository(await workers.look_up(open_tree, source), workers)
