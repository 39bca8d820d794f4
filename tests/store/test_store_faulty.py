"""The double does what it is told, and nothing after a crash."""

import errno
import threading
import time

import pytest

from nbdsrv.store.faulty import (
    Call,
    Crash,
    Crashed,
    Failure,
    FaultyStore,
    Flip,
    Moment,
    calls,
    crashes,
)
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import ObjectMissing, Store, StoreError


def write(store: Store) -> None:
    """Five calls: an object, one that refers to it, and a lease that goes."""
    store.put("leases/a", b"mine")
    store.put_new("packs/a", b"content!")
    list(store.list("packs/"))
    store.put_new("points/a", b"packs/a")
    store.delete("leases/a")


def left(store: Store) -> dict[str, bytes]:
    return {row.key: store.get(row.key) for row in store.list("")}


def test_calls_are_counted_and_recorded() -> None:
    store = FaultyStore(MemoryStore())
    write(store)
    assert store.calls == 5
    assert store.log == [
        Call(0, "put", "leases/a"),
        Call(1, "put_new", "packs/a"),
        Call(2, "list", "packs/"),
        Call(3, "put_new", "points/a"),
        Call(4, "delete", "leases/a"),
    ]
    assert left(store.inside) == {"packs/a": b"content!", "points/a": b"packs/a"}


def test_every_crash_leaves_what_came_before_it() -> None:
    whole = FaultyStore(MemoryStore())
    write(whole)
    seen = []
    for number, moment in crashes(whole.log, torn=True):
        inside = MemoryStore()
        store = FaultyStore(inside, crash=Crash(number, moment))
        with pytest.raises(Crashed):
            write(store)
        assert store.crashed
        seen.append((number, moment.name, left(inside)))
    lease = {"leases/a": b"mine"}
    pack = {"packs/a": b"content!"}
    point = {"points/a": b"packs/a"}
    assert seen == [
        (0, "BEFORE", {}),
        (0, "TORN", {"leases/a": b"mi"}),
        (1, "BEFORE", lease),
        (1, "TORN", {**lease, "packs/a": b"cont"}),
        (3, "BEFORE", {**lease, **pack}),
        (3, "TORN", {**lease, **pack, "points/a": b"pac"}),
        (4, "BEFORE", {**lease, **pack, **point}),
        (4, "AFTER", {**pack, **point}),
    ]


def test_after_a_crash_nothing_reaches_the_store() -> None:
    inside = MemoryStore()
    inside.put_new("a", b"x")
    inside.put_new("b", b"x")
    store = FaultyStore(inside, crash=Crash(1, Moment.AFTER))
    listing = store.list("")
    assert next(listing).key == "a"
    with pytest.raises(Crashed):
        store.put("a", b"y")  # happens
    with pytest.raises(Crashed):
        next(listing)
    for act in (
        lambda: store.put("a", b"z"),
        lambda: store.put_new("c", b"z"),
        lambda: store.get("a"),
        lambda: store.get_range("a", 0, 1),
        lambda: store.get_ranges("a", [(0, 1)]),
        lambda: store.list(""),
        lambda: store.delete("a"),
    ):
        with pytest.raises(Crashed):
            act()
    assert store.calls == 2
    assert left(inside) == {"a": b"y", "b": b"x"}
    store.close()


def test_a_crash_behind_a_call_that_fails_is_a_crash() -> None:
    store = FaultyStore(MemoryStore(), crash=Crash(0, Moment.AFTER))
    with pytest.raises(Crashed):
        store.get("missing")
    failing = FaultyStore(
        MemoryStore(),
        crash=Crash(0, Moment.AFTER),
        failures=[Failure(calls(), errno.EIO)],
    )
    with pytest.raises(Crashed):
        failing.put("a", b"")


def test_no_handler_of_errors_survives_a_crash() -> None:
    store = FaultyStore(MemoryStore(), crash=Crash(0))

    def careful() -> None:
        try:
            store.put("a", b"")
        except Exception:  # noqa: BLE001
            pytest.fail("caught")

    with pytest.raises(Crashed):
        careful()


def test_chosen_calls_fail_chosen_times() -> None:
    store = FaultyStore(
        MemoryStore(),
        failures=[
            Failure(calls("put_new", key="packs/.*"), errno.ENOSPC, times=1),
            Failure(calls("get", numbers=range(3, 5)), errno.ETIMEDOUT),
        ],
    )
    with pytest.raises(StoreError, match="memory/packs/a: put_new: No space left") as caught:
        store.put_new("packs/a", b"x")  # 0
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ObjectMissing):
        store.get("packs/a")
    assert store.put_new("packs/a", b"x")
    for _ in range(2):
        with pytest.raises(StoreError, match="timed out"):
            store.get("packs/a")  # 3 and 4
    assert store.get("packs/a") == b"x"


def test_a_call_may_fail_and_have_happened() -> None:
    store = FaultyStore(
        MemoryStore(),
        failures=[Failure(calls("put_new"), errno.ETIMEDOUT, times=1, done=True)],
    )
    with pytest.raises(StoreError):
        store.put_new("a", b"x")
    assert not store.put_new("a", b"x")
    assert store.get("a") == b"x"


def test_a_wrong_bit() -> None:
    store = FaultyStore(MemoryStore(), flips=[Flip(calls("get"), bit=9)])
    store.put_new("a", b"\0\0\0")
    assert store.get("a") == b"\0\2\0"
    assert bytes(store.get_range("a", 0, 3)) == b"\0\0\0"
    assert left(store.inside) == {"a": b"\0\0\0"}
    elsewhere = FaultyStore(store.inside, flips=[Flip(calls(), bit=8 * 7)])
    assert bytes(elsewhere.get_range("a", 1, 2)) == b"\0\1"


def test_a_stale_listing_does_not_show_what_is_new() -> None:
    store = FaultyStore(MemoryStore(), stale=2)
    store.put_new("a", b"")
    store.put_new("a", b"")
    assert [row.key for row in store.list("")] == []
    assert store.get("a") == b""
    assert [row.key for row in store.list("")] == ["a"]


def test_a_listing_that_loses_something() -> None:
    store = FaultyStore(MemoryStore(), lost=lambda call, key: call.number == 2 and key == "b")
    store.put_new("a", b"")
    store.put_new("b", b"")
    assert [row.key for row in store.list("")] == ["a"]
    assert [row.key for row in store.list("")] == ["a", "b"]


def test_slow_calls_do_not_wait_for_each_other() -> None:
    store = FaultyStore(MemoryStore(), delay_s=2)
    threads = [threading.Thread(target=store.put, args=(str(n), b"")) for n in range(8)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2 <= time.monotonic() - begun < 2 * len(threads)
    assert [call.number for call in store.log] == list(range(8))


def test_memory_has_its_own_time() -> None:
    store = MemoryStore(lambda: 5.0)
    store.put_new("a", b"")
    store.clock = lambda: 7.5
    store.put("b", b"")
    assert [row.modified for row in store.list("")] == [5.0, 7.5]
