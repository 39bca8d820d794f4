"""What disks a VM has, and which checkpoints each of them keeps.

::

    query-block        device  ── node ──  qcow2 v3      bitmaps in the image: they outlive QEMU
                                           raw, others   bitmaps in QEMU's memory: they do not
    dirty-bitmaps      nbdsrv-01J9...  nbdsrv-01JA...    ours: each records since its own moment

Rule: a checkpoint of ours is one bitmap that has recorded every change since its moment, alone,
without pause. That it is there and records is all there is to know: no state elsewhere could
contradict it, and none needs to be repaired after a crash. (libvirt's checkpoints each record
until the next one only: whoever dies between two of them leaves bitmaps that must be merged
before the next write is lost.) It costs one more bit set per write and checkpoint.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qmp import making_sense

__all__ = ["Bitmap", "VmDisk", "bitmaps_of", "chosen_disks", "disks_of", "is_checkpoint"]

CHECKPOINT = re.compile(r"nbdsrv-[0-7][0-9A-HJKMNP-TV-Z]{25}")
MAX_DISKS = 1000
"""Disks of one VM; QEMU's buses have fewer places."""
MAX_SIZE = (1 << 63) - 1
FIRMWARE = re.compile(r"pflash[0-9]*")
QDEV = re.compile(r"/machine/peripheral/([^/]+)(?:/.*)?")


def is_checkpoint(name: str) -> bool:
    """Is a bitmap of that name one of ours?"""
    return CHECKPOINT.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap.

    Attributes:
        recording: changes are added.
        persistent: it outlives QEMU.
        inconsistent: QEMU ended without saving it.
        busy: a job or an export uses it.
    """

    name: str
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool

    @property
    def flaw(self) -> str:
        """Why it does not tell what has changed; "" if it does."""
        if self.inconsistent:
            return "is inconsistent: QEMU ended without saving it"
        if not self.recording:
            return "has been disabled by somebody else"
        if self.busy:
            return "is in use by somebody else"
        return ""


@dataclass(frozen=True, slots=True)
class VmDisk:
    """A disk.

    Attributes:
        name: its device's id, or its drive's name, or its node's.
        node: of QEMU's block graph that the device reads.
        size: bytes.
        driver: of the node: ``qcow2``, ``raw`` ...
        file: what the node is made of.
        removable: a CD, a floppy.
        read_only: the guest cannot write to it.
        firmware: flash memory of the machine, not a disk.
        keeps: can bitmaps be stored in the image?
        bitmaps: by name.
    """

    name: str
    node: str
    size: int
    driver: str
    file: str
    removable: bool
    read_only: bool
    firmware: bool
    keeps: bool
    bitmaps: Mapping[str, Bitmap]

    @property
    def checkpoints(self) -> list[str]:
        """Names of our bitmaps, the newest first."""
        return sorted(filter(is_checkpoint, self.bitmaps), reverse=True)


def disks_of(query_block: Any, name: str) -> list[VmDisk]:
    """All devices with a medium, from what QEMU answered.

    Args:
        query_block: what query-block returned.
        name: of the VM, for messages.

    Raises:
        SourceError: that makes no sense.
    """
    with making_sense(name):
        found = [_disk(device) for device in query_block if device.get("inserted")]
    if len(found) > MAX_DISKS:
        raise SourceError(f"{name}: {len(found)} disks; at most {MAX_DISKS} can be backed up")
    names = [disk.name for disk in found]
    if twice := next((each for each in names if names.count(each) > 1), ""):
        raise SourceError(f"{name}: two disks are called {twice!r}; give their devices ids")
    return found


def _disk(device: Mapping[str, Any]) -> VmDisk:
    inserted = device["inserted"]
    image = inserted["image"]
    node, drive, qdev = inserted.get("node-name", ""), device["device"], device.get("qdev", "")
    match = QDEV.fullmatch(qdev)
    # An id that QEMU made up changes from start to start.
    id_ = match[1] if match else ("" if "/" in qdev else qdev)
    names = [each for each in (id_, drive, node) if each and not each.startswith("#")]
    size = int(image["virtual-size"])
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"a size of {size}")
    details = image.get("format-specific", {}).get("data", {})
    return VmDisk(
        name=str(names[0] if names else node),
        node=str(node or drive),
        size=size,
        driver=str(inserted["drv"]),
        file=str(inserted.get("file", "")),
        removable=bool(device.get("removable")),
        read_only=bool(inserted["ro"]),
        firmware=FIRMWARE.fullmatch(drive) is not None or "flash" in qdev,
        keeps=inserted["drv"] == "qcow2"
        and details.get("compat") != "0.10"
        and not details.get("data-file-raw"),  # QEMU refuses bitmaps of either
        bitmaps=bitmaps_of(inserted),
    )


def bitmaps_of(node: Mapping[str, Any]) -> dict[str, Bitmap]:
    """The named bitmaps of a node as QEMU describes it."""
    return {
        str(each["name"]): Bitmap(
            str(each["name"]),
            bool(each["recording"]),
            bool(each["persistent"]),
            bool(each.get("inconsistent")),
            bool(each["busy"]),
        )
        for each in node.get("dirty-bitmaps", ())
        if each.get("name")
    }


def chosen_disks(disks: Iterable[VmDisk], wanted: Sequence[str], name: str) -> list[VmDisk]:
    """Those that are wanted; without any, those the guest can write to.

    Raises:
        SourceError: there is none, or not of that name.
    """
    disks = list(disks)
    if not wanted:
        chosen = [disk for disk in disks if not (disk.removable or disk.read_only or disk.firmware)]
        if not chosen:
            raise SourceError(f"{name}: the VM has no disk that can be written to; name one")
        return chosen
    chosen = []
    for each in wanted:
        found = [disk for disk in disks if disk.name == each]
        if len(found) != 1:
            there = ", ".join(disk.name for disk in disks) or "none"
            raise SourceError(f"{name}: no disk {each!r}; there are: {there}")
        if found[0] not in chosen:
            chosen.append(found[0])
    return chosen
