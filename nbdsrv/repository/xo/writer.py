"""Writing a point into a Xen Orchestra repository.

::

    begin     <vm>.lock ── stamp ── which disks do points name? is the parent there?
    disk      what crashed backups left goes ── tip of the chain ── DiskWriter ── blocks
    commit    bat, header, footer ── checksums ── aliases ── lock still ours? ── <stamp>.json
    abort     blocks go; a crash leaves them, and the next backup of the disk removes them

Rule: everything is durable before the metadata that names it appears, and that appears whole. The
lock is Xen Orchestra's own: its jobs and we never write to a VM at the same time.
"""

import posixpath
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import blake3
import msgspec

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, PointMissing, RepositoryError
from nbdsrv.repository.destination import Occasion, Storage
from nbdsrv.repository.repository import DiskFacts, Point, PointWriter
from nbdsrv.repository.xo import filters
from nbdsrv.repository.xo.checksums import About, checksum_name, encode
from nbdsrv.repository.xo.layout import POINT, VM_BACKUPS, stamp_of, time_of, vdi_directory
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.writer_cache import drop_cache, is_immutable, write_cache
from nbdsrv.repository.xo.writer_disk import XoDiskWriter
from nbdsrv.repository.xo.writer_lineage import Lineage, read_lineage, sweep
from nbdsrv.repository.xo.writer_lock import VmLock
from nbdsrv.repository.xo.writer_parent import base_of
from nbdsrv.repository.xo.writer_place import Place, is_temporary
from nbdsrv.repository.xo.writer_points import XoDisk, XoPoint, named_disks
from nbdsrv.repository.xo.writer_records import JOB, StoredDisk, machine_of, metadata_of
from nbdsrv.repository.xo.writer_vessel import DIRECTORY, FILE, DirectoryVessel, FileVessel, Vessel
from nbdsrv.repository.xo.writer_vhd import footer_of, header_of

__all__ = ["XoPointWriter", "begin"]

MAX_DISKS = 1000
MAX_SIZE = 64 << 40
"""Bytes of a disk: a bat of 32 MiB."""
_ABOUT = frozenset({"mode", "reason", "cbt", "read_bytes", "rechecked_bytes"})


async def begin(
    place: Place,
    remote: Remote,
    workers: Workers,
    occasion: Occasion,
    storage: Storage,
    parent: XoPoint | None = None,
) -> "XoPointWriter":
    """Begin a point; end it with ``commit`` or ``abort``.

    Args:
        place: where it is written.
        remote: the same, to be read.
        workers: threads for everything that blocks.
        occasion: what it is made for.
        storage: how disks are stored.
        parent: what its disks are told in terms of; None: of zeroes.

    Raises:
        RepositoryError: a job is at work on this VM; ``PointMissing``: the parent is gone.
        StoreError: the repository cannot be written.
    """
    writer = XoPointWriter(place, remote, workers, occasion, storage, parent)
    try:
        await workers.run(writer.start)
    except BaseException:
        await writer.abort()
        raise
    return writer


