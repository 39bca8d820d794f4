"""The VMs and points of a repository, as they are at this moment.

::

    xo-vm-backups/ ── <vm>/ ── *.json changed? ── PointRecord ─┐
         │               └──── vdis/*/* ── Health ─────────────┼──> Row ── Point
         └── <vm>.lock                                         │
    two VMs of one name ── "web (b0a7e4c2)" ───────────────────┘

A listing of what has not changed reads directories only. In a bucket chains are not looked at:
that would be some requests for every disk of every point; they are proven when a disk is opened.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.repository import DiskFacts, Point
from nbdsrv.repository.xo.chain import Chain
from nbdsrv.repository.xo.disk_file import DiskFile
from nbdsrv.repository.xo.health import Health, parent_stamps
from nbdsrv.repository.xo.layout import LOCK, POINT, VM_BACKUPS, point_stamp, time_of
from nbdsrv.repository.xo.merging import Merge
from nbdsrv.repository.xo.records import DiskRecord, PointRecord, read_point
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.xva import xva_disks
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Node

__all__ = ["Listing", "Row"]

log = logging.getLogger(__name__)

MAX_POINTS = 1 << 17
"""Of one VM."""
SHORT = 8
"""Characters of a VM's id that tell VMs of one name apart."""


@dataclass(frozen=True, slots=True)
class Row:
    """One point.

    Attributes:
        point: as all repositories describe it; its group is the VM's name.
        vm: the VM's id, the name of its directory.
        path: of its JSON.
        records: its disks, also those that cannot be opened.
        paths: of the disks that can.
        unread: why its JSON or XVA could not be read, which proves no damage.
    """

    point: Point
    vm: str
    path: str
    records: tuple[DiskRecord, ...]
    paths: Mapping[str, str]
    unread: StoreError | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """What a point's JSON said when it had that size and time, or why it was not read."""

    node: Node
    record: PointRecord | CorruptImage | StoreError


@dataclass(frozen=True, slots=True)
class _Xva:
    node: Node | None
    disks: tuple[DiskRecord, ...]
    kind: str
    error: CorruptImage | StoreError | None = None


