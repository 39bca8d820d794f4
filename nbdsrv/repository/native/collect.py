"""The collector of garbage: packs that no point refers to any more. Blocking.

::

    lease ─ tombstones ─ leases ─ mark ──┬─ due: new index ─ delete old index, packs, tombstones
      1         2          3       4     └─ not referred to: condemn;  mostly not: repack, condemn

Rules, for writers know nothing of collectors but their tombstones:

* Nothing is deleted that was not condemned for the time of grace, and marked again after that.
* A writer that took its lease before a tombstone was put may use what that condemns. So while such
  a lease lives, the tombstone waits; what the writer commits is then seen by the mark (4), because
  leases are looked at (3) before points are.
* There is one collector at a time. With two, one could lift a tombstone, a writer begin and use
  what it had condemned, and the other, which had read the tombstone before, delete it.
* Where a point, root or page cannot be read, what it refers to is not known: nothing is deleted.
* At any moment before its last step a run may die. What it leaves is a tombstone that waits, a new
  pack nobody refers to, or one index too many: all of it the next run's business.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.alone import be_alone
from nbdsrv.repository.native.boot_trace import useless_traces
from nbdsrv.repository.native.census import THREADS, Census, put_parts
from nbdsrv.repository.native.layout import LEASES, METAS
from nbdsrv.repository.native.lease import Lease, LeaseRecord, forget_stale, live_leases, store_time
from nbdsrv.repository.native.mark import Mark, Missing, mark
from nbdsrv.repository.native.repack import repack
from nbdsrv.repository.native.scrub import damaged_packs
from nbdsrv.repository.native.tombstones import Standing, condemn, standing
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import Stored

__all__ = ["DEFAULT_GRACE_S", "DEFAULT_REPACK", "MARGIN_S", "Collected", "collect"]

DEFAULT_GRACE_S = 24 * 3600.0
DEFAULT_REPACK = 50
"""Percent of a pack that must be referred to; less, and the rest is moved."""
MARGIN_S = 3600.0
"""A lease that was taken up to so long after a tombstone counts as older: a store whose listings
lag may have shown its holder no tombstone."""
AT_ONCE = 64
"""Objects that are deleted between two looks at our lease."""


@dataclass(slots=True)
class Collected:
    """What a collector did; in a dry run, what it would do.

    Attributes:
        points: that were read.
        packs: that are there, before.
        stored_bytes: of them.
        live_bytes: of them that points refer to.
        deleted_packs: that are gone.
        freed_bytes: that are.
        condemned_packs: newly; they go in a later run.
        condemned_bytes: of those.
        moved_packs: of the condemned, those whose live entries were copied elsewhere.
        moved_bytes: that took, in new packs.
        waiting_packs: condemned before, and not due yet.
        waiting_for: what they wait for; "" if for nothing.
        spared_packs: not referred to, but a writer is at work that may have made them.
        lifted_packs: condemned before, and referred to again.
        index_segments: that were merged.
        damage: what was found damaged.
        missing: what points refer to and is not there.
        missing_count: of all of it.
    """

    points: int = 0
    packs: int = 0
    stored_bytes: int = 0
    live_bytes: int = 0
    deleted_packs: int = 0
    freed_bytes: int = 0
    condemned_packs: int = 0
    condemned_bytes: int = 0
    moved_packs: int = 0
    moved_bytes: int = 0
    waiting_packs: int = 0
    waiting_for: str = ""
    spared_packs: int = 0
    lifted_packs: int = 0
    index_segments: int = 0
    damage: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    missing_count: int = 0


def collect(
    vault: Vault,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    repack_below: int = DEFAULT_REPACK,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Collected:
    """Collect garbage.

    Args:
        vault: the repository; nothing else uses its index meanwhile.
        grace_s: how long packs stay condemned before they go; 0: no longer than it takes.
        repack_below: percent; packs of which less is referred to are repacked. 0: none.
        dry_run: write and delete nothing.
        tell: of each step; for people.

    Raises:
        CorruptImage: a point, root or page cannot be read. Nothing has been deleted.
        RepositoryError: another collector is at work, or ours has lost its lease.
        StoreError: the store does not answer. What has been done is right; run again.
    """
    if dry_run:
        run = _Run(vault, None, repack_below, tell)
        run.once(grace_s)
        return run.done
    with Lease(vault.store, "collector") as lease:
        run = _Run(vault, lease, repack_below, tell)
        run.be_alone()
        condemned = run.once(grace_s)
        if condemned and grace_s <= 0:
            run.once(grace_s, last=True)
    return run.done


class _Run:
    """One run; without a lease it changes nothing."""

    def __init__(
        self, vault: Vault, lease: Lease | None, repack_below: int, tell: Callable[[str], None]
    ) -> None:
        self._vault = vault
        self._store = vault.store
        self._lease = lease
        self._repack_below = repack_below
        self._tell = tell
        self.done = Collected()

    def be_alone(self) -> None:
        """Raises RepositoryError if another collector is at work. Stale leases are deleted."""
        now = self._now()
        be_alone(self._store, self._lease_key(), now)
        forget_stale(self._store, now)

    def once(self, grace_s: float, *, last: bool = False) -> bool:
        """Mark, delete what is due, condemn what is not referred to; has that been anything?"""
        tombstones = standing(self._store)
        damaged = damaged_packs(self._store)
        now = self._now()
        writers = [lease for lease in live_leases(self._store, now) if _writes(lease)]
        due, waiting = _divided(tombstones, writers, now, grace_s)
        condemned = {name for each in tombstones for name in each.packs | each.metas}
        self._tell("reading the index")
        census = Census(self._vault)
        self._tell("marking")
        found = mark(self._vault, census, condemned | damaged)
        self._account(census, found, first=not last)
        if found.damage:
            raise _incomplete(found)
        dead = {name for each in due for name in each.packs | each.metas} - found.live.keys()
        self._sweep(census, found, dead, due)
        self.done.waiting_packs = len(
            {name for each in waiting for name in each.packs | each.metas}
            & census.packs.keys() - dead
        )
        self.done.waiting_for = _waits_for(waiting, writers)
        self._forget_traces()
        if last:
            return False
        idle = {
            name: stored
            for name, stored in census.first.items()
            if name in census.packs
            and name not in condemned
            and stored.key not in census.unreadable  # nobody knows what it holds
        }
        spared = {name for name, stored in idle.items() if _made_by(writers, stored)}
        self.done.spared_packs = len(spared - found.live.keys())
        for name in spared:
            del idle[name]
        return self._condemn(found, idle, damaged)

    # --- deleting ------------------------------------------------------------------------------

    def _sweep(self, census: Census, found: Mark, dead: set[bytes], due: list[Standing]) -> None:
        """A new index, then the packs, then the tombstones."""
        gone = [census.packs[name] for name in sorted(dead & census.packs.keys())]
        self.done.deleted_packs += len(gone)
        self.done.freed_bytes += sum(stored.size for stored in gone)
        condemned = {name for each in due for name in each.packs | each.metas}
        self.done.lifted_packs += len(condemned & found.live.keys())
        if self._lease is None:
            return
        merged = census.merged(dead)
        if merged is not None:
            self._tell("writing the index")
            parts, old = merged
            self.done.index_segments += len(old)
            put_parts(parts, self._vault)
            self._delete(old)
        if gone:
            self._tell("deleting packs")
        self._delete([stored.key for stored in gone])
        self._delete([each.key for each in due])

    def _delete(self, keys: list[str]) -> None:
        """Raises RepositoryError if our lease has lapsed: another collector may be at work."""
        assert self._lease is not None
        for at in range(0, len(keys), AT_ONCE):
            self._lease.check()
            part = keys[at : at + AT_ONCE]
            if self._store.distant:
                with ThreadPoolExecutor(THREADS, "nbdsrv-delete") as threads:
                    list(threads.map(self._store.delete, part))
            else:
                for key in part:
                    self._store.delete(key)

    def _forget_traces(self) -> None:
        """Boot traces of VMs that have no points any more."""
        useless = [key for key, _ in useless_traces(self._vault)]
        if self._lease is not None:
            self._delete(useless)

    # --- condemning ----------------------------------------------------------------------------

    def _condemn(self, found: Mark, idle: dict[bytes, Stored], damaged: set[bytes]) -> bool:
        garbage = {name for name in idle if name not in found.live}
        sparse = {
            name: (stored, found.live[name].rows())
            for name, stored in idle.items()
            if name in found.live and self._is_sparse(found, name, stored, damaged)
        }
        moved = set(sparse)
        if self._lease is not None:
            if sparse:
                self._tell("repacking")
            moved, written, damage = repack(self._vault, sparse)
            self.done.moved_bytes += written
            self.done.damage += [str(error) for error in damage]
            self._lease.check()
        self.done.moved_packs += len(moved)
        names = garbage | moved
        self.done.condemned_packs += len(names)
        self.done.condemned_bytes += sum(idle[name].size for name in names)
        if self._lease is None or not names:
            return False
        metas = {name for name in names if idle[name].key.startswith(METAS)}
        condemn(self._store, names - metas, metas)
        return True

    def _is_sparse(self, found: Mark, name: bytes, stored: Stored, damaged: set[bytes]) -> bool:
        """A damaged pack is moved if it can be: what is broken in it may be needed no more."""
        if name in damaged:
            return self._repack_below > 0
        return found.live[name].bytes * 100 < stored.size * self._repack_below

    # --- facts ---------------------------------------------------------------------------------

    def _account(self, census: Census, found: Mark, *, first: bool) -> None:
        done = self.done
        done.points = found.points
        done.missing, done.missing_count = found.missing, found.missing_count
        if not first:
            return
        done.damage += [str(error) for error in census.damage.values()]
        done.packs = len(census.packs)
        done.stored_bytes = sum(stored.size for stored in census.packs.values())
        packs = census.packs
        done.live_bytes = sum(
            min(live.bytes, packs[name].size) for name, live in found.live.items() if name in packs
        )

    def _lease_key(self) -> str:
        assert self._lease is not None
        return f"{LEASES}{self._lease.name}.json"

    def _now(self) -> float:
        """By the store's clock; in a dry run, which puts nothing, by this host's."""
        if self._lease is None:
            return time.time()
        self._lease.refresh()
        return store_time(self._store, self._lease_key())


def _divided(
    tombstones: list[Standing], writers: list[LeaseRecord], now: float, grace_s: float
) -> tuple[list[Standing], list[Standing]]:
    """Tombstones that are due, and those that wait."""
    due: list[Standing] = []
    waiting: list[Standing] = []
    for each in tombstones:
        young = now - each.modified < grace_s
        older_writer = any(lease.opened < each.modified + MARGIN_S for lease in writers)
        (waiting if young or older_writer else due).append(each)
    return due, waiting


def _waits_for(waiting: list[Standing], writers: list[LeaseRecord]) -> str:
    if not waiting:
        return ""
    newest = max(each.modified for each in waiting)
    for lease in writers:
        if lease.opened < newest + MARGIN_S:
            return f"a backup that runs on {lease.host or 'some host'} (process {lease.pid})"
    return "their time of grace"


def _writes(lease: LeaseRecord) -> bool:
    """What is neither of the two others counts as a writer."""
    return lease.holder not in {"reader", "collector"}


def _made_by(writers: list[LeaseRecord], stored: Stored) -> bool:
    """May the pack be one that a writer at work has put, and not committed yet?"""
    return any(stored.modified >= lease.opened for lease in writers)


def _incomplete(found: Mark) -> CorruptImage:
    more = len(found.damage) - 1
    others = f" (and {more} more)" if more else ""
    return CorruptImage(
        f"{found.damage[0]}{others}; what it refers to is not known, so nothing is deleted;"
        " `nbdsrv verify` tells what it hurts, `nbdsrv prune --damaged` deletes such points"
    )
