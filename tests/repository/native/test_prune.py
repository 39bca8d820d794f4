"""Pruning: points go by rules, oldest first; what is locked, read or damaged is spared."""

import time as clock

import pytest

from nbdsrv.repository.native.layout import LEASES, POINTS, point_key
from nbdsrv.repository.native.lease import STALE_S, Lease
from nbdsrv.repository.native.pins import PINS, put_pin
from nbdsrv.repository.native.prune import prune
from nbdsrv.repository.retention import Rules
from nbdsrv.store.faulty import Crash, Crashed, FaultyStore, calls, crashes
from nbdsrv.store.memory import MemoryStore
from tests.repository.native.building import Building
from tests.repository.native.test_collect import Kept, Time, content, copied, keys, reopened

DAY = 86400.0


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(Time())


def five(store: MemoryStore) -> Kept:
    """Points of five days, of each of two groups."""
    kept = Kept(Building.fresh(store))
    disk = content(1, 4)
    for group in ("one", "two"):
        for day in range(5):
            record = kept.build.point(group, {"disk": disk}, created=1_700_000_000.0 + day * DAY)
            kept.disks.append((record, disk))
    return kept


def left(store: MemoryStore) -> list[str]:
    return [key.removeprefix(POINTS) for key in keys(store, POINTS)]


def test_each_group_is_pruned_by_itself(store: MemoryStore) -> None:
    five(store)
    done = prune(reopened(store), None, Rules(last=2))
    assert {group: [fate.deleted for fate in fates] for group, fates in done.fates.items()} == {
        "one": [False, False, True, True, True],
        "two": [False, False, True, True, True],
    }
    assert len(left(store)) == 4
    assert keys(store, LEASES) == []


def test_one_group_alone(store: MemoryStore) -> None:
    five(store)
    prune(reopened(store), "one", Rules(last=1))
    assert [key[:3] for key in left(store)] == ["one"] + ["two"] * 5


def test_the_oldest_go_first(store: MemoryStore) -> None:
    five(store)
    faulty = FaultyStore(store)
    done = prune(reopened(faulty), None, Rules(last=1))
    gone = [call.key for call in faulty.log if calls("delete", key="points/.*")(call)]
    assert gone == [point_key(record.group, record.id) for record in done.deleted]
    created = [record.created for record in done.deleted]
    assert created == sorted(created)


def test_what_latest_names_stays_though_an_older_points_clock_was_ahead(store: MemoryStore) -> None:
    build, disk = Building.fresh(store), {"disk": content(1, 2)}
    ids = [build.point("vm", disk, created=day * DAY).id for day in (1, 9, 2)]
    assert [point.id for point in prune(reopened(store), None, Rules(last=1)).deleted] == ids[:2]
    assert left(store) == [f"vm/{max(ids)}.pt"]


def test_a_dry_run_deletes_nothing_and_writes_nothing(store: MemoryStore) -> None:
    five(store)
    faulty = FaultyStore(store)
    done = prune(reopened(faulty), None, Rules(last=1), dry_run=True)
    assert len(done.deleted) == 8
    assert not [call for call in faulty.log if calls("put", "put_new", "delete")(call)]


def test_what_is_locked_stays_whatever_is_forced(store: MemoryStore) -> None:
    build = Building.fresh(store)
    build.point("vm", {"disk": content(1, 2)}, lock_until=clock.time() + DAY, created=1.0)
    build.point("vm", {"disk": content(1, 2)}, lock_until=1.0, created=2.0)
    build.point("vm", {"disk": content(1, 2)}, created=3.0)
    done = prune(reopened(store), None, Rules(last=1), force=True)
    assert [fate.spared[:12] for fate in done.fates["vm"]] == ["", "", "locked until"]
    assert len(left(store)) == 2