class _Vm:
    """The points of one VM. Blocking; one thread at a time."""

    def __init__(self, remote: Remote, uuid: str) -> None:
        self.uuid = uuid
        self.lock = threading.Lock()
        self.label = ""
        self._remote = remote
        self._directory = f"{VM_BACKUPS}/{uuid}"
        self._known: dict[str, _Known] = {}
        self._health: dict[str, Health] = {}
        self._xvas: dict[str, _Xva] = {}
        self._nodes: dict[str, Node] = {}

    def refresh(self) -> None:
        """Read what is new, forget what is gone.

        Raises:
            StoreError: the directory cannot be read.
        """
        self._nodes = {node.name: node for node in self._remote.tree.entries(self._directory)}
        stamps = [name for name in self._nodes if point_stamp(name)][-MAX_POINTS:]
        for name in [name for name in self._known if name not in self._nodes]:
            del self._known[name]
        for name in stamps:
            node = self._nodes[name]
            known = self._known.get(name)
            tried = known is not None and not isinstance(known.record, StoreError)
            if node.directory or (known is not None and tried and known.node == node):
                continue
            try:
                record: PointRecord | CorruptImage | StoreError
                record = read_point(self._remote, f"{self._directory}/{name}")
            except ObjectMissing:
                self._known.pop(name, None)
                continue
            except CorruptImage as error:
                record = error
            except StoreError as error:
                if self._remote.tree.distant:
                    raise
                record = error  # the VM's other points can be read all the same
            self._known[name] = _Known(node, record)
        self.label = self._label()

    @property
    def has_points(self) -> bool:
        """Is there any?"""
        return bool(self._known)

    def _label(self) -> str:
        """The newest point knows what the VM is called today."""
        for name in sorted(self._known, reverse=True):
            record = self._known[name].record
            if isinstance(record, PointRecord) and record.label:
                return record.label
        return self.uuid

    def rows(self, group: str, *, locked: bool) -> list[Row]:
        """Its points, from old to new."""
        self._look_at_disks()
        flags = ("locked",) if locked else ()
        return [
            self._row(group, name, self._known[name].record, flags) for name in sorted(self._known)
        ]

    def chain(self, record: DiskRecord) -> tuple[Chain, Mapping[str, Merge]]:
        """Open a disk, by what was found when all were last listed; and the merges around it.

        Raises:
            DiskError: it is damaged, or cannot be read.
        """
        directory = record.path.rpartition("/")[0]
        health = self._health.get(directory)
        if health is None:
            health = self._health[directory] = Health(self._remote, directory)
            health.refresh()
        return health.chain(record.path, record.snapshot), health.merges

    def _look_at_disks(self) -> None:
        paths = [
            disk.path
            for known in self._known.values()
            if isinstance(known.record, PointRecord)
            for disk in known.record.disks
        ]
        directories = {path.rpartition("/")[0] for path in paths}
        for gone in self._health.keys() - directories:
            del self._health[gone]
        for directory in sorted(directories):
            health = self._health.setdefault(directory, Health(self._remote, directory))
            try:
                health.refresh()
            except StoreError:
                if self._remote.tree.distant:
                    raise
                # Whoever opens a disk in it is told why not.

    def _row(
        self,
        group: str,
        name: str,
        record: PointRecord | CorruptImage | StoreError,
        flags: tuple[str, ...],
    ) -> Row:
        stamp = name.removesuffix(POINT)
        path = f"{self._directory}/{name}"
        created = time_of(stamp) or 0.0
        if not isinstance(record, PointRecord):
            facts = {"vm_uuid": self.uuid, "reason": str(record)}
            point = Point(stamp, group, created, (), None, ("damaged", *flags), facts)
            unread = record if isinstance(record, StoreError) else None
            return Row(point, self.uuid, path, (), {}, unread)
        if record.xva:
            return self._xva_row(group, stamp, path, record, flags)
        found: list[tuple[DiskRecord, DiskFile | None]] = []
        reason, merging = "", False
        for disk in record.disks:
            health = self._health[disk.path.rpartition("/")[0]]
            try:
                found.append((disk, self._checked(health, disk)))
            except DiskError as error:
                reason = reason or str(error)
                merging = merging or any(disk.path in m.changing for m in health.merges.values())
        if merging:
            found = []  # the point is on its way out
        disks = tuple(self._facts(disk, file) for disk, file in found)
        said: dict[str, Any] = {**record.facts, "vm_uuid": self.uuid, **self._storage(found)}
        if reason:
            said["reason"] = reason
            flags = ("partial" if disks else "damaged", *flags)
        parents = parent_stamps([file for _, file in found if file is not None], self._remote)
        parent = next((each for each in parents if f"{each}{POINT}" in self._known), None)
        point = Point(stamp, group, created, disks, parent, flags, said)
        return Row(
            point, self.uuid, path, record.disks, {disk.name: disk.path for disk, _ in found}
        )

    def _checked(self, health: Health, disk: DiskRecord) -> DiskFile | None:
        """The disk with its parents; None where only its name could be looked at."""
        path = disk.path
        if not self._remote.tree.distant:
            return health.check(path, disk.snapshot)
        for merge in health.merges.values():
            if path in merge.changing:
                raise CorruptImage(f"corrupt image: {self._remote.full(path)} is being merged")
        if path.rpartition("/")[2] not in health.nodes:
            raise CorruptImage(f"corrupt image: {self._remote.full(path)} at 0: is missing")
        return None

    def _storage(self, found: Sequence[tuple[DiskRecord, DiskFile | None]]) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "encryption": self._remote.sealing.algorithm,
            "health": "not examined" if self._remote.tree.distant else "chains proven",
        }
        files = [file for _, file in found if file is not None]
        if files:
            facts["layout"] = ", ".join(dict.fromkeys(file.layout for file in files))
            facts["compression"] = ", ".join(dict.fromkeys(file.compression for file in files))
        return facts

    @staticmethod
    def _facts(disk: DiskRecord, file: DiskFile | None) -> DiskFacts:
        facts: dict[str, Any] = {
            "device": disk.device,
            "vdi_uuid": disk.vdi,
        }
        size = disk.size
        if file is not None:
            size = file.footer.size
            facts["mode"] = "incremental" if file.differencing else "full"
            facts["vhd_uuid"] = str(file.unique_id)
            if file.from_copy:
                facts["footer"] = "the copy: the one at the end is lost"
        return DiskFacts(disk.name, size, facts, disk.aliases)

    def _xva_row(
        self, group: str, stamp: str, path: str, record: PointRecord, flags: tuple[str, ...]
    ) -> Row:
        xva = self._xva(record.xva)
        facts: dict[str, Any] = {
            **record.facts,
            "vm_uuid": self.uuid,
            "encryption": self._remote.sealing.algorithm,
            "layout": "xva",
            "compression": "none" if xva.kind == "xva" else xva.kind,
        }
        if xva.error is not None:
            facts["reason"] = str(xva.error)
            flags = ("damaged", *flags)
        disks = tuple(
            DiskFacts(
                disk.name,
                disk.size,
                {"mode": "full", "vdi_uuid": disk.vdi, "reference": disk.reference},
                disk.aliases,
            )
            for disk in xva.disks
        )
        point = Point(stamp, group, time_of(stamp) or 0.0, disks, None, flags, facts)
        paths = {disk.name: disk.path for disk in xva.disks}
        unread = xva.error if isinstance(xva.error, StoreError) else None
        return Row(point, self.uuid, path, xva.disks, paths, unread)

    def _xva(self, path: str) -> _Xva:
        directory, _, name = path.rpartition("/")
        at_home = directory == self._directory
        node = self._nodes.get(name) if at_home else self._remote.tree.find(path)
        known = self._xvas.get(path)
        if known is None or known.node != node or isinstance(known.error, StoreError):
            try:
                known = _Xva(node, *xva_disks(self._remote, path))
            except (CorruptImage, ObjectMissing) as error:  # removed just now, the latter
                known = _Xva(node, (), "", error)
            except StoreError as error:
                if self._remote.tree.distant:
                    raise
                known = _Xva(node, (), "", error)  # all other points can be read all the same
            self._xvas[path] = known
        return known


