"""A repository of Xen Orchestra, read only.

::

    XoRepository ── points() ──> Listing ── JSON, chains ──> Point ...
         └── open_disk() ── chain ── layers ──> XoDisk          delta: VHDs
                       └── XVA ──> XvaDisk                      full
    Shared  <── closed behind the repository and the last disk

No job of Xen Orchestra is waited for or disturbed: nothing is locked, nothing written, and what a
merge is changing is refused or read around. The key of an encrypted one is the remote's setting,
in NBDSRV_PASSPHRASE.
"""

import errno as os_errno
from collections.abc import Callable, Sequence
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.damage import Check
from nbdsrv.repository.opening import open_tree
from nbdsrv.repository.repository import Point, Repository
from nbdsrv.repository.shared import Shared
from nbdsrv.repository.xo.chain import Chain
from nbdsrv.repository.xo.checks import load_all_checks
from nbdsrv.repository.xo.disk import XoDisk
from nbdsrv.repository.xo.layout import VM_BACKUPS
from nbdsrv.repository.xo.listing import Listing, Row
from nbdsrv.repository.xo.records import DiskRecord
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.sealing import read_identity, read_sealing
from nbdsrv.repository.xo.tables import make_layers, mend_tables, read_tables
from nbdsrv.repository.xo.xva import open_xva_disk

__all__ = ["XoRepository", "open_xo"]


