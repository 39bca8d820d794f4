"""Deleting restore points by rules, and nothing but them: what they held is the collector's.

::

    points ── rules, group by group ──> kept, with reasons
                                   └──> dropped ── locked? read by somebody? pinned? ── spared
                                                └── deleted, from old to new

Any point can go: each is whole, none needs another. A run that dies has deleted some of the oldest.
"""

import time
from dataclasses import dataclass, field
from datetime import tzinfo

from nbdsrv.errors import CorruptImage, RepositoryError
from nbdsrv.repository.native.damage import is_outage
from nbdsrv.repository.native.layout import point_key
from nbdsrv.repository.native.lease import Lease, live_leases
from nbdsrv.repository.native.pins import Pin, pins
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.retention import Candidate, Rules, decide
from nbdsrv.store.store import Stored

__all__ = ["DamagedPoint", "Fate", "Pruned", "prune"]

NEWER = "use a newer nbdsrv"
"""In the text of an error: the point is not damaged, but of a version this one does not know."""


@dataclass(slots=True)
class Fate:
    """What became of a point; in a dry run, what would.

    Attributes:
        point: the record.
        reasons: why the rules keep it; none if they drop it.
        spared: why it stays though they do; "" if it goes.
    """

    point: PointRecord
    reasons: tuple[str, ...]
    spared: str = ""

    @property
    def deleted(self) -> bool:
        """Is it gone?"""
        return not self.reasons and not self.spared


@dataclass(slots=True)
class DamagedPoint:
    """A point that cannot be read. Rules know nothing of it.

    Attributes:
        key: of its object.
        text: what is wrong with it.
        deleted: is it gone?
    """

    key: str
    text: str
    deleted: bool = False


@dataclass(slots=True)
class Pruned:
    """What a run did: ``fates`` by group, each from new to old."""

    fates: dict[str, list[Fate]] = field(default_factory=dict)
    damaged: list[DamagedPoint] = field(default_factory=list)

    @property
    def deleted(self) -> list[PointRecord]:
        """The points that are gone, as they went: from old to new."""
        gone = [fate.point for fates in self.fates.values() for fate in fates if fate.deleted]
        return sorted(gone, key=lambda point: (point.created, point.id))


def prune(
    vault: Vault,
    group: str | None,
    rules: Rules | None,
    *,
    zone: tzinfo | None = None,
    damaged: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Pruned:
    """Delete the points that the rules do not keep. Blocking.

    Args:
        vault: the repository.
        group: whose points; None: those of all groups, each by itself.
        rules: None: only damaged points are deleted.
        zone: whose days the rules mean; None: this host's.
        damaged: delete what cannot be read.
        force: also what somebody is reading, or has pinned. What is locked stays in any case.
        dry_run: delete nothing.

    Raises:
        ConfigError: the rules are none.
        DiskError: the store does not answer. What is gone was to go.
    """
    done = Pruned()
    by_group: dict[str, list[PointRecord]] = {}
    for stored, record in vault.read_points(vault.point_objects(group)):
        if isinstance(record, PointRecord):
            by_group.setdefault(record.group, []).append(record)
        elif not isinstance(record, CorruptImage) or is_outage(record, vault.store):
            raise record
        else:
            done.damaged.append(DamagedPoint(stored.key, str(record)))
    for name, records in sorted(by_group.items()):
        done.fates[name] = _fates(records, rules, zone)
    if dry_run:
        _spare(done, time.time(), {} if force else _needed(vault, time.time(), {}))
        _mark_damaged(done, delete=damaged)
        return done
    # A reader's lease on nothing: it tells the time by the store's clock.
    with Lease(vault.store, "reader") as lease:
        # A lock is held by both clocks: a store's may be wrong, and so may ours.
        now = min(time.time(), lease.record.opened)
        read: dict[Stored, Pin] = {}
        _spare(done, now, {} if force else _needed(vault, lease.record.opened, read))
        _mark_damaged(done, delete=damaged)
        for record in done.deleted:
            # Asked again each time: who opens a point takes its lease first, then looks for it.
            needed = {} if force else _needed(vault, lease.record.opened, read)
            if _is_idle(done.fates[record.group], record, needed):
                vault.store.delete(point_key(record.group, record.id))
        if force:
            _forget_pins(vault, {f"{each.group}/{each.id}" for each in done.deleted})
        for each in done.damaged:
            if each.deleted:
                vault.store.delete(each.key)
    return done


def _fates(records: list[PointRecord], rules: Rules | None, zone: tzinfo | None) -> list[Fate]:
    by_id = {record.id: record for record in records}
    if rules is None:
        ordered = sorted(records, key=lambda record: record.id, reverse=True)
        return [Fate(record, ("no rule was given",)) for record in ordered]
    candidates = [Candidate(record.id, record.created, record.labels) for record in records]
    return [
        Fate(by_id[decision.point.id], decision.reasons)
        for decision in decide(candidates, rules, zone)
    ]


def _spare(done: Pruned, now: float, needed: dict[str, str]) -> None:
    """What must not go although the rules would let it."""
    for fates in done.fates.values():
        for fate in fates:
            point = fate.point
            if fate.reasons:
                continue
            if point.lock_until > now:
                until = time.strftime(
                    "%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(point.lock_until, 1e11))
                )
                fate.spared = f"locked until {until}"
            else:
                fate.spared = needed.get(f"{point.group}/{point.id}", "")


def _is_idle(fates: list[Fate], record: PointRecord, needed: dict[str, str]) -> bool:
    """May the point still go?"""
    why = needed.get(f"{record.group}/{record.id}", "")
    if why:
        for fate in fates:
            if fate.point is record:
                fate.spared = why
    return not why


def _needed(vault: Vault, now: float, read: dict[Stored, Pin]) -> dict[str, str]:
    """``group/ulid`` of the points that are being read or are pinned: by whom.

    ``read``: the pins that were read before.
    """
    leased = {
        point: f"it is being read on {lease.host or 'some host'} (process {lease.pid})"
        for lease in live_leases(vault.store, now)
        for point in lease.points
    }
    return {pin.point: f"{pin} stands on it" for pin in pins(vault.store, read)} | leased


def _forget_pins(vault: Vault, gone: set[str]) -> None:
    """What they pinned is gone by force."""
    try:
        standing = pins(vault.store)
    except RepositoryError:
        return  # one that cannot be read is somebody's to look at
    for pin in standing:
        if pin.point in gone:
            vault.store.delete(pin.key)


def _mark_damaged(done: Pruned, *, delete: bool) -> None:
    for each in done.damaged:
        each.deleted = delete and NEWER not in each.text
