"""Which checkpoint of a disk a backup builds upon, and which ones nobody needs any more.

::

    known   [C5, C3, C2]            repositories have points of these, the best first
    image    C6  C5  C4  C3  C1     C6: of a backup that was killed, or of other repositories
                 ^^                 the first that both have, and that all disks have
    after a success with C7:        C3 goes: who knew it knows C7 now; C6, C4, C1 may be others'
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nbdsrv.source.qemu_disks import VmDisk
from nbdsrv.ulid import new_ulid

__all__ = ["Base", "choose_bases", "new_checkpoint", "superseded"]

PREFIX = "nbdsrv-"
MAX_CHECKPOINTS = 16
"""Of one disk. More than any schedule of a few repositories keeps; what crashed runs and abandoned
repositories leave is removed from the oldest on."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a disk's backup builds upon.

    Attributes:
        checkpoint: or "" for all of the disk.
        reason: why all of it.
    """

    checkpoint: str = ""
    reason: str = ""


def new_checkpoint(newest: str = "") -> str:
    """A name for this moment, behind ``newest`` in any case."""
    return PREFIX + new_ulid(newest.removeprefix(PREFIX))


def choose_bases(disks: Sequence[VmDisk], known: Mapping[str, Sequence[str]]) -> dict[str, Base]:
    """By name of the disk; ``known`` as ``Hypervisor.freeze`` takes it, the best first.

    One checkpoint for all disks that have any is preferred, for it is one point that is built
    upon then; failing that, each disk's best.
    """
    usable = {disk.name: _usable(disk, known.get(disk.name, ())) for disk in disks}
    some = [each for each in usable.values() if each]
    shared = next((name for name in some[0] if all(name in e for e in some)), "") if some else ""
    return {
        disk.name: Base(shared or usable[disk.name][0])
        if usable[disk.name]
        else Base(reason=_reason(disk, known.get(disk.name, ())))
        for disk in disks
    }


def _usable(disk: VmDisk, known: Sequence[str]) -> list[str]:
    """In the order of ``known``."""
    ours = disk.checkpoints
    return [name for name in known if name in ours and not disk.bitmaps[name].flaw]


def _reason(disk: VmDisk, known: Sequence[str]) -> str:
    if disk.read_only:
        return "no changes are tracked of a disk that is read-only"
    if not known:
        return "no checkpoint of this disk is known"
    for name in known:
        if name in disk.bitmaps and disk.bitmaps[name].flaw:
            return f"checkpoint {name} {disk.bitmaps[name].flaw}"
    if not disk.keeps:
        why = f"a {disk.driver} disk keeps none beyond the end of QEMU"
        return f"checkpoint {known[0]} is gone: {why}"
    why = "the image was replaced, a snapshot was taken, or QEMU was killed"
    return f"checkpoint {known[0]} is gone: {why}"


def superseded(
    disk: VmDisk,
    base: Base,
    known: Sequence[str],
    needed: Collection[str] = (),
    limit: int = MAX_CHECKPOINTS,
) -> list[str]:
    """Bitmaps to remove once a new checkpoint is in force.

    Those are: what these repositories knew before the base; what tells nothing any more; and the
    oldest beyond the limit. The base stays, for the new point may prove to be damaged. What is
    ``needed`` stays in any case.
    """
    keep = {base.checkpoint, *needed}
    ours = disk.checkpoints
    gone = {name for name in ours if disk.bitmaps[name].inconsistent}
    if base.checkpoint:
        gone.update(name for name in ours if name in known and name < base.checkpoint)
    left = [name for name in ours if name not in gone and name not in keep]
    gone.update(left[max(limit - 2, 0) :])  # the base and the new one count
    return sorted(name for name in gone - keep if not disk.bitmaps[name].busy)
