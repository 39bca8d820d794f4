"""Writing a point: begun under a lease, filled disk by disk, committed as one object.

::

    begin     lease ── condemned/ ──────────────────────────── what must not be used is known
    disk      parent's root ── DiskWriter ── data, zero        packs, two at a time
    commit    last packs ── pages, roots ── index ── lease still held? ── points/<group>/<ulid>.pt
    abort     what was put stays, unnamed: the next writer adopts it, or a collector takes it away

Rule: everything a point names is durable before the point is put, and after an error none is.
"""

import socket
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.repository.native.disk_writer import NativeDiskWriter
from nbdsrv.repository.native.entry import Place
from nbdsrv.repository.native.known import Known
from nbdsrv.repository.native.layout import is_text, new_ulid, point_key, point_prefix, ulid_of
from nbdsrv.repository.native.lease import Lease
from nbdsrv.repository.native.listing import described
from nbdsrv.repository.native.map_writer import MapWriter
from nbdsrv.repository.native.parent_map import ParentMap
from nbdsrv.repository.native.point import MAX_POINT, DiskRecord, PointRecord, Ref, encode_point
from nbdsrv.repository.native.sealing import DEFAULT_LEVEL
from nbdsrv.repository.native.stock import Stock, storing_level
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.repository import Point, PointWriter
from nbdsrv.store.store import ObjectMissing

__all__ = ["NativePointWriter", "begin"]

MAX_DISKS = 1000
_OF_DISK = frozenset({"mode", "reason", "cbt", "read_bytes", "rechecked_bytes"})
_OF_POINT = frozenset({"labels", "consistency", "blobs", "lock_until", "created", "host", "id"})


async def begin(
    vault: Vault,
    workers: Workers,
    group: str,
    parent: PointRecord | None = None,
    *,
    level: int = DEFAULT_LEVEL,
) -> "NativePointWriter":
    """Begin a point of ``group``; end it with ``commit`` or ``abort``.

    Args:
        vault: stays open.
        workers: threads for everything that blocks.
        group: the VM's name.
        parent: what its disks are told in terms of, disk by disk of the same name; None: of zeroes.
        level: zstd's, 0 for none.

    Raises:
        RepositoryError: no such group can be; ``PointMissing``: the parent has been pruned.
        CorruptImage: the parent's object is damaged.
        StoreError: the store cannot be written.
    """
    try:
        point_prefix(group)
    except ValueError as error:
        raise RepositoryError(f"{vault.name}: {error}") from error
    storing_level(level)
    lease = Lease(vault.store, "writer")

    def start() -> Known:
        lease.take()
        if parent is not None:
            _still_there(vault, parent)
        return Known(vault)

    try:
        known = await workers.run(start)
    except BaseException:
        await workers.run(lease.release)
        raise
    return NativePointWriter(Stock(vault, workers, known, level), lease, group, parent)


