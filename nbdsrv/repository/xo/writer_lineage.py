"""The disks of one VDI in our own job's directory: which lies upon which, and what may go.

::

    20260101.. <── 20260102.. <── 20260103..       a chain; 20260103 is its tip
    20260105..                                     a full one of its own

Xen Orchestra knows one child of each disk, and takes a directory with two for broken. So a new disk
is put on the tip of its parent's chain, never in between; and a tip that a crash has left without
its point goes first.

Rule: only the directory of our own job is looked at, and nothing in it goes while any point of the
VM cannot be read, or Xen Orchestra is merging there.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.checksums import ChecksumFile, checksum_name
from nbdsrv.repository.xo.disk_file import open_disk_file
from nbdsrv.repository.xo.layout import ALIAS, DATA, VHD, merging_parent
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.repository.xo.writer_place import Place, is_temporary
from nbdsrv.store.store import ObjectMissing

__all__ = ["Lineage", "Member", "read_lineage", "sweep"]

log = logging.getLogger(__name__)

_SUMS = checksum_name("")[1:]


@dataclass(frozen=True, slots=True)
class Member:
    """A disk.

    Attributes:
        path: what it goes by.
        place: where its data is.
        unique_id: in its footer.
        parent: the path of the disk it lies upon, or "".
        size: bytes.
        layout: ``vhd`` or ``vhd-directory``.
        packing: of a VHD directory.
    """

    path: str
    place: str
    unique_id: UUID
    parent: str
    size: int
    layout: str
    packing: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is in one directory.

    Attributes:
        directory: its path.
        members: the disks that can be read, by path.
        broken: paths of the others.
        merging: is something being merged there?
    """

    directory: str
    members: dict[str, Member]
    broken: tuple[str, ...]
    merging: bool

    def find(self, unique_id: str) -> Member | None:
        """The disk of that id, if there is exactly one."""
        found = [each for each in self.members.values() if str(each.unique_id) == unique_id]
        return found[0] if len(found) == 1 else None

    def above(self, member: Member) -> list[Member] | None:
        """The disks that lie upon it, the lowest first; None if there is more than one chain."""
        found: list[Member] = []
        at = member
        while children := [each for each in self.members.values() if each.parent == at.path]:
            if len(children) > 1 or children[0] in found or children[0] == member:
                return None
            at = children[0]
            found.append(at)
        return found


def read_lineage(remote: Remote, directory: str) -> Lineage:
    """Open each disk there and close it again. Blocking.

    Raises:
        StoreError: the directory cannot be read.
    """
    members: dict[str, Member] = {}
    broken: list[str] = []
    merging = False
    for node in remote.tree.entries(directory):
        if merging_parent(node.name) is not None:
            merging = True
        if node.name.startswith(".") or not node.name.endswith(VHD):
            continue
        path = f"{directory}/{node.name}"
        try:
            disk = open_disk_file(remote, path)
        except (CorruptImage, ObjectMissing) as error:
            log.warning("xo.broken path=%s reason=%s", path, error)
            broken.append(path)
            continue
        try:
            parent = disk.parent(remote) if disk.differencing else ""
            members[path] = Member(
                path,
                disk.place,
                disk.unique_id,
                parent,
                disk.footer.size,
                disk.layout,
                disk.compression,
            )
        except CorruptImage as error:
            log.warning("xo.broken path=%s reason=%s", path, error)
            broken.append(path)
        finally:
            disk.close()
    return Lineage(directory, members, tuple(broken), merging)


def sweep(place: Place, remote: Remote, lineage: Lineage, used: Collection[str]) -> Lineage:
    """Remove what our crashed backups have left; what is left then. Blocking.

    Args:
        place: to write.
        remote: to read.
        lineage: of a directory of our job, just read; the VM is locked.
        used: paths of all disks that points of the VM name.

    Raises:
        StoreError: something cannot be removed.
    """
    if lineage.merging or lineage.broken:
        return lineage
    members = dict(lineage.members)
    # A disk that nobody names may lie below one that is: Xen Orchestra merges those.
    while idle := [
        each
        for each in members.values()
        if each.path not in used
        and not any(other.parent == each.path for other in members.values())
    ]:
        for each in idle:
            log.info("xo.swept path=%s", each.path)
            place.remove(each.path)
            # An alias may lead anywhere in the repository; what lies elsewhere is not ours.
            if each.path.endswith(ALIAS) and each.place.startswith(f"{lineage.directory}/{DATA}/"):
                place.remove_tree(each.place)
            del members[each.path]
    left = Lineage(lineage.directory, members, (), merging=False)
    _sweep_data(place, remote, left)
    _sweep_names(place, remote, left)
    return left


def _sweep_data(place: Place, remote: Remote, lineage: Lineage) -> None:
    data = f"{lineage.directory}/{DATA}"
    claimed = {each.place for each in lineage.members.values()}
    for node in remote.tree.entries(data):
        path = f"{data}/{node.name}"
        if path in claimed or not node.directory:
            continue
        log.info("xo.swept path=%s", path)
        place.remove_tree(path)


def _sweep_names(place: Place, remote: Remote, lineage: Lineage) -> None:
    """Temporary files, and checksums of disks that are gone and that no merged one has parts of."""
    needed: set[str] = set()
    for member in lineage.members.values():
        needed.add(str(member.unique_id))
        try:
            found = ChecksumFile.load(
                remote.tree, lineage.directory, str(member.unique_id), remote.sealing
            )
            if found is not None:
                needed.update(each.about.uuid for each in found.chain())
                needed.add(found.chain()[-1].about.parent)
        except CorruptImage as error:
            log.warning("xo.checksums disk=%s reason=%s", member.path, error)
            return
    for node in remote.tree.entries(lineage.directory):
        path = f"{lineage.directory}/{node.name}"
        name = node.name[1:].removesuffix(_SUMS)
        stale = checksum_name(name) == node.name and name not in needed
        if is_temporary(node.name) or stale:
            place.remove(path)
