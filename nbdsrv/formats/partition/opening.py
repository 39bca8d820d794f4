"""``SOURCE~pN``: a partition of a disk as a Disk of its own.

::

    MBR with a 0xee partition, or with none, or no MBR     a GPT, if there is one
    MBR with others only                                   what it says (a GPT beside it is old)

A *hybrid* MBR, 0xee and copies of some of the GPT's partitions, is the first kind.
"""

from collections.abc import Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.slice import Slice
from nbdsrv.errors import DiskError
from nbdsrv.formats.partition.gpt import gpt_partitions
from nbdsrv.formats.partition.mbr import PROTECTIVE, mbr_partitions, parse_mbr
from nbdsrv.formats.partition.structs import MBR_SIZE
from nbdsrv.formats.partition.terms import Partition, corrupt, read

__all__ = ["open_partition", "read_partitions"]

DEFAULT_SECTOR = 512
MAX_LISTED = 16
"""Partition numbers that fit a message."""


async def open_partition(disk: Disk, number: int) -> Disk:
    """Partition ``number`` of ``disk``, which it owns from now on: closed with it, or on error.

    Raises:
        CorruptImage: the partition table is broken, or the partition not within the disk.
        DiskError: there is no such partition.
    """
    try:
        partition = _choose(disk, await read_partitions(disk), number)
        name = f"{disk.name}~p{number}"
        return Slice(disk.workers, disk, partition.offset, partition.length, name)
    except BaseException:
        await disk.close()
        raise


async def read_partitions(disk: Disk) -> list[Partition]:
    """What the partition table lists, unchecked against the disk's size.

    Raises:
        CorruptImage: it is broken.
        DiskError: there is none.
    """
    slots = parse_mbr(await read(disk, 0, MBR_SIZE))
    protective = slots is not None and any(slot.kind == PROTECTIVE for slot in slots)
    if slots is None or protective or all(slot.empty for slot in slots):
        found = await gpt_partitions(disk)
        if found is not None:
            return found
    if slots is None:
        raise DiskError(f"{disk.name}: no partition table; leave out ~p to have the whole disk")
    if protective and all(slot.empty or slot.kind == PROTECTIVE for slot in slots):
        raise corrupt(disk, 0, "its MBR promises a GPT, and there is none")
    return await mbr_partitions(disk, slots, _sector_size(disk))


def _sector_size(disk: Disk) -> int:
    """In which an MBR counts: what the image's format says, or what nearly every disk has."""
    told = disk.facts.get("logical_sector_size", DEFAULT_SECTOR)
    return told if isinstance(told, int) and told in {512, 4096} else DEFAULT_SECTOR


def _choose(disk: Disk, partitions: Sequence[Partition], number: int) -> Partition:
    for partition in partitions:
        if partition.number != number:
            continue
        if partition.extended:
            text = f"{disk.name}: partition {number} only holds the logical ones, from 5 on"
            raise DiskError(text)
        begin, end = partition.offset, partition.offset + partition.length
        if not 0 < begin < end <= disk.size:
            what = f"partition {number} from {begin} to {end} is not within the disk of {disk.size}"
            raise corrupt(disk, partition.entry, what)
        return partition
    numbers = [str(partition.number) for partition in partitions if not partition.extended]
    shown = ", ".join(numbers[:MAX_LISTED]) + (", ..." if len(numbers) > MAX_LISTED else "")
    raise DiskError(f"{disk.name}: no partition {number}; it has {shown or 'none'}")
