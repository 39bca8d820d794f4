"""The collector: what goes, what stays, and what any crash leaves."""

import random
from collections.abc import Callable

import pytest

from nbdsrv.errors import CorruptImage, RepositoryError
from nbdsrv.repository.native.collect import Collected, collect
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.layout import (
    CONDEMNED,
    CONFIG,
    INDEX,
    LEASES,
    METAS,
    PACKS,
    point_key,
)
from nbdsrv.repository.native.lease import STALE_S, Lease
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.scrub import Scrubbing
from nbdsrv.repository.native.tombstones import condemned_packs, standing
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.faulty import Crash, Crashed, FaultyStore, crashes
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store
from tests.repository.native.building import CHUNK, Building
from tests.repository.native.read_back import read_back

DAY = 86400.0
PASSPHRASE = "correct horse"


class Time:
    """The store's clock."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def content(seed: int, chunks: int = 40) -> bytes:
    """A disk of random chunks, the fourth part of them zeroes, with a tail."""
    rng = random.Random(seed)
    parts = [rng.randbytes(CHUNK) if rng.random() < 0.75 else bytes(CHUNK) for _ in range(chunks)]
    return b"".join(parts) + rng.randbytes(1000)


def changed(disk: bytes, seed: int, count: int = 3) -> bytes:
    """Some chunks of it are others."""
    rng = random.Random(seed)
    out = bytearray(disk)
    for _ in range(count):
        at = rng.randrange(len(disk) // CHUNK) * CHUNK
        out[at : at + CHUNK] = rng.randbytes(CHUNK)
    return bytes(out)


def keys(store: Store, *prefixes: str) -> list[str]:
    return [stored.key for prefix in prefixes for stored in store.list(prefix)]


def drop(vault: Vault, record: PointRecord) -> None:
    vault.store.delete(point_key(record.group, record.id))


_masters: dict[bytes, bytes | None] = {}
"""By configuration: a passphrase takes a fifth of a second."""


def reopened(store: Store) -> Vault:
    """A fresh look at a repository."""
    data = store.get(CONFIG)
    if data not in _masters:
        _masters[data] = Vault.open(store, lambda: PASSPHRASE).sealing._master
    return Vault(store, RepositoryConfig.parse(data, CONFIG), _masters[data])


def copied(store: MemoryStore, time: Time) -> MemoryStore:
    """The same objects, put now."""
    other = MemoryStore(time)
    for stored in store.list(""):
        other.put_new(stored.key, store.get(stored.key))
    return other


class Kept:
    """Points, and what their disks must read as."""

    def __init__(self, build: Building) -> None:
        self.build = build
        self.disks: list[tuple[PointRecord, bytes]] = []

    def add(self, disk: bytes, group: str = "vm") -> PointRecord:
        record = self.build.point(group, {"disk": disk})
        self.disks.append((record, disk))
        return record

    def drop(self, index: int) -> None:
        record, _ = self.disks.pop(index)
        drop(self.build.vault, record)

    def check(self, store: Store) -> None:
        """Every point that is listed reads bit for bit, through a fresh look."""
        vault = reopened(store)
        listed = {record.id for record in vault.points()[0]}
        assert vault.points()[1] == []
        for record, disk in self.disks:
            if record.id in listed:
                assert read_back(vault, record) == disk


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store(time: Time) -> MemoryStore:
    return MemoryStore(time)


def history(store: Store, passphrase: str | None = None) -> Kept:
    """Three points that share much, and one that shares nothing."""
    kept = Kept(Building.fresh(store, passphrase=passphrase, pack_target=1 << 20))
    first = content(1)
    kept.add(first)
    kept.add(changed(first, 2))
    kept.add(changed(first, 3))
    kept.add(content(4), "other")
    return kept


def test_nothing_is_condemned_while_everything_is_referred_to(store: MemoryStore) -> None:
    kept = history(store)
    before = keys(store, PACKS, METAS)
    done = collect(reopened(store), grace_s=0, repack_below=0)
    assert (done.points, done.condemned_packs, done.deleted_packs) == (4, 0, 0)
    assert done.live_bytes == done.stored_bytes
    assert keys(store, PACKS, METAS) == before
    assert len(keys(store, INDEX)) == 1
    assert keys(store, LEASES, CONDEMNED) == []
    kept.check(store)


def test_a_dropped_point_is_condemned_then_after_the_grace_deleted(
    store: MemoryStore, time: Time
) -> None:
    kept = history(store)
    kept.drop(3)
    first = collect(reopened(store), repack_below=0)
    assert first.condemned_packs > 0
    assert first.deleted_packs == 0
    packs = keys(store, PACKS, METAS)
    time.now += DAY - 60
    early = collect(reopened(store), repack_below=0)
    assert (early.deleted_packs, early.waiting_packs) == (0, first.condemned_packs)
    assert early.waiting_for == "their time of grace"
    assert keys(store, PACKS, METAS) == packs
    time.now += 61
    late = collect(reopened(store), repack_below=0)
    assert (late.deleted_packs, late.freed_bytes) == (
        first.condemned_packs,
        first.condemned_bytes,
    )
    assert len(keys(store, PACKS, METAS)) == len(packs) - late.deleted_packs
    assert keys(store, CONDEMNED) == []
    kept.check(store)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_without_grace_one_run_does_it_all(store: MemoryStore, passphrase: str | None) -> None:
    kept = history(store, passphrase)
    kept.drop(3)
    kept.drop(0)
    before = sum(stored.size for stored in store.list(PACKS))
    done = collect(reopened(store), grace_s=0)
    assert done.deleted_packs == done.condemned_packs > 0
    assert sum(stored.size for stored in store.list(PACKS)) < before
    assert keys(store, CONDEMNED, LEASES) == []
    assert len(keys(store, INDEX)) == 1
    kept.check(store)
    again = collect(reopened(store), grace_s=0)
    assert (again.condemned_packs, again.deleted_packs, again.index_segments) == (0, 0, 0)


def test_packs_that_are_mostly_not_needed_are_repacked(store: MemoryStore) -> None:
    kept = Kept(Building.fresh(store, pack_target=1 << 20))
    first = content(1)
    kept.add(first)
    small = first[: 5 * CHUNK]
    kept.add(small)
    kept.drop(0)
    done = collect(reopened(store), grace_s=0)
    assert done.moved_packs > 0
    assert 0 < done.moved_bytes < done.freed_bytes
    kept.check(store)
    stored = sum(stored.size for stored in store.list(PACKS))
    assert stored < len(small) + (1 << 16)


def test_a_run_that_is_dry_changes_nothing(store: MemoryStore) -> None:
    kept = history(store)
    kept.drop(3)
    before = keys(store, "")
    done = collect(reopened(store), grace_s=0, dry_run=True)
    assert done.condemned_packs > 0
    assert keys(store, "") == before


@pytest.mark.parametrize("prefix", ["points/", METAS])
def test_damage_to_what_leads_on_forbids_every_deletion(store: MemoryStore, prefix: str) -> None:
    kept = history(store)
    kept.drop(3)
    for key in keys(store, prefix):
        data = bytearray(store.get(key))
        data[len(data) // 3] ^= 1
        store.put(key, data)
    before = keys(store, PACKS, METAS)
    with pytest.raises(CorruptImage, match=r"nothing is deleted"):
        collect(reopened(store), grace_s=0)
    assert keys(store, PACKS, METAS) == before
    assert keys(store, CONDEMNED, LEASES) == []


def test_a_writer_that_is_older_than_a_tombstone_is_waited_for(
    store: MemoryStore, time: Time
) -> None:
    kept = history(store)
    (record, disk) = kept.disks[3]
    time.now += 10
    writer = Lease(store, "writer")
    writer.take()
    time.now += 10
    kept.drop(3)
    done = collect(reopened(store), grace_s=0, repack_below=0)
    assert done.condemned_packs > 0
    assert done.deleted_packs == 0
    time.now += 2 * DAY
    writer.refresh()
    again = collect(reopened(store), repack_below=0)
    assert again.deleted_packs == 0
    assert again.waiting_for.startswith("a backup that runs on")
    # It may commit what leads into condemned packs: they are good again.
    kept.build.point("other", {"disk": disk}, id=record.id)
    kept.disks.append((record, disk))
    writer.release()
    last = collect(reopened(store), repack_below=0)
    assert last.deleted_packs == 0
    assert last.lifted_packs > 0
    assert keys(store, CONDEMNED) == []
    kept.check(store)


def test_what_a_writer_at_work_has_put_is_spared(store: MemoryStore, time: Time) -> None:
    kept = history(store)
    with Lease(store, "writer"):
        time.now += 10
        kept.build.disk("new", content(9))
        done = collect(reopened(store), grace_s=0, repack_below=0)
        assert (done.condemned_packs, done.deleted_packs) == (0, 0)
        assert done.spared_packs > 0
    assert collect(reopened(store), grace_s=0, repack_below=0).deleted_packs == done.spared_packs
    kept.check(store)


def test_a_writer_that_died_is_not_waited_for_for_ever(store: MemoryStore, time: Time) -> None:
    kept = history(store)
    kept.drop(3)
    time.now += 10
    writer = Lease(store, "writer")
    writer.take()
    writer._stop.set()
    assert collect(reopened(store), grace_s=0).deleted_packs == 0
    time.now += STALE_S + 60
    assert collect(reopened(store), grace_s=0).deleted_packs > 0
    assert keys(store, LEASES) == []
    kept.check(store)


def test_two_collectors_do_not_work_at_a_time(store: MemoryStore, time: Time) -> None:
    kept = history(store)
    kept.drop(3)
    refused = pytest.raises(RepositoryError, match="another collector is at work")
    with Lease(store, "collector"), refused:
        collect(reopened(store), grace_s=0)
    assert len(keys(store, LEASES)) == 0


def test_entries_of_lost_index_segments_are_found_in_their_packs(store: MemoryStore) -> None:
    kept = history(store)
    segments = keys(store, INDEX)
    data = bytearray(store.get(segments[0]))
    data[100] ^= 1
    store.put(segments[0], data)
    store.delete(segments[1])
    done = collect(reopened(store), grace_s=0)
    assert any(segments[0] in text for text in done.damage)
    (segment,) = keys(store, INDEX)
    assert segment not in segments
    index = reopened(store).index()
    assert index.packs() == {bytes.fromhex(key[-67:-3]) for key in keys(store, PACKS, METAS)}
    kept.check(store)


def test_a_damaged_pack_goes_once_all_of_it_is_stored_elsewhere(store: MemoryStore) -> None:
    kept = Kept(Building.fresh(store, pack_target=1 << 20))
    disk = content(1, 10)
    kept.add(disk)
    (key,) = keys(store, PACKS)
    data = bytearray(store.get(key))
    data[5000] ^= 1
    store.put(key, data)
    scrubbing = Scrubbing(store)
    scrubbing.damaged(bytes.fromhex(key[-67:-3]), key, "test")
    scrubbing.save()
    kept.build.places.clear()  # as a writer that uses no damaged pack
    kept.add(disk)
    done = collect(reopened(store), grace_s=0)
    assert done.deleted_packs >= 1
    assert key not in keys(store, PACKS)
    kept.check(store)


def test_a_tombstone_nobody_can_read_condemns_nothing_and_goes(
    store: MemoryStore, time: Time
) -> None:
    kept = history(store)
    store.put(f"{CONDEMNED}01ARZ3NDEKTSV4RRFFQ69G5FAV.json", b'{"packs": ["zz"]}')
    assert condemned_packs(store) == set()
    time.now += 2 * DAY
    assert collect(reopened(store)).deleted_packs == 0
    assert standing(store) == []
    kept.check(store)


def crash_everywhere(
    make: Callable[[Store], Kept], work: Callable[[Vault], Collected], time: Time
) -> int:
    """Crash after any call; what is listed stays readable, and the next run ends the work."""
    made = MemoryStore(time)
    kept = make(made)
    reopened(made)  # asks for the key, once
    whole = FaultyStore(copied(made, time))
    work(reopened(whole))
    end = sum(stored.size for stored in whole.inside.list(PACKS))
    count = 0
    for number, moment in crashes(whole.log):
        inside = copied(made, time)
        with pytest.raises(Crashed):
            work(reopened(FaultyStore(inside, crash=Crash(number, moment))))
        kept.check(inside)
        time.now += 2 * DAY
        work(reopened(inside))
        kept.check(inside)
        assert keys(inside, CONDEMNED, LEASES) == []
        assert len(keys(inside, INDEX)) == 1
        assert sum(stored.size for stored in inside.list(PACKS)) == end, (number, moment)
        assert len(keys(inside, METAS)) == len(keys(whole.inside, METAS))
        count += 1
    return count


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_crash_after_any_call_leaves_every_point_readable(
    time: Time, passphrase: str | None
) -> None:
    def make(store: Store) -> Kept:
        kept = Kept(Building.fresh(store, passphrase=passphrase, pack_target=1 << 20))
        first = content(1, 30)
        kept.add(first)
        kept.add(changed(first, 2))
        kept.add(first[: 6 * CHUNK])
        kept.add(content(4, 5), "other")
        kept.drop(3)
        kept.drop(0)
        return kept

    def work(vault: Vault) -> Collected:
        return collect(vault, grace_s=0, repack_below=60)

    assert crash_everywhere(make, work, time) > 10
