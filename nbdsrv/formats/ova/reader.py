"""OVA: a VM as a tar archive. A disk in it is served where it lies, nothing is unpacked.

::

    | vm.ovf | vm.mf | disk1.vmdk ............... | disk2.vmdk ... |
      which disks       ImageFile.part ──> its own format's Disk

``vm.ova#disk1.vmdk`` and ``vm.ova#vmdisk1`` choose a disk, by file or by disk id; where there is
only one it needs no choice. The checksums in the ``.mf`` are not verified: that takes reading all.

Rule: an OVA comes from strangers, so its disks must be whole in themselves. An image in it that
would have another file of this machine opened (a parent, a flat extent) is refused.
"""

import errno as os_errno
from collections.abc import Mapping, Sequence

from nbdsrv.disk.concat import Concat
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.opening import Opening, open_file
from nbdsrv.formats.ova.ovf import MAX_OVF, OvfDisk, parse_ovf
from nbdsrv.formats.probe import probe_file
from nbdsrv.formats.tar import Member, walk

__all__ = ["OvaDisk", "open_ova"]

MAX_MEMBERS = 1 << 14
"""Of the archive: an OVF, a manifest, a certificate, disks, perhaps ISO images and messages."""
MAX_LISTED = 20
"""Names in an error message."""

_INSIDE = frozenset({"raw", "vmdk", "vhd", "vhdx", "vdi", "qcow2"})
"""Formats of disks in OVAs; no archives in archives."""
_VMDK_SPARSE = b"KDMV"
_QCOW2_DATA_FILE = 4
"""Incompatible feature bit of qcow2: the data is in a file of its own."""


class OvaDisk(Concat):
    """One disk of the archive: exactly what the image in it is."""

    format = "ova"

    def __init__(
        self, workers: Workers, file: ImageFile, inside: Disk, facts: Mapping[str, object]
    ) -> None:
        """Becomes the owner of ``file`` and ``inside``."""
        super().__init__(workers, inside.name, [inside])
        self.block_sizes = inside.block_sizes
        self._file = file
        self._inside = inside
        self._facts = facts

    @property
    def facts(self) -> Mapping[str, object]:
        """About the archive, and under ``image`` about the image in it."""
        image = {"format": self._inside.format, **self._inside.facts}
        return {**self._facts, "image": image}

    async def close(self) -> None:
        """Close the image and the archive."""
        await super().close()
        self._file.close()


async def open_ova(file: ImageFile, opening: Opening) -> Disk:
    """Open the one disk of the archive, or the one that ``opening.member`` names.

    Raises:
        DiskError: it is broken, there is no such disk, or the choice is open.
    """
    workers = opening.workers
    members = await workers.look_up(_members, file)
    disks = await workers.look_up(_read_ovf, file, members)
    disk = _choose(file, disks, opening.member)
    parts: list[ImageFile] = []
    try:
        kind = await workers.look_up(_part, file, members, disk, parts)
        inside = await open_file(parts[0], kind, opening.plain())
    except BaseException:
        for part in parts:
            part.close()
        raise
    if inside.backing is not None or not inside.size:
        await inside.close()
        if inside.size:
            raise _not_whole(file, disk)
        raise file.corrupt(members[disk.file_name].position, f"disk {disk.file_name!r} is empty")
    facts = {
        "member": disk.file_name,
        "disk_id": disk.disk_id,
        "disks": [each.file_name for each in disks],
        "manifest": next((name for name in members if name.endswith(".mf")), None),
    }
    return OvaDisk(workers, file, inside, facts)


def _members(file: ImageFile) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for member in walk(file, MAX_MEMBERS):
        name = member.name.removeprefix("./")
        if members.setdefault(name, member) is not member:
            raise file.corrupt(member.position, f"a second member named {name}")
    return members


def _read_ovf(file: ImageFile, members: Mapping[str, Member]) -> Sequence[OvfDisk]:
    ovf = next((each for name, each in members.items() if name.lower().endswith(".ovf")), None)
    if ovf is None:
        raise file.corrupt(0, "no .ovf in the archive")
    if ovf.size > MAX_OVF:
        raise file.corrupt(ovf.position, f"an OVF of {ovf.size} bytes")
    disks = parse_ovf(file, ovf.position, file.read(ovf.position, ovf.size, "OVF"))
    if not disks:
        raise UnsupportedImage(f"{file.path}: no disks in the archive")
    return disks


def _choose(file: ImageFile, disks: Sequence[OvfDisk], wanted: str) -> OvfDisk:
    names = ", ".join(repr(disk.file_name) for disk in disks[:MAX_LISTED])
    names += ", ..." if len(disks) > MAX_LISTED else ""
    if not wanted and len(disks) == 1:
        return disks[0]
    if not wanted:
        text = f"{file.path}: {len(disks)} disks, choose one by {file.path}#NAME: {names}"
        raise DiskError(text, os_errno.EINVAL)
    found = [disk for disk in disks if disk.file_name == wanted]
    found = found or [disk for disk in disks if disk.disk_id == wanted]
    if not found:
        raise DiskError(f"{file.path}: no disk {wanted!r} in it, only {names}", os_errno.ENOENT)
    return found[0]


def _part(
    file: ImageFile, members: Mapping[str, Member], disk: OvfDisk, parts: list[ImageFile]
) -> str:
    """Open the member, adding it to ``parts``; its format. Blocking."""
    what = f"{file.path}: disk {disk.file_name!r}"
    if disk.compression:
        raise UnsupportedImage(f"{what} is compressed as a whole ({disk.compression!r}); unpack it")
    if disk.chunked or disk.parent:
        raise UnsupportedImage(f"{what} is {'in chunks' if disk.chunked else 'a delta'}; unpack it")
    member = members.get(disk.file_name)
    if member is None:
        raise file.corrupt(0, f"disk {disk.file_name!r} is not in the archive")
    try:
        parts.append(file.part(member.position, member.size, member.name))
    except OSError as error:
        raise DiskError.from_os(file.path, error) from error
    kind = probe_file(parts[0])
    if kind not in _INSIDE:
        raise UnsupportedImage(f"{what}: {kind} images in an OVA are not served; unpack it")
    if kind != "vmdk" and "vmdk" in disk.disk_format.lower():
        raise file.corrupt(member.position, f"disk {disk.file_name!r} is not the VMDK it should be")
    start = parts[0].read_up_to(0, 80)
    if (kind == "vmdk" and not start.startswith(_VMDK_SPARSE)) or (
        kind == "qcow2" and start[4:8] > b"\0\0\0\2" and start[79] & _QCOW2_DATA_FILE
    ):
        raise _not_whole(file, disk)
    return kind


def _not_whole(file: ImageFile, disk: OvfDisk) -> UnsupportedImage:
    return UnsupportedImage(
        f"{file.path}: disk {disk.file_name!r} needs files outside the archive; not followed"
    )
