"""Which point a backup builds upon.

::

    --since auto     the group's latest point that can be read and has one of the disks
    --since full     none
    --since POINT    that one: an id, the beginning of one, or of a time (2026-01-31T12)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.repository.native.layout import point_prefix
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing

__all__ = ["AUTO", "FULL", "Parent", "can_build_upon", "choose_parent", "matches"]

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

    record: PointRecord | None
    reason: str = ""
    named: bool = False


def choose_parent(vault: Vault, group: str, disks: Sequence[str], since: str) -> Parent:
    """The point that ``since`` means in one repository. Blocking.

    Raises:
        PointMissing: there is no such point, or more than one.
        CorruptImage: the point that was named is damaged.
        RepositoryError: no group can have that name.
        StoreError: the repository cannot be read.
    """
    try:
        point_prefix(group)
    except ValueError as error:
        raise RepositoryError(f"{vault.name}: {error}") from error
    if since == FULL:
        return Parent(None, "--since full")
    if since != AUTO:
        return Parent(_named(vault, group, disks, since), named=True)
    damaged = ""
    for stored in reversed(vault.point_objects(group)):
        try:
            record = vault.point(stored.key)
            if can_build_upon(vault, record, disks):
                return Parent(record, damaged)
        except ObjectMissing:
            continue  # pruned meanwhile
        except CorruptImage:
            damaged = damaged or f"{stored.key} is damaged"
    if damaged:
        return Parent(None, f"no point of {group!r} can be built upon: {damaged}")
    return Parent(None, f"no point of {group!r} has this disk")


def _named(vault: Vault, group: str, disks: Sequence[str], text: str) -> PointRecord:
    records, damaged = vault.points(group)
    found = [record for record in records if matches(record, text)]
    if len(found) != 1:
        what = f"{len(found)} points" if found else "no point"
        why = f"; {len(damaged)} of its points are damaged" if damaged else ""
        raise PointMissing(
            f"{vault.name}: {what} of {group!r} match --since {text}{why}; `nbdsrv ls` shows them"
        )
    can_build_upon(vault, found[0], disks)
    return found[0]


def matches(record: PointRecord, text: str) -> bool:
    """Is it what ``--since`` calls so: by its id's beginning, or its time's?"""
    from nbdsrv.repository.native.listing import described

    return record.id.startswith(text.upper()) or described(record).stamp.startswith(text)


def can_build_upon(vault: Vault, record: PointRecord, disks: Sequence[str]) -> bool:
    """Has it one of the disks? Blocking.

    Raises:
        CorruptImage: it has, and a map of theirs is damaged.
    """
    there = [disk for disk in record.disks if disk.name in disks]
    for disk in there:
        vault.root(disk.root)
    return bool(there)