class XoPointWriter(PointWriter):
    """A point that is being written. Belongs to one event loop.

    Cancellation: a call that is cancelled leaves a point that can only be aborted.

    Attributes:
        vm: uuid of the VM.
        stamp: the point's id.
    """

    def __init__(
        self,
        place: Place,
        remote: Remote,
        workers: Workers,
        occasion: Occasion,
        storage: Storage,
        parent: XoPoint | None,
    ) -> None:
        """Use ``begin``."""
        self._machine = machine_of(occasion)
        self.vm = self._machine.uuid
        self.stamp = ""
        self._place = place
        self._remote = remote
        self._workers = workers
        self._occasion = occasion
        self._storage = storage
        self._parent = parent
        self._lock = VmLock(place, self.vm)
        self._named: set[str] | None = None
        self._disks: dict[str, tuple[str, XoDiskWriter]] = {}
        self._begun: list[tuple[str, XoDiskWriter]] = []  # also those nobody has got any more
        self._ended = False

    @property
    def _directory(self) -> str:
        return f"{VM_BACKUPS}/{self.vm}"

    def start(self) -> None:
        """Take the lock and look around. Blocking; raises as ``begin``."""
        made = self._place.make_directory(self._directory)
        self._place.settle(made)
        self._lock.take()
        names = [node.name for node in self._remote.tree.entries(self._directory)]
        stamps = [time_of(name.partition(".")[0]) or 0 for name in names]
        # Also if the host that made the latest one has a clock that is ahead of ours.
        self.stamp = stamp_of(max([time.time(), *(stamp + 1 for stamp in stamps)]))
        if self._parent is not None and self._remote.tree.find(self._parent.key) is None:
            text = f"{self._place.full(self._parent.key)} has been deleted meanwhile"
            raise PointMissing(f"{text}; begin from another point")
        for name in filter(is_temporary, names):
            self._place.remove(f"{self._directory}/{name}")
        self._named = named_disks(self._remote, self.vm)

    # --- disks ---------------------------------------------------------------------------------

    async def disk(
        self, name: str, size: int, facts: Mapping[str, Any] | None = None
    ) -> XoDiskWriter:
        """Add a disk.

        Raises:
            UnsupportedImage: it is too large for the layout.
            RepositoryError: there is one of that name.
            StoreError: the repository cannot be written.
        """
        if not name or name in self._disks or len(self._disks) >= MAX_DISKS or self._ended:
            raise RepositoryError(
                f"{self._place.root}: a disk needs a name of its own, and {name!r} is none; a"
                f" point has {MAX_DISKS} disks at most"
            )
        if not 0 <= size <= MAX_SIZE:
            raise RepositoryError(f"{self._place.root}: {name}: {size} bytes; 64 TiB is the limit")
        directory, writer = await self._workers.run(self._begin_disk, name, size)
        writer.facts.update(facts or {})
        self._disks[name] = directory, writer
        return writer

    def _begin_disk(self, name: str, size: int) -> tuple[str, XoDiskWriter]:
        place, remote, storage = self._place, self._remote, self._storage
        directory = vdi_directory(self.vm, JOB, self._machine.vdi(name))
        place.settle(place.make_directory(directory))
        lineage = read_lineage(remote, directory)
        if self._named is not None:
            lineage = sweep(place, remote, lineage, self._named)
        before = self._before(name, directory)
        base = None
        if before is not None and before.size <= size:
            base = base_of(
                remote, lineage, before.unique_id, before.size, storage.layout, storage.packing
            )
        layout, packing = storage.layout or DIRECTORY, storage.packing or filters.BROTLI
        if base is not None:
            layout, packing = base.member.layout, base.member.packing
        unique_id = self._machine.snapshot(name)
        if any(each.unique_id == unique_id for each in lineage.members.values()):
            unique_id = uuid.uuid4()  # the same snapshot again; ids in a directory are unique
        vessel = self._vessel(layout, packing, directory, lineage, size)
        lost = base is None and self._parent is not None
        writer = XoDiskWriter(self._workers, name, size, unique_id, vessel, base, lost=lost)
        self._begun.append((directory, writer))
        return directory, writer

    def _before(self, name: str, directory: str) -> XoDisk | None:
        disk = self._parent.disk(name) if self._parent is not None else None
        return disk if disk is not None and disk.directory == directory else None

    def _vessel(
        self, layout: str, packing: str, directory: str, lineage: Lineage, size: int
    ) -> Vessel:
        # What lies there under this name is no point's, or the stamp would be a later one.
        taken = {posixpath.basename(each) for each in (*lineage.members, *lineage.broken)}
        if any(name.partition(".")[0] >= self.stamp for name in taken):
            text = f"{self._place.full(directory)}: holds a disk of a time to come"
            raise RepositoryError(f"{text}: is this host's clock right?")
        if layout == FILE:
            return FileVessel(self._place, directory, self.stamp, _whole(size))
        return DirectoryVessel(
            self._place, self._remote.sealing, directory, self.stamp, packing, _whole(size)
        )

    # --- the end -------------------------------------------------------------------------------

    async def commit(self, facts: Mapping[str, Any] | None = None) -> Point:
        """Make it durable, then visible. No call of its disks may be under way.

        Args:
            facts: ``labels`` and ``consistency``; the VM's configuration was given to ``begin``.
        """
        if self._ended:
            text = f"{self._place.root}: this point is committed or aborted already"
            raise RepositoryError(text)
        for _, disk in self._disks.values():
            disk.check()
        if not self._disks:
            raise RepositoryError(f"{self._place.root}: a point of Xen Orchestra has a disk")
        await self._workers.run(self._commit, facts or {})
        self._ended = True
        await self._workers.run(self._lock.release)
        created = time_of(self.stamp) or 0
        disks = [DiskFacts(disk.name, disk.size) for _, disk in self._disks.values()]
        parent = self._parent.id if self._parent is not None else None
        return Point(self.stamp, self._occasion.group, created, tuple(disks), parent)

    def _commit(self, facts: Mapping[str, Any]) -> None:
        place, remote = self._place, self._remote
        created = time_of(self.stamp) or 0
        stored = [
            self._finish_disk(directory, disk, created, facts)
            for directory, disk in self._disks.values()
        ]
        for _, disk in self._disks.values():
            disk.vessel.publish()
        content = msgspec.json.encode(metadata_of(self._machine, self._occasion, created, stored))
        cached = not is_immutable(remote)
        self._lock.check()
        if cached:
            drop_cache(place, self.vm)
        place.publish(f"{self._directory}/{self.stamp}{POINT}", remote.sealing.seal(content))
        if cached:
            write_cache(place, remote, self.vm)

    def _finish_disk(
        self, directory: str, disk: XoDiskWriter, created: float, facts: Mapping[str, Any]
    ) -> StoredDisk:
        disk.count_untold()
        size, parent = _whole(disk.size), disk.base.member if disk.base is not None else None
        header = header_of(
            size,
            parent.unique_id if parent is not None else None,
            posixpath.basename(parent.path) if parent is not None else "",
            created,
        )
        footer = footer_of(size, disk.unique_id, created, differencing=parent is not None)
        disk.vessel.finish(header, footer)
        known = {key: value for key, value in disk.facts.items() if key in _ABOUT}
        about = About(
            uuid=str(disk.unique_id),
            parent=str(parent.unique_id) if parent is not None else "",
            name=disk.name,
            size=disk.size,
            point=self.stamp,
            header=blake3.blake3(header).hexdigest(),
            footer=blake3.blake3(footer).hexdigest(),
            bat=blake3.blake3(disk.vessel.bat).hexdigest(),
            labels=dict(facts.get("labels") or {}),
            consistency=str(facts.get("consistency") or ""),
            **known,
        )
        about = msgspec.convert(msgspec.to_builtins(about), About)  # as strictly as it is read
        content = encode(about, disk.sums, self._remote.sealing)
        self._place.publish(f"{directory}/{checksum_name(about.uuid)}", content)
        return StoredDisk(
            disk.name,
            disk.size,
            about.uuid,
            posixpath.relpath(disk.vessel.path, self._directory),
            about.parent,
            disk.vessel.length,
        )

    async def abort(self) -> None:
        """Forget it. Nothing after ``commit``; idempotent. No call may be under way."""
        if self._ended:
            return
        self._ended = True
        await self._workers.run(self._abort)

    def _abort(self) -> None:
        visible = True
        with suppress(DiskError):
            # A commit that fails at its very end may have made the point visible: then it stays.
            visible = self._remote.tree.find(f"{self._directory}/{self.stamp}{POINT}") is not None
        for directory, disk in self._begun:
            disk.close()
            disk.vessel.close()
            if not visible:
                disk.vessel.discard()
                with suppress(DiskError):
                    self._place.remove(f"{directory}/{checksum_name(str(disk.unique_id))}")
        self._lock.release()


def _whole(size: int) -> int:
    """VHDs have whole sectors."""
    return -(-size // 512) * 512
