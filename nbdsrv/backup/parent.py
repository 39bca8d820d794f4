"""Which point a backup builds upon.

::

    --since auto     the group's latest point that can be read and has one of the disks
    --since full     none
    --since POINT    that one: an id, the beginning of one, or of a time (2026-01-31T12)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdsrv.errors import CorruptImage, PointMissing
from nbdsrv.repository.destination import Destination, KnownPoint
from nbdsrv.repository.repository import stamp_of
from nbdsrv.store.store import ObjectMissing, StoreError

__all__ = ["AUTO", "FULL", "Parent", "can_build_upon", "choose_parent", "matches", "readable"]

AUTO = "auto"
FULL = "full"


@dataclass(frozen=True, slots=True)
class Parent:
    """What was chosen.

    Attributes:
        record: the point, or None.
        reason: why there is none, or why it is not the latest one; else empty.
        named: did the user name it?
    """

    record: KnownPoint | None
    reason: str = ""
    named: bool = False


def choose_parent(destination: Destination, group: str, disks: Sequence[str], since: str) -> Parent:
    """The point that ``since`` means in one repository. Blocking.

    Raises:
        PointMissing: there is no such point, or more than one.
        CorruptImage: the point that was named is damaged.
        RepositoryError: no group can have that name.
        StoreError: the repository cannot be read.
    """
    destination.check_group(group)
    if since == FULL:
        return Parent(None, "--since full")
    if since != AUTO:
        return Parent(_named(destination, group, disks, since), named=True)
    if reason := destination.renewal(group):
        return Parent(None, reason)
    damaged = ""
    for key in reversed(destination.stored(group)):
        try:
            record = destination.point(key)
            if can_build_upon(destination, record, disks):
                return Parent(record, damaged)
        except ObjectMissing:
            continue  # pruned meanwhile
        except CorruptImage as error:
            unread = isinstance(error.__cause__, StoreError)
            damaged = damaged or f"{key} {'cannot be read' if unread else 'is damaged'}"
    if damaged:
        return Parent(None, f"no point of {group!r} can be built upon: {damaged}")
    return Parent(None, f"no point of {group!r} has this disk")


def _named(destination: Destination, group: str, disks: Sequence[str], text: str) -> KnownPoint:
    records, damaged = readable(destination, group)
    found = [record for record in records if matches(record, text)]
    if len(found) != 1:
        what = f"{len(found)} points" if found else "no point"
        why = f"; {len(damaged)} of its points cannot be read" if damaged else ""
        raise PointMissing(
            f"{destination.name}: {what} of {group!r} match --since {text}{why};"
            " `nbdsrv ls` shows them"
        )
    can_build_upon(destination, found[0], disks)
    return found[0]


def readable(destination: Destination, group: str) -> tuple[list[KnownPoint], list[str]]:
    """All points of a group that can be read, and the keys of those that are damaged. Blocking."""
    records, damaged = [], []
    for key in destination.stored(group):
        try:
            records.append(destination.point(key))
        except ObjectMissing:
            continue  # pruned meanwhile
        except CorruptImage:
            damaged.append(key)
    return records, damaged


def matches(record: KnownPoint, text: str) -> bool:
    """Is it what ``--since`` calls so: by its id's beginning, or its time's?"""
    return record.id.startswith(text.upper()) or stamp_of(record.created).startswith(text)


def can_build_upon(destination: Destination, record: KnownPoint, disks: Sequence[str]) -> bool:
    """Has it one of the disks? Blocking.

    Raises:
        CorruptImage: it has, and one of them is damaged.
    """
    there = [disk for disk in record.disks if disk.name in disks]
    for disk in there:
        destination.prove(record, disk.name)
    return bool(there)
