"""The repository for an event loop: listing, opening, leases, closing."""

import errno
import itertools
import threading

import msgspec
import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, PointMissing, RepositoryError
from nbdsrv.repository.native import lease as lease_module
from nbdsrv.repository.native.abreast import THREADS_AFAR
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.disk import CHANGED_SINCE
from nbdsrv.repository.native.layout import LEASES, POINTS, point_key
from nbdsrv.repository.native.lease import LeaseRecord
from nbdsrv.repository.native.listing import described
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.repository import UNREAD
from nbdsrv.repository.selector import select
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import MAX_OBJECT, Data, StoreError
from tests.disk.reading import content
from tests.repository.native.building import CHUNK, Building


def _leases(store: MemoryStore) -> list[LeaseRecord]:
    found = [store.get(stored.key) for stored in store.list(LEASES)]
    return [msgspec.json.decode(data, type=LeaseRecord) for data in found]


async def test_points_by_group_from_old_to_new(workers: Workers) -> None:
    build = Building.fresh()
    one = build.point("vm b", {"sda": b"1" * 5, "sdb": b"2"})
    two = build.point("a/@ä", {"sda": b"3"}, parent=one.id, lock_until=9e9)
    three = build.point("vm b", {"sda": b"4"})
    repository = NativeRepository(build.vault, workers)
    points = await repository.points()
    assert [(p.group, p.id) for p in points] == [
        ("a/@ä", two.id),
        ("vm b", one.id),
        ("vm b", three.id),
    ]
    assert points[0].parent == one.id
    assert points[0].flags == ("locked",)
    assert [(disk.name, disk.size) for disk in points[1].disks] == [("sda", 5), ("sdb", 1)]
    assert [p.id for p in await repository.points("vm b")] == [one.id, three.id]
    assert await repository.points("nobody") == []
    assert await repository.points("x" * 300) == []
    assert await repository.groups() == ["a/@ä", "vm b"]
    await repository.close()


async def test_a_point_is_read_once(workers: Workers) -> None:
    inside = MemoryStore()
    build = Building.fresh(inside)
    for n in range(40):
        build.point("vm", {"sda": b"%d" % n})
    build.point("other", {"sda": b""})
    store = FaultyStore(inside)
    build.vault.store = store
    repository = NativeRepository(build.vault, workers)
    assert len(await repository.points("vm")) == 40
    assert sum(call.method == "get" for call in store.log) == 40
    assert {call.key for call in store.log if call.method == "list"} == {f"{POINTS}vm/"}
    build.point("vm", {"sda": b"new"})
    before = store.calls
    assert len(await repository.points("vm")) == 41
    assert [call.method for call in store.log[before:]] == ["list", "get"]
    await repository.close()


async def test_a_point_that_was_pruned_and_copied_back_is_read_anew(workers: Workers) -> None:
    """Its map lies elsewhere now; a server that knew it before compared with what is gone."""
    clock = itertools.count(1_800_000_000)
    build = Building.fresh(MemoryStore(lambda: next(clock)))
    disks = [b"1" * CHUNK + b"1", b"1" * CHUNK + b"2"]
    first, second = (build.point("vm", {"sda": disk}) for disk in disks)
    repository = NativeRepository(build.vault, workers)
    assert len(await repository.points()) == 2
    build.vault.store.delete(point_key("vm", first.id))
    collect(Vault.open(build.vault.store, str), grace_s=0)
    again = Building(Vault.open(build.vault.store, str))
    again.point("vm", {"sda": disks[0]}, id=first.id)
    disk = await repository.open_disk(described(second), "sda")
    found = await disk.status(CHANGED_SINCE + first.id, 0, disk.size)
    assert [(e.length, e.flags) for e in found] == [(CHUNK, 0), (1, 1)]
    await disk.close()
    await repository.close()


async def test_points_of_a_distant_store_are_read_many_at_a_time(workers: Workers) -> None:
    """Each is a request; one behind the other, a year of them takes a second to open."""
    together = threading.Barrier(10, timeout=20)

    class Distant(MemoryStore):
        distant = True

        def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
            if key.startswith(POINTS):
                together.wait()
            return super().get(key, limit)

    build = Building.fresh()
    for n in range(40):
        build.point("vm", {"sda": b"%d" % n})
    distant = Distant()
    for stored in build.vault.store.list(""):
        distant.put(stored.key, build.vault.store.get(stored.key))
    build.vault.store = distant
    repository = NativeRepository(build.vault, workers)
    assert len(await repository.points("vm")) == 40
    await repository.close()


async def test_a_damaged_point_is_listed_as_such(workers: Workers) -> None:
    build = Building.fresh()
    record = build.point("vm", {"sda": b"data"})
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    key = point_key("vm", record.id)
    store.put(key, store.get(key)[:-3])
    repository = NativeRepository(build.vault, workers)
    (point,) = await repository.points()
    assert (point.id, point.group, point.disks, point.flags) == (record.id, "vm", (), ("damaged",))
    assert abs(point.created - record.created) < 0.01
    with pytest.raises(CorruptImage):
        await repository.open_disk(point, "sda")
    assert _leases(store) == []
    await repository.close()


def _failing(build: Building, number: int, *, distant: bool, times: int | None) -> FaultyStore:
    failure = Failure(calls("get", key=f"{POINTS}.*"), number, times)
    store = FaultyStore(build.vault.store, failures=[failure])
    store.distant = distant
    build.vault.store = store
    return store