def test_what_is_read_stays_unless_forced(store: MemoryStore) -> None:
    kept = five(store)
    record = kept.disks[0][0]
    with Lease(store, "reader", [f"{record.group}/{record.id}"]):
        done = prune(reopened(store), "one", Rules(last=1))
        assert [fate.spared[:17] for fate in done.fates["one"]] == [
            "",
            "",
            "",
            "",
            "it is being read ",
        ]
        prune(reopened(store), "one", Rules(last=1), force=True)
    assert len(left(store)) == 6


def test_who_begins_to_read_meanwhile_is_spared_too(store: MemoryStore) -> None:
    kept = five(store)
    second = kept.disks[1][0]
    lease = Lease(store, "reader", [f"{second.group}/{second.id}"])

    class Opening(FaultyStore):
        def delete(self, key: str) -> None:
            if not lease.record.opened and key.startswith(POINTS):
                lease.take()
            super().delete(key)

    done = prune(reopened(Opening(store)), "one", Rules(last=1))
    lease.release()
    assert [fate.deleted for fate in done.fates["one"]] == [False, True, True, False, True]
    assert len(left(store)) == 7


def test_pins_are_read_once_however_many_points_go(store: MemoryStore) -> None:
    kept = five(store)
    record = kept.disks[0][0]
    for number in range(3):
        put_pin(store, f"{number:032x}", f"{record.group}/{record.id}", "host", f"/{number}")
    seen = FaultyStore(store)
    done = prune(reopened(seen), "one", Rules(last=1))
    assert len(done.deleted) == 3
    assert sum(call.method == "get" and call.key.startswith(PINS) for call in seen.log) == 3


def test_who_pins_a_point_meanwhile_is_spared_too(store: MemoryStore) -> None:
    kept = five(store)
    second = kept.disks[1][0]

    class Pinning(FaultyStore):
        def delete(self, key: str) -> None:
            if key.startswith(POINTS):
                put_pin(store, "0" * 32, f"{second.group}/{second.id}", "host", "/overlay")
            super().delete(key)

    done = prune(reopened(Pinning(store)), "one", Rules(last=1))
    assert [fate.deleted for fate in done.fates["one"]] == [False, True, True, False, True]


def test_a_reader_that_died_spares_nothing_for_ever(store: MemoryStore) -> None:
    kept = five(store)
    record = kept.disks[0][0]
    lease = Lease(store, "reader", [f"{record.group}/{record.id}"])
    lease.take()
    lease._stop.set()
    store.clock.now += STALE_S + 1  # type: ignore[attr-defined]
    prune(reopened(store), "one", Rules(last=1))
    assert len(left(store)) == 6


def test_damaged_points_are_no_rule_s_business(store: MemoryStore) -> None:
    five(store)
    key = keys(store, POINTS)[0]
    store.put(key, store.get(key)[:-30])
    done = prune(reopened(store), "one", Rules(last=4))
    assert [(each.key, each.deleted) for each in done.damaged] == [(key, False)]
    assert done.deleted == []
    done = prune(reopened(store), "one", None, damaged=True)
    assert [each.deleted for each in done.damaged] == [True]
    assert key not in keys(store, POINTS)
    assert len(left(store)) == 9


def test_a_crash_after_any_call_leaves_what_was_to_stay(store: MemoryStore) -> None:
    kept = five(store)
    reopened(store)  # asks for the key, once
    whole = FaultyStore(copied(store, Time()))
    staying = {
        point_key(fate.point.group, fate.point.id)
        for fates in prune(reopened(whole), None, Rules(last=2)).fates.values()
        for fate in fates
        if not fate.deleted
    }
    count = 0
    for number, moment in crashes(whole.log):
        inside = copied(store, Time())
        with pytest.raises(Crashed):
            prune(reopened(FaultyStore(inside, crash=Crash(number, moment))), None, Rules(last=2))
        assert staying <= set(keys(inside, POINTS))
        kept.check(inside)
        prune(reopened(inside), None, Rules(last=2))
        assert set(keys(inside, POINTS)) == staying
        kept.check(inside)
        count += 1
    assert count > 6
