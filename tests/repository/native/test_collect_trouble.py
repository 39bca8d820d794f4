"""The collector where the store fails, lags or is far away."""

import errno
from contextlib import suppress

import pytest

from nbdsrv.errors import DiskError
from nbdsrv.repository.native.boot_trace import TRACES, put_trace
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.layout import CONDEMNED, INDEX, LEASES, METAS, PACKS, POINTS
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import StoreError
from tests.repository.native.test_collect import Kept, Time, copied, history, keys, reopened


@pytest.fixture
def made() -> tuple[MemoryStore, Kept]:
    store = MemoryStore(Time())
    kept = history(store)
    kept.drop(3)
    kept.drop(0)
    reopened(store)
    return store, kept


@pytest.mark.parametrize("done", [False, True], ids=["refused", "unknown"])
@pytest.mark.parametrize("distant", [False, True])
def test_a_call_that_fails_loses_nothing(
    made: tuple[MemoryStore, Kept], *, done: bool, distant: bool
) -> None:
    store, kept = made
    whole = FaultyStore(copied(store, Time()))
    collect(reopened(whole), grace_s=0)
    for number in range(0, whole.calls, 3):
        inside = copied(store, Time())
        failing = FaultyStore(
            inside, failures=[Failure(calls(numbers=[number]), errno.ETIMEDOUT, done=done)]
        )
        failing.distant = distant
        with suppress(StoreError):
            collect(reopened(failing), grace_s=0)
        kept.check(inside)
        inside.clock.now += 3 * 86400  # type: ignore[attr-defined]
        collect(reopened(inside), grace_s=0)
        kept.check(inside)
        assert keys(inside, CONDEMNED, LEASES) == []
        assert len(keys(inside, INDEX)) == 1


@pytest.mark.parametrize("prefix", [POINTS, METAS])
def test_a_service_that_fails_is_not_called_damage(
    made: tuple[MemoryStore, Kept], prefix: str
) -> None:
    store, _ = made
    before = keys(store, PACKS, METAS, POINTS)
    reads = calls("get", "get_range", key=f"{prefix}.*")
    failing = FaultyStore(store, failures=[Failure(reads, errno.EIO)])
    failing.distant = True
    with pytest.raises(StoreError) as raised:
        collect(reopened(failing), grace_s=0)
    assert "corrupt" not in str(raised.value)
    assert "prune --damaged" not in str(raised.value)
    assert keys(store, PACKS, METAS, POINTS) == before


def test_a_full_disk_stops_it_before_anything_is_deleted(
    made: tuple[MemoryStore, Kept],
) -> None:
    store, kept = made
    before = keys(store, PACKS, METAS, INDEX)
    failing = FaultyStore(store, failures=[Failure(calls("put_new"), errno.ENOSPC)])
    with pytest.raises(StoreError):
        collect(reopened(failing), grace_s=0)
    assert keys(store, PACKS, METAS, INDEX) == before
    kept.check(store)


def test_a_store_that_may_only_be_read_says_so(made: tuple[MemoryStore, Kept]) -> None:
    store, _ = made
    failing = FaultyStore(store, failures=[Failure(calls("put", "put_new"), errno.EROFS)])
    with pytest.raises(DiskError, match="Read-only"):
        collect(reopened(failing), grace_s=0)
    assert collect(reopened(failing), grace_s=0, dry_run=True).condemned_packs > 0


def test_packs_a_listing_does_not_show_are_not_deleted(made: tuple[MemoryStore, Kept]) -> None:
    store, kept = made
    hidden = set(keys(store, PACKS)[:2])
    lagging = FaultyStore(store, lost=lambda _, key: key in hidden)
    collect(reopened(lagging), grace_s=0)
    assert hidden <= set(keys(store, PACKS))
    kept.check(store)


def test_an_index_in_a_bad_sector_is_made_anew(made: tuple[MemoryStore, Kept]) -> None:
    store, kept = made
    key = keys(store, INDEX)[0]
    failing = FaultyStore(store, failures=[Failure(calls("get", key=key), errno.EIO)])
    done = collect(reopened(failing), grace_s=0)
    assert any(key in text for text in done.damage)
    assert key not in keys(store, INDEX)
    kept.check(store)


@pytest.mark.parametrize(
    ("number", "distant", "goes"),
    [
        (errno.EIO, False, True),
        (errno.EFBIG, False, True),
        (errno.EIO, True, False),
        (errno.EACCES, False, False),
    ],
)
def test_a_boot_trace_that_cannot_be_read_holds_up_nothing(
    made: tuple[MemoryStore, Kept], number: int, *, distant: bool, goes: bool
) -> None:
    """It is help for readers; in a bad sector it kept the collector from ever condemning again."""
    store, kept = made
    put_trace(reopened(store), "vm", "sda", b"{}")
    (key,) = keys(store, TRACES)
    failing = FaultyStore(store, failures=[Failure(calls("get", key=key), number)])
    failing.distant = distant
    assert collect(reopened(failing), grace_s=0).deleted_packs
    assert keys(store, TRACES) == ([] if goes else [key])
    kept.check(store)