class XoRepository(Repository):
    """An open repository. Belongs to one event loop."""

    kind = "xo"

    def __init__(self, remote: Remote, workers: Workers) -> None:
        """Becomes the owner of ``remote``'s tree."""
        self.name = remote.name
        self.identity = remote.identity
        self._remote = remote
        self._workers = workers
        self._shared = Shared(self.name, workers, remote.tree.close)
        self._listing = Listing(remote)

    async def groups(self) -> Sequence[str]:
        """The names of the VMs that have points."""
        return await self._workers.run(self._listing.groups)

    async def points(self, group: str | None = None) -> Sequence[Point]:
        """All points, or those of the VM of that name or id; what is known is not read again."""
        return [row.point for row in await self.rows(group)]

    async def rows(self, group: str | None = None) -> Sequence[Row]:
        """The same with where everything lies.

        Raises:
            StoreError: the repository cannot be read.
        """
        self._shared.check()
        return await self._workers.run(self._listing.rows, group)

    @property
    def unread(self) -> Sequence[str]:
        """Why some places were passed over when all points were last listed."""
        return self._listing.unread

    async def open_disk(self, point: Point, name: str) -> Disk:
        """A disk of a point, its whole chain proven anew.

        Raises:
            PointMissing: it has no such disk, or has been removed.
            CorruptImage: the disk or one of its parents is damaged, or being merged.
            StoreError: it cannot be read.
        """
        rows = await self.rows(str(point.facts.get("vm_uuid") or point.group))
        row = next((row for row in rows if row.point.id == point.id), None)
        if row is None:
            text = f"{self.name}: point {point.id} of {point.group!r} has been removed"
            raise PointMissing(text, os_errno.ENOENT)
        record = _record(self.name, row, name)
        if row.point.facts.get("layout") == "xva":
            facts = _point_facts(row, record)
            return await open_xva_disk(self._remote, record, self._workers, facts)
        self._shared.enter()
        opened: list[XoDisk] = []
        try:
            await self._workers.run(self._open, row, record, rows, opened)
        except BaseException:
            if opened:  # cancelled: it has been opened all the same
                await opened[0].close()
            else:
                await self._shared.leave()
            raise
        return opened[0]

    def _open(
        self, row: Row, record: DiskRecord, rows: Sequence[Row], opened: list[XoDisk]
    ) -> None:
        """In a thread."""
        remote = self._remote
        chain, merges = self._listing.chain(row.vm, record)
        try:
            checks = load_all_checks(remote, chain.files)
            layers = make_layers(chain, checks, distant=remote.tree.distant)
            read_tables(layers)
            mend_tables(layers, checks)
            changing = {path for merge in merges.values() for path in merge.changing}
            disk = XoDisk(
                self._workers,
                f"{self.name}#{row.point.group}/{record.name}@{row.point.id}",
                chain,
                layers,
                checks,
                _since(chain, rows, changing),
                _facts(row, record, chain, len(checks)),
                self._shared.leave,
            )
        except BaseException:
            chain.close()
            raise
        opened.append(disk)

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Look for damage; see ``verify``."""
        from nbdsrv.repository.xo.verify import verify

        rows, unread = await self.rows(), self._listing.unread
        check = await verify(self._remote, rows, self._workers, level, points, disk, advance)
        if points is None:
            check.unread += unread
        return check

    async def close(self) -> None:
        """Idempotent. Disks that are open stay so; the last one closes the tree."""
        await self._shared.close()


async def open_xo(source: Source, workers: Workers, passphrase: Callable[[], str]) -> XoRepository:
    """Open a repository, and prove its key.

    Raises:
        ConfigError: a key is wanted and there is none.
        RepositoryError: it is no repository of Xen Orchestra, or the key is wrong.
        DiskError: it cannot be read.
    """
    opened: list[Remote] = []
    try:
        await workers.run(_open_remote, source, passphrase, opened)
    except BaseException:
        for remote in opened:
            await workers.look_up(remote.tree.close)
        raise
    return XoRepository(opened[0], workers)


def _open_remote(source: Source, passphrase: Callable[[], str], opened: list[Remote]) -> None:
    tree = open_tree(source)
    try:
        sealing = read_sealing(tree, passphrase)
        remote = Remote(tree, sealing, read_identity(tree, sealing))
        node = tree.find(VM_BACKUPS)
        if node is None or not node.directory:
            text = f"{tree.name}: no backups of VMs by Xen Orchestra: there is no {VM_BACKUPS}/"
            raise RepositoryError(f"{text}; give the remote's own directory", os_errno.ENOENT)
    except BaseException:
        tree.close()
        raise
    opened.append(remote)


def _record(name: str, row: Row, disk: str) -> DiskRecord:
    """Where a disk of a point is."""
    facts = row.point.disk(disk)
    wanted = facts.name if facts is not None else disk
    record = next((each for each in row.records if each.name == wanted), None)
    if record is not None and wanted in row.paths:
        return record
    reason = row.point.facts.get("reason")
    if reason is not None and (record is not None or not row.records):
        raise CorruptImage(str(reason))
    names = ", ".join(row.paths) or "none"
    text = f"{name}: point {row.point.id} of {row.point.group!r} has no disk {disk!r}"
    raise PointMissing(f"{text}; it has {names}", os_errno.ENOENT)


def _since(chain: Chain, rows: Sequence[Row], changing: set[str]) -> dict[str, int]:
    """The points whose disks are in the chain, newest first, to their numbers in it."""
    points = {record.path: row.point.id for row in rows for record in row.records}
    return {
        points[source.path]: number
        for number, source in enumerate(chain.files)
        if number and source.path in points and source.path not in changing
    }


def _point_facts(row: Row, record: DiskRecord) -> dict[str, Any]:
    return {
        "group": row.point.group,
        "disk": record.name,
        "point": row.point.id,
        "created": row.point.stamp,
        "parent": row.point.parent,
        "vm_uuid": row.vm,
        "vdi_uuid": record.vdi,
    }


def _facts(row: Row, record: DiskRecord, chain: Chain, checked: int) -> dict[str, Any]:
    top = chain.files[0]
    return {
        **_point_facts(row, record),
        "device": record.device,
        "vhd_uuid": str(top.unique_id),
        "mode": "incremental" if top.differencing else "full",
        "layout": ", ".join(dict.fromkeys(each.layout for each in chain.files)),
        "compression": ", ".join(dict.fromkeys(each.compression for each in chain.files)),
        "encryption": row.point.facts.get("encryption", "none"),
        "chain": len(chain.files),
        "block_size": top.header.block_size,
        "with_checksums": checked,
    }
