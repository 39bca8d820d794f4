"""Which checkpoints repositories have points of, and which point a backup then builds upon.

::

    repository A   P1 of c1   P2 of c2   P3 of c3 ┐
    repository B   P1 of c1   (failed)   P3 of c3 ┴─ known   c3 c1 | c2      the best first
                                                                │
    hypervisor     freeze(known) ─────────────────────────── since c1        c3 was never confirmed
                                                                │
    A builds upon P1, B upon P1: the points of exactly that moment, though both have later ones

Rule: only a point of the very checkpoint that changes are told since is built upon. A later one
would do as well if nobody ever reverted a VM to a snapshot; but people do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbdsrv.backup.parent import AUTO, FULL, Parent, can_build_upon, matches, readable
from nbdsrv.errors import CorruptImage, PointMissing
from nbdsrv.repository.destination import Destination, KnownPoint
from nbdsrv.store.store import ObjectMissing

__all__ = ["History", "known_checkpoints", "needed_checkpoints", "parent_at", "read_history"]

MAX_POINTS = 32
"""Latest points of a group that are looked at: each is an object to be fetched, and hypervisors
keep fewer checkpoints than that."""
MAX_NEEDED = 4
"""Checkpoints of a disk that are kept for a repository that has failed: each is a bitmap that the
hypervisor keeps up to date, or a snapshot's metadata."""


@dataclass(frozen=True, slots=True)
class History:
    """What may be built upon in one repository.

    Attributes:
        destination: the repository.
        group: whose points.
        records: from new to old.
        reason: why there are none, or not the latest; else empty.
        named: is it the one point that the user named?
    """

    destination: Destination
    group: str
    records: Sequence[KnownPoint] = ()
    reason: str = ""
    named: bool = False


def read_history(destination: Destination, group: str, since: str) -> History:
    """The points of a group that ``since`` (``auto``, ``full``, a point) allows. Blocking.

    Raises:
        PointMissing: there is no such point, or more than one.
        RepositoryError: no group can have that name.
        StoreError: the repository cannot be read.
    """
    destination.check_group(group)
    if since == FULL:
        return History(destination, group, reason="--since full")
    if since != AUTO:
        found = [record for record in readable(destination, group)[0] if matches(record, since)]
        if len(found) != 1:
            what = f"{len(found)} points" if found else "no point"
            raise PointMissing(f"{destination.name}: {what} of {group!r} match --since {since}")
        return History(destination, group, found, named=True)
    if reason := destination.renewal(group):
        return History(destination, group, reason=reason)
    records, damaged = [], ""
    for key in list(reversed(destination.stored(group)))[:MAX_POINTS]:
        try:
            records.append(destination.point(key))
        except ObjectMissing:
            continue  # pruned meanwhile
        except CorruptImage:
            damaged = damaged or f"{key} is damaged"
    if damaged and not records:
        damaged = f"no point of {group!r} can be built upon: {damaged}"
    return History(destination, group, records, damaged or _nothing(group, records))


def _nothing(group: str, records: Sequence[KnownPoint]) -> str:
    return "" if records else f"no point of {group!r} has this disk"


def known_checkpoints(histories: Sequence[History], kind: str) -> dict[str, list[str]]:
    """By disk, the checkpoints that could be built upon, the best first.

    Those that all repositories have points of come from new to old; then the others, those that
    more of them have before those that fewer have: what is not among them is scanned there.
    """
    holders: dict[tuple[str, str], set[int]] = {}
    latest: dict[tuple[str, str], str] = {}
    for number, history in enumerate(histories):
        for record in history.records:
            for disk in record.disks:
                if disk.cbt is None or disk.cbt.get("kind") != kind or not disk.cbt.get("id"):
                    continue
                key = (disk.name, disk.cbt["id"])
                holders.setdefault(key, set()).add(number)
                latest[key] = max(latest.get(key, ""), record.id)
    order = sorted(holders, key=lambda key: (len(holders[key]), latest[key]), reverse=True)
    known: dict[str, list[str]] = {}
    for name, checkpoint in order:
        known.setdefault(name, []).append(checkpoint)
    return known


def parent_at(history: History, kind: str, since: Mapping[str, str]) -> Parent:
    """The point to build upon, if changes are told since these checkpoints. Blocking.

    The latest of which most disks are in that state; without any, the latest that can be read:
    what it has need not be stored again.

    Args:
        history: of the repository.
        kind: of hypervisor.
        since: by disk; "" where nothing tells.

    Raises:
        CorruptImage: the point that was named is damaged.
        StoreError: the repository cannot be read.
    """

    def fits(record: KnownPoint) -> int:
        return sum(
            disk.cbt == {"kind": kind, "id": since[disk.name]}
            for disk in record.disks
            if since.get(disk.name)
        )

    damaged = history.reason
    # Stable: of those that fit equally well the latest stays the first.
    for record in sorted(history.records, key=fits, reverse=True):
        try:
            if can_build_upon(history.destination, record, list(since)):
                return Parent(record, damaged, named=history.named)
        except CorruptImage:
            if history.named:
                raise
            damaged = damaged or f"the maps of {record.id} are damaged"
    return Parent(None, damaged or f"no point of {history.group!r} has this disk")


def needed_checkpoints(known: Mapping[str, Sequence[str]]) -> list[str]:
    """What a repository that has failed may want to build upon next time."""
    needed = [each for checkpoints in known.values() for each in checkpoints[:MAX_NEEDED]]
    return list(dict.fromkeys(needed))