class NativePointWriter(PointWriter):
    """A point that is being written. Belongs to one event loop.

    Cancellation: a call that is cancelled leaves a point that can only be aborted.
    """

    def __init__(self, stock: Stock, lease: Lease, group: str, parent: PointRecord | None) -> None:
        """Use ``begin``."""
        self._stock = stock
        self._vault = stock.vault
        self._workers = stock.workers
        self._lease = lease
        self._group = group
        self._parent = parent
        self._disks: dict[str, NativeDiskWriter] = {}
        self._ended = False

    async def disk(
        self, name: str, size: int, facts: Mapping[str, Any] | None = None
    ) -> NativeDiskWriter:
        """Add a disk.

        Args:
            name: of the disk, unique in the point.
            size: bytes.
            facts: ``mode``, ``reason``, ``cbt``, ``read_bytes``, ``rechecked_bytes`` of its
                ``DiskRecord``.

        Raises:
            CorruptImage: the parent's map of this disk is damaged; back up without a parent.
            RepositoryError: there is one of that name, a point cannot hold it, or the disk is too
                large for the chunks.
        """
        self._stock.check()
        if not name or name in self._disks or len(self._disks) >= MAX_DISKS:
            raise RepositoryError(
                f"{self._vault.name}: a disk needs a name of its own, and {name!r} is none; a point"
                f" has {MAX_DISKS} disks at most"
            )
        if not is_text(name):
            text = f"{self._vault.name}: a disk's name is UTF-8, and {name!r} is not"
            raise RepositoryError(f"{text}; choose another")
        map_ = await self._workers.run(self._map, name, size)
        writer = NativeDiskWriter(self._stock, name, map_, _only(facts, _OF_DISK))
        self._disks[name] = writer
        return writer

    def _map(self, name: str, size: int) -> MapWriter:
        stock, record = self._stock, self._parent.disk(name) if self._parent else None
        parent = None
        if record is not None:
            root = self._vault.root(record.root)
            config = self._vault.config
            if (root.size, root.chunk_size, root.page_slots) != (
                record.size,
                config.chunk_size,
                config.page_slots,
            ):
                text = f"corrupt repository: {self._vault.name}: the map of {name!r} is another's"
                raise CorruptImage(text)
            parent = ParentMap(self._vault, stock.known, root, size)
        with stock.lock:
            return MapWriter(self._vault, stock.known, stock.chunks, stock.metas, size, parent)

    async def commit(self, facts: Mapping[str, Any] | None = None) -> Point:
        """Make it durable, then visible. No call of its disks may be under way.

        Args:
            facts: ``labels``, ``consistency``, ``blobs``, ``lock_until``, ``created``, ``host`` of
                its ``PointRecord``; ``id`` of a copy is that of the point it is a copy of.
        """
        return described(await self.commit_record(facts))

    async def commit_record(self, facts: Mapping[str, Any] | None = None) -> PointRecord:
        """``commit``, as the record that was put."""
        if self._ended:
            raise RepositoryError(f"{self._vault.name}: this point is committed or aborted already")
        stock = self._stock
        stock.check()
        try:
            await stock.put_rest(stock.chunks)
            for disk in self._disks.values():
                await self._finish_pages(disk.map)
            await stock.put_rest(stock.metas)
            disks = await self._roots()
            await stock.put_index()
            record = await self._workers.run(self._put_point, disks, _only(facts, _OF_POINT))
        except BaseException as error:
            stock.failure = stock.failure or error
            raise
        self._ended = True
        await self._workers.run(self._lease.release)
        return record

    async def _finish_pages(self, map_: MapWriter) -> None:
        stock = self._stock

        def encode() -> bool:
            with stock.lock:
                return map_.finish_pages()

        while not await self._workers.run(encode):
            await self._put_full()

    async def _put_full(self) -> None:
        with self._stock.lock:
            full = self._stock.full()
        await self._stock.put(full)

    async def _roots(self) -> list[DiskRecord]:
        """A record for each disk; roots that are new are put."""
        stock, names = self._stock, self._stock.metas.names
        made: dict[str, tuple[tuple[bytes, int, int, int, int, bytes], str]] = {}
        for name, disk in self._disks.items():
            if self._inherited(disk) is None:
                made[name] = await self._workers.run(self._add_root, disk.map)
                await self._put_full()
        await stock.put_rest(stock.metas)
        records = []
        for name, disk in self._disks.items():
            inherited = self._inherited(disk)
            if inherited is not None:
                ref, image_id = inherited.root, inherited.image_id
            else:
                (id_, number, offset, length, codec, _), image_id = made[name]
                ref = Ref.of(id_, Place(names[number], offset, length, codec))
            records.append(self._record(disk, ref, image_id))
        return records

    def _inherited(self, disk: NativeDiskWriter) -> DiskRecord | None:
        """The parent's record, if its root is this disk's and may be used."""
        record = self._parent.disk(disk.name) if self._parent else None
        if record is None or not disk.map.is_parents():
            return None
        return None if record.root.place.pack in self._stock.known.shunned else record

    def _add_root(self, map_: MapWriter) -> tuple[tuple[bytes, int, int, int, int, bytes], str]:
        root = map_.finish_root()
        with self._stock.lock:
            return map_.add_root(root), root.image_id(self._vault.hashing).hex()

    def _record(self, disk: NativeDiskWriter, ref: Ref, image_id: str) -> DiskRecord:
        if disk.expected_image_id not in {None, image_id}:
            text = f"corrupt repository: the map of {disk.name!r} is not what its point says"
            raise CorruptImage(f"{text}; nothing is committed")
        summary = disk.summary
        untold = max(0, disk.size - disk.told_bytes)
        if disk.has_parent:
            summary.unchanged_bytes += untold
        else:
            summary.zero_bytes += untold
        return DiskRecord(
            name=disk.name,
            size=disk.size,
            root=ref,
            image_id=image_id,
            new_bytes=summary.new_bytes,
            zero_bytes=summary.zero_bytes,
            unchanged_bytes=summary.unchanged_bytes,
            **_only(disk.facts, _OF_DISK),
        )

    def _put_point(self, disks: list[DiskRecord], facts: Mapping[str, Any]) -> PointRecord:
        vault = self._vault
        others = [ulid_of(stored.key) or "" for stored in vault.point_objects(self._group)]
        # Also if the host that made the latest one has a clock that is ahead of ours.
        id_ = facts.get("id") or new_ulid(max(others, default=""))
        latest = max((other for other in others if other < id_), default=None)
        record = PointRecord(
            group=self._group,
            parent=self._parent.id if self._parent else None,
            previous=latest,
            disks=disks,
            **{"created": time.time(), "host": socket.gethostname(), **facts, "id": id_},
        )
        # As strictly as it will be read: what cannot be must not be put.
        record = msgspec.convert(msgspec.to_builtins(record), PointRecord)
        data = encode_point(record, vault.repository, vault.sealing, vault.hashing)
        if len(data) > MAX_POINT:
            raise RepositoryError(f"{vault.name}: labels and configurations take {len(data)} bytes")
        self._lease.check()
        vault.store.put_new(point_key(self._group, record.id), data)
        return record

    async def abort(self) -> None:
        """Forget it. Nothing after ``commit``; idempotent. No call may be under way."""
        if self._ended:
            return
        self._ended = True
        self._stock.failure = self._stock.failure or RepositoryError("it was aborted")
        await self._workers.run(self._lease.release)


def _still_there(vault: Vault, parent: PointRecord) -> None:
    """Now that our lease is there, nothing a parent refers to is deleted before we are done; but
    it may have been pruned, and collected, before.
    """
    try:
        vault.point(point_key(parent.group, parent.id))
    except ObjectMissing as error:
        text = f"{vault.name}: the point {parent.id} of {parent.group!r} has been pruned"
        raise PointMissing(f"{text}; begin from another") from error


def _only(facts: Mapping[str, Any] | None, names: frozenset[str]) -> dict[str, Any]:
    """Facts for a record; what it has no place for is a mistake of the caller."""
    given = dict(facts or {})
    if unknown := given.keys() - names:
        raise RepositoryError(f"no place in a point for {', '.join(sorted(unknown))}")
    return given