class Listing:
    """All VMs of a repository. Blocking; any thread may call it."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._vms: dict[str, _Vm] = {}
        self._lock = threading.Lock()
        self.unread: tuple[str, ...] = ()
        """Why nothing of some VMs could be read when all were last listed."""

    def groups(self) -> list[str]:
        """The names of all VMs that have points, sorted.

        Raises:
            StoreError: the repository cannot be read.
        """
        names, _ = self._names()
        return sorted(names.values())

    def rows(self, group: str | None = None) -> list[Row]:
        """All points, or those of one VM by name or id; by group, then from old to new.

        Raises:
            StoreError: the repository cannot be read.
        """
        names, locked = self._names()
        found: list[Row] = []
        for uuid, name in sorted(names.items(), key=lambda each: each[::-1]):
            if group not in {None, name, uuid}:
                continue
            vm = self._vms[uuid]
            with vm.lock:
                found += vm.rows(name, locked=uuid in locked)
        return found

    def chain(self, vm: str, record: DiskRecord) -> tuple[Chain, Mapping[str, Merge]]:
        """Open a disk of a VM that has been listed; and the merges around it.

        Raises:
            DiskError: it is damaged, or cannot be read.
        """
        with self._lock:
            found = self._vms.get(vm)
        if found is None:
            raise ObjectMissing(f"{self._remote.full(record.path)}: its VM has been removed")
        with found.lock:
            return found.chain(record)

    def _names(self) -> tuple[dict[str, str], set[str]]:
        """What each VM with points is called, and which of them a job is at work at."""
        nodes = self._remote.tree.entries(VM_BACKUPS)
        directories = [node.name for node in nodes if node.directory]
        locked = {name.removesuffix(LOCK) for name in directories if name.endswith(LOCK)}
        uuids = [name for name in directories if name[0] != "." and not name.endswith(LOCK)]
        with self._lock:
            for gone in self._vms.keys() - set(uuids):
                del self._vms[gone]
            vms = [self._vms.setdefault(uuid, _Vm(self._remote, uuid)) for uuid in uuids]
        labels: dict[str, str] = {}
        unread: list[str] = []
        for vm in vms:
            with vm.lock:
                try:
                    vm.refresh()
                except StoreError as error:
                    if self._remote.tree.distant:
                        raise
                    unread.append(str(error))
                    if unread[-1] not in self.unread:
                        log.warning("xo.unreadable vm=%s reason=%s", vm.uuid, error)
                    continue
                if vm.has_points:
                    labels[vm.uuid] = vm.label
        self.unread = tuple(unread)
        return _told_apart(labels), locked


def _told_apart(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels that are unique: VMs of one name have the beginning of their ids behind it."""
    taken = Counter(labels.values())
    found = {
        uuid: label if taken[label] == 1 else f"{label} ({uuid[:SHORT]})"
        for uuid, label in labels.items()
    }
    again = Counter(found.values())
    return {
        uuid: name if again[name] == 1 else f"{labels[uuid]} ({uuid})"
        for uuid, name in found.items()
    }
