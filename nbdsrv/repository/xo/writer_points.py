"""The points of a repository as what new ones build upon.

::

    group ── VM directories that hold disks of our job ── name_label, or uuid ── <stamp>.json
    <stamp>.json ── vhds, vdis ── checksum files ──> KnownPoint: names, sizes, checkpoints

What a point knows of its disks for the next backup (which checkpoint they are of, their true sizes)
stands in the checksum files: its own metadata is Xen Orchestra's, which rewrites it. Points that
others have made have no such files; they are points without disks to build upon.
"""

import posixpath
from dataclasses import dataclass

import msgspec

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.checksums import ChecksumFile
from nbdsrv.repository.xo.layout import LOCK, POINT, VDIS, VM_BACKUPS, point_stamp, time_of
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.writer_records import JOB, vm_of_group
from nbdsrv.store.tree import joined

__all__ = ["XoDisk", "XoPoint", "keys_of_group", "named_disks", "read_point"]

MAX_POINT = 64 << 20
"""Bytes of a point's metadata."""
MAX_DISKS = 1000


@dataclass(frozen=True, slots=True)
class XoDisk:
    """A disk of ours (``KnownDisk``).

    Attributes:
        unique_id: in its footer.
        directory: of its VDI, in the repository.
        path: of itself, likewise.
    """

    name: str
    size: int
    cbt: dict[str, str] | None
    unique_id: str
    directory: str
    path: str


@dataclass(frozen=True, slots=True)
class XoPoint:
    """A point (``KnownPoint``).

    Attributes:
        key: path of its metadata.
    """

    id: str
    created: float
    key: str
    disks: tuple[XoDisk, ...] = ()

    def disk(self, name: str) -> XoDisk | None:
        """The disk of that name."""
        return next((disk for disk in self.disks if disk.name == name), None)


class _Vm(msgspec.Struct):
    name_label: str = ""


class _Vdi(msgspec.Struct):
    uuid: str = ""


class _Metadata(msgspec.Struct):
    jobId: str = ""  # noqa: N815 - the format's own name
    vm: _Vm = msgspec.field(default_factory=_Vm)
    vdis: dict[str, _Vdi] = {}
    vhds: dict[str, str] = {}


def keys_of_group(remote: Remote, group: str) -> list[str]:
    """Paths of the metadata of all points of a group, from old to new. Blocking.

    Raises:
        StoreError: the repository cannot be read.
    """
    keys: list[str] = []
    for node in remote.tree.entries(VM_BACKUPS):
        vm = node.name
        if not node.directory or vm.startswith(".") or vm.endswith(LOCK):
            continue
        if remote.tree.find(f"{VM_BACKUPS}/{vm}/{VDIS}/{JOB}") is None:
            continue
        found = _points_in(remote, vm)
        if vm == vm_of_group(group) or _is_called(remote, found, group):
            keys += found
    return sorted(keys, key=posixpath.basename)


def _points_in(remote: Remote, vm: str) -> list[str]:
    directory = f"{VM_BACKUPS}/{vm}"
    return [
        f"{directory}/{node.name}"
        for node in remote.tree.entries(directory)
        if not node.directory and point_stamp(node.name) is not None
    ]


def _is_called(remote: Remote, keys: list[str], group: str) -> bool:
    """By its latest point that can be read: VMs are renamed."""
    for key in reversed(keys):
        try:
            return _metadata(remote, key).vm.name_label == group
        except CorruptImage:
            continue
    return False


def read_point(remote: Remote, key: str) -> XoPoint:
    """One point. Blocking.

    Raises:
        ObjectMissing: it is gone.
        CorruptImage: it is damaged, or what is known of its disks is.
        StoreError: the repository cannot be read.
    """
    found = _metadata(remote, key)
    stamp = posixpath.basename(key).removesuffix(POINT)
    disks: list[XoDisk] = []
    for ref, path in _disk_paths(remote, key, found):
        directory = posixpath.dirname(path)
        vdi = found.vdis.get(ref)
        if vdi is None or f"/{VDIS}/{JOB}/" not in directory:
            continue
        sums = ChecksumFile.load(remote.tree, directory, vdi.uuid, remote.sealing)
        if sums is None:
            continue
        about = sums.about
        disks.append(XoDisk(about.name, about.size, about.cbt, about.uuid, directory, path))
    return XoPoint(stamp, time_of(stamp) or 0, key, tuple(disks))


def named_disks(remote: Remote, vm: str) -> set[str] | None:
    """Paths of all disks that points of a VM name; None if one cannot be read. Blocking.

    Raises:
        StoreError: the repository cannot be read.
    """
    directory = f"{VM_BACKUPS}/{vm}"
    named: set[str] = set()
    for node in remote.tree.entries(directory):
        if node.directory or not node.name.endswith(POINT):
            continue
        key = f"{directory}/{node.name}"
        try:
            named.update(path for _, path in _disk_paths(remote, key, _metadata(remote, key)))
        except CorruptImage:
            return None
    return named


def _metadata(remote: Remote, key: str) -> _Metadata:
    raw = remote.read(key, MAX_POINT)
    try:
        return msgspec.json.decode(raw, type=_Metadata)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptImage(f"corrupt repository: {remote.full(key)}: {error}") from error


def _disk_paths(remote: Remote, key: str, found: _Metadata) -> list[tuple[str, str]]:
    if len(found.vhds) > MAX_DISKS:
        text = f"{len(found.vhds)} disks, more than {MAX_DISKS}"
        raise CorruptImage(f"corrupt repository: {remote.full(key)}: {text}")
    directory = posixpath.dirname(key)
    return [(ref, joined(remote.name, directory, path)) for ref, path in found.vhds.items()]
