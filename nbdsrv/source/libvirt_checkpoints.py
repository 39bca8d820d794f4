"""Which checkpoint a disk's changes are told since, and which checkpoints may go.

::

    libvirt          virtnbdbackup.0   nbdsrv-A   nbdsrv-B   virtnbdbackup.1   nbdsrv-C
    repositories                       A          B                            (never confirmed)
    since                                         B
    after success                      -          B, if needed again           -        + nbdsrv-D

libvirt gives every checkpoint a bitmap of its own in the qcow2 image, which goes on recording until
the checkpoint is deleted. So deleting one takes nothing from any other, whoever's it is; and the
new checkpoint of a backup that fails can be deleted without any change being lost.

Rule: only ``nbdsrv-<ulid>`` is ours. Nothing else is ever deleted, and nothing else built upon.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nbdsrv.source.libvirt_xml import Checkpoint, DomainDisk
from nbdsrv.ulid import ULID_PATTERN

__all__ = ["Choice", "choose", "droppable", "is_ours", "token_of"]

PREFIX = "nbdsrv-"
MAX_KEPT = 16
"""Checkpoints of ours in a domain; a bitmap of each is kept up to date with every write (2 MiB of
memory for each TiB). Room for some repositories that are backed up to at different times."""

_TOKEN = re.compile(rf"nbdsrv-(?:libvirt-)?({ULID_PATTERN})(?![0-9A-Za-z])")


@dataclass(frozen=True, slots=True)
class Choice:
    """For one disk.

    Attributes:
        since: the checkpoint, or "".
        reason: why there is none.
    """

    since: str = ""
    reason: str = ""


def token_of(text: str) -> str | None:
    """The backup of ours that the name of a checkpoint or the path of a file belongs to."""
    match = _TOKEN.search(text)
    return match[1] if match else None


def is_ours(checkpoint: str) -> bool:
    """Was a checkpoint of that name made by us?"""
    token = token_of(checkpoint)
    return token is not None and checkpoint == PREFIX + token


def choose(
    disk: DomainDisk,
    known: Sequence[str],
    checkpoints: Mapping[str, Checkpoint],
    broken: Mapping[str, str],
) -> Choice:
    """What the changes of a disk are told since.

    Args:
        disk: as it is now.
        known: what could be built upon, the best first.
        checkpoints: that libvirt has, by name.
        broken: those that it cannot tell changes since, and what it said.
    """
    if not known:
        return Choice(reason=f"no repository has a point of a checkpoint of {disk.target}")
    doubts = []
    for name in known:
        doubt = _doubt(disk, name, checkpoints, broken)
        if not doubt:
            return Choice(name)
        doubts.append(doubt)
    more = f" (and {len(doubts) - 1} older likewise)" if len(doubts) > 1 else ""
    return Choice(reason=doubts[0] + more)


def _doubt(
    disk: DomainDisk,
    name: str,
    checkpoints: Mapping[str, Checkpoint],
    broken: Mapping[str, str],
) -> str:
    """Why a checkpoint may not tell everything about a disk; "" if it does."""
    if not is_ours(name) or name not in checkpoints:
        return f"libvirt no longer has checkpoint {name}"
    if name in broken:
        return f"checkpoint {name} cannot be used: {broken[name]}"
    images = checkpoints[name].images
    if disk.target not in images:
        return f"checkpoint {name} does not track {disk.target}"
    # A bitmap is found by its name in whatever image the disk has now. Two disks that changed
    # places both have one, and each would tell the other's changes.
    then = images[disk.target]
    if then and then not in disk.images:
        return f"{disk.target} is {disk.images[0]} now and was {then} at checkpoint {name}"
    return ""


def droppable(
    checkpoints: Sequence[Checkpoint],
    confirmed: str,
    known: Collection[str],
    needed: Collection[str],
    present: Collection[str],
) -> list[str]:
    """Which checkpoints may go once a new one is confirmed, from old to new.

    Those that this backup's repositories have had and need no longer, if the new one tracks all
    their disks: a disk that was not backed up this time still needs them. Others of ours belong to
    repositories that were not part of it; of those the latest stay, MAX_KEPT in all.

    Args:
        checkpoints: that libvirt has.
        confirmed: the new one.
        known: those that repositories of this backup have points of.
        needed: those of them that must stay.
        present: disks that the domain has now.
    """
    tracked = {each.name: set(each.images) for each in checkpoints if is_ours(each.name)}
    ours = sorted(tracked)
    if confirmed not in ours:
        return []  # nothing to build upon instead
    superseded = [
        name
        for name in ours
        if name in known
        and name not in needed
        and name < confirmed
        and tracked[name] & {*present} <= tracked[confirmed]
    ]
    staying = [name for name in ours if name not in superseded]
    excess = [name for name in staying if name not in needed and name < confirmed]
    return sorted(superseded + excess[: max(len(staying) - MAX_KEPT, 0)])
