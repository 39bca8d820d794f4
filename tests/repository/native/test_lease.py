"""Leases: judged by the store's clock alone."""

import threading

import msgspec
import pytest

from nbdsrv.errors import RepositoryError
from nbdsrv.repository.native import lease as lease_module
from nbdsrv.repository.native.lease import (
    LAPSE_S,
    STALE_S,
    Lease,
    LeaseRecord,
    live_leases,
    store_time,
)
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import ObjectMissing, StoreError

START = 1_000_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


@pytest.fixture(autouse=True)
def _others() -> None:
    """What writers that other tests have killed left running is not ours."""
    _before.clear()
    _before.update(threading.enumerate())


_before: set[threading.Thread] = set()


def threads() -> int:
    running = set(threading.enumerate()) - _before
    return sum(thread.name == "nbdsrv-lease" for thread in running)


def test_a_lease_is_there_while_it_is_held(store: MemoryStore, clock: Clock) -> None:
    with Lease(store, "reader", ["vm/x"]) as lease:
        (found,) = live_leases(store, START)
        assert found == lease.record
        assert ("reader", ["vm/x"], START) == (found.holder, found.points, found.opened)
        lease.check()
        assert 1 == threads()
    assert [] == live_leases(store, START)
    assert [] == list(store.list(""))
    assert 0 == threads()
    lease.release()


def test_a_lease_that_was_refreshed_in_time_may_commit(store: MemoryStore, clock: Clock) -> None:
    with Lease(store, "writer") as lease:
        for _ in range(30):
            clock.now += LAPSE_S
            lease.refresh()
        lease.check()
        assert START == lease.record.opened
        assert clock.now == store_time(store, f"leases/{lease.name}.json")


def test_one_that_was_not_may_not_even_if_it_is_refreshed_now(
    store: MemoryStore, clock: Clock
) -> None:
    with Lease(store, "writer") as lease:
        clock.now += LAPSE_S + 1  # this host slept, and its own clock with it
        lease.refresh()
        with pytest.raises(RepositoryError, match="nothing is committed"):
            lease.check()
    with Lease(store, "writer") as lease:
        clock.now += LAPSE_S + 1
        with pytest.raises(RepositoryError, match="60 minutes"):
            lease.check()


def test_a_collector_whose_lease_has_lapsed_is_not_told_of_a_backup(
    store: MemoryStore, clock: Clock
) -> None:
    with Lease(store, "collector") as lease:
        clock.now += LAPSE_S + 1
        with pytest.raises(RepositoryError, match=r"this gc .* run it again"):
            lease.check()


def test_a_thread_refreshes_it(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "REFRESH_S", 0.001)
    refreshed = threading.Event()
    put = store.put
    faults = [StoreError("the store is away", 5)] * 2

    def counted(key: str, data: bytes) -> None:
        if threading.current_thread().name == "nbdsrv-lease":
            if faults:
                raise faults.pop()
            refreshed.set()
        put(key, data)

    monkeypatch.setattr(store, "put", counted)
    with Lease(store, "writer") as lease:
        assert refreshed.wait(10)
        lease.check()
    assert [] == list(store.list("leases/"))


def test_a_lease_that_cannot_be_taken_leaves_nothing_behind(store: MemoryStore) -> None:
    for failing in (calls("put", numbers={0}), calls("list"), calls("put", numbers={2})):
        faulty = FaultyStore(store, failures=[Failure(failing, 28)])
        with pytest.raises(StoreError), Lease(faulty, "writer"):
            pass
        assert [] == list(store.list(""))
        assert 0 == threads()


def test_a_store_that_does_not_answer_lets_nobody_commit(store: MemoryStore) -> None:
    faulty = FaultyStore(store)
    with Lease(faulty, "writer") as lease:
        store.put = None  # type: ignore[assignment, method-assign]
        with pytest.raises((StoreError, TypeError)):
            lease.check()


def test_leases_live_for_a_day_after_the_last_refresh(store: MemoryStore, clock: Clock) -> None:
    store.put("leases/a.json", msgspec.json.encode(LeaseRecord(holder="writer", opened=START)))
    assert 1 == len(live_leases(store, START + STALE_S))
    assert 0 == len(live_leases(store, START + STALE_S + 1))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"holder":7}', b'{"x":' + b"[" * 100_000, b" " * (2 << 20)]
)
def test_a_lease_that_cannot_be_read_holds_everything_up(store: MemoryStore, data: bytes) -> None:
    store.put("leases/a.json", data)
    assert [LeaseRecord(holder="writer")] == live_leases(store, START)


def test_the_time_of_an_object_that_is_not_listed(store: MemoryStore) -> None:
    with pytest.raises(ObjectMissing):
        store_time(store, "leases/none.json")