@pytest.mark.parametrize(
    ("number", "distant"),
    [(errno.EIO, True), (errno.ETIMEDOUT, True), (errno.EACCES, True), (errno.EACCES, False)],
)
async def test_a_point_that_the_store_does_not_give_is_not_damaged_and_hides_no_other(
    workers: Workers, number: int, *, distant: bool
) -> None:
    build = Building.fresh()
    for n in range(3):
        build.point("vm", {"sda": b"%d" % n})
    _failing(build, number, distant=distant, times=1)
    repository = NativeRepository(build.vault, workers)
    points = await repository.points()
    assert sorted(point.flags for point in points) == [(), (), (UNREAD,)]
    points = await repository.points()
    assert [point.flags for point in points] == [(), (), ()]
    await repository.close()


async def test_the_latest_point_that_cannot_be_read_now_is_not_called_damaged_nor_missing(
    workers: Workers,
) -> None:
    build = Building.fresh()
    record = build.point("vm", {"sda": b"data"})
    _failing(build, errno.EIO, distant=True, times=None)
    repository = NativeRepository(build.vault, workers)
    for selector in ("vm/sda", "vm", "", f"vm/sda@{record.id}", f"@{record.id}"):
        with pytest.raises(DiskError, match="cannot be read now") as caught:
            await select(repository, selector)
        assert not isinstance(caught.value, RepositoryError)
        assert "damage" not in str(caught.value)
        assert "corrupt" not in str(caught.value)
        assert "'sda@" not in str(caught.value)
    with pytest.raises(StoreError):
        await repository.open_disk(described(record), "sda")
    await repository.close()


async def test_a_store_that_gives_no_point_is_not_asked_for_all(workers: Workers) -> None:
    """Each may take a minute until it fails."""
    build = Building.fresh()
    for n in range(100):
        build.point("vm", {"sda": b"%d" % n})
    store = _failing(build, errno.EIO, distant=True, times=None)
    repository = NativeRepository(build.vault, workers)
    with pytest.raises(DiskError, match="points/vm"):
        await repository.points()
    assert store.calls <= 1 + 2 * THREADS_AFAR
    await repository.close()


async def test_one_lease_names_what_is_open(workers: Workers) -> None:
    build = Building.fresh()
    first = build.point("vm", {"sda": b"1", "sdb": b"2"})
    second = build.point("vm", {"sda": b"3"})
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    repository = NativeRepository(build.vault, workers)
    disks = [await repository.open_disk(described(first), name) for name in ("sda", "sdb")]
    disks.append(await repository.open_disk(described(second), "sda"))
    (lease,) = _leases(store)
    assert lease.holder == "reader"
    assert lease.points == [f"vm/{first.id}", f"vm/{second.id}"]
    await disks.pop().close()
    (lease,) = _leases(store)
    assert lease.points == [f"vm/{first.id}"]
    await repository.close()
    for disk in disks:
        assert len(_leases(store)) == 1
        assert len(await content(disk, 0, 1)) == 1
        await disk.close()
    assert _leases(store) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
async def test_reading_needs_no_right_to_write(workers: Workers, number: int) -> None:
    build = Building.fresh()
    record = build.point("vm", {"sda": b"data"})
    failing = calls("put", "put_new", "delete")
    build.vault.store = FaultyStore(build.vault.store, failures=[Failure(failing, number)])
    repository = NativeRepository(build.vault, workers)
    for _ in range(2):
        disk = await repository.open_disk(described(record), "sda")
        assert await content(disk, 0, 4) == b"data"
        await disk.close()
    await repository.close()


async def test_a_lease_that_an_outage_prevented_is_taken_once_it_is_over(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or `prune` would delete what a server opened in that minute, and serves for weeks."""
    monkeypatch.setattr(lease_module, "REFRESH_S", 0.01)
    there = threading.Event()

    class Watched(FaultyStore):
        def put(self, key: str, data: Data) -> None:
            super().put(key, data)
            there.set()

    build = Building.fresh()
    record = build.point("vm", {"sda": b"data"})
    inside = build.vault.store
    assert isinstance(inside, MemoryStore)
    failure = Failure(calls("put", key=f"{LEASES}.*"), errno.ETIMEDOUT, times=3)
    build.vault.store = Watched(inside, failures=[failure])
    repository = NativeRepository(build.vault, workers)
    disk = await repository.open_disk(described(record), "sda")
    assert await workers.run(there.wait, 20)
    (lease,) = _leases(inside)
    assert (lease.holder, lease.points) == ("reader", [f"vm/{record.id}"])
    await disk.close()
    await repository.close()
    assert _leases(inside) == []


async def test_what_is_not_there(workers: Workers) -> None:
    build = Building.fresh()
    record = build.point("vm", {"sda": b"data"})
    repository = NativeRepository(build.vault, workers)
    with pytest.raises(PointMissing, match="no disk 'sdb'; it has sda") as missing:
        await repository.open_disk(described(record), "sdb")
    assert missing.value.errno == errno.ENOENT
    build.vault.store.delete(point_key("vm", record.id))
    with pytest.raises(PointMissing, match="has been pruned"):
        await repository.open_disk(described(record), "sda")
    await repository.close()
    with pytest.raises(RepositoryError, match="is closed"):
        await repository.open_disk(described(record), "sda")


async def test_the_vault_is_closed_behind_the_last_disk(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Building.fresh()
    record = build.point("vm", {"sda": b"data"})
    closed: list[bool] = []
    monkeypatch.setattr(build.vault.store, "close", lambda: closed.append(True))
    repository = NativeRepository(build.vault, workers)
    disk = await repository.open_disk(described(record), "sda")
    await repository.close()
    await repository.close()
    assert closed == []
    await disk.close()
    await disk.close()
    assert closed == [True]
