"""Copying points: the same content, the same names, and only what is missing travels."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.layout import new_ulid, point_key
from nbdsrv.repository.native.point import PointRecord, encode_point
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.sealing import CIPHER
from nbdsrv.repository.native.transfer import COPIED_FROM, Transfer, Transferred
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.repository import Point
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store, StoreError
from tests.repository.native.made import (
    CHUNK,
    PASSPHRASE,
    SLOTS,
    add_point,
    content,
    made,
    remembered,
    reopened,
)

PAGE = CHUNK * SLOTS
FIRST = content(1, 2, 0, 3, *([0] * 40), 4, tail=5000)
SECOND = content(1, 5, 0, 3, *([0] * 39), 6, 4, tail=5000)
SHRUNK = SECOND[: 3 * CHUNK + 100]


@asynccontextmanager
async def pair(
    one: Store, other: Store, workers: Workers
) -> AsyncIterator[tuple[NativeRepository, NativeRepository]]:
    source = NativeRepository(reopened(one), workers)
    target = NativeRepository(reopened(other), workers)
    try:
        yield source, target
    finally:
        await source.close()
        await target.close()


async def copied(
    one: Store, other: Store, workers: Workers, group: str = "vm", disk: str | None = None
) -> list[Transferred]:
    async with pair(one, other, workers) as (source, target):
        transfer = Transfer(source, target)
        return [await transfer.copy(point, disk) for point in await source.points(group)]


async def read(store: Store, record: PointRecord | Point, name: str, workers: Workers) -> bytes:
    """As a client reads it."""
    repository = NativeRepository(reopened(store), workers)
    try:
        (point,) = [each for each in await repository.points() if each.id == record.id]
        disk = await repository.open_disk(point, name)
        data = bytearray(disk.size)
        await disk.read_into(0, memoryview(data))
        await disk.close()
        return bytes(data)
    finally:
        await repository.close()


def history(vault: Vault) -> list[PointRecord]:
    """A point, its child, and one more that has shrunk."""
    first = add_point(
        vault,
        "vm",
        {"sda": FIRST, "sdb": content(9, 9)},
        labels={"why": "because"},
        host="there",
        consistency="crash",
        blobs={"vm.xml": "<domain/>"},
        lock_until=1_800_000_000.0,
    )
    second = add_point(vault, "vm", {"sda": SECOND}, parent=first.id, previous=first.id)
    third = add_point(vault, "vm", {"sda": SHRUNK}, parent=second.id, previous=second.id)
    return [first, second, third]


def make_encrypted(store: Store) -> Vault:
    return made(store, encrypted=True)


def make_other_chunks(store: Store) -> Vault:
    config = RepositoryConfig(cipher=CIPHER, hash="sha256", chunk_size=32 * CHUNK, page_slots=16)
    return remembered(Vault.create(store, config, lambda: PASSPHRASE))


def make_smaller_chunks(store: Store) -> Vault:
    return made(store, hash_="sha256")


TARGETS = {
    "alike": made,
    "encrypted": make_encrypted,
    "larger": make_other_chunks,
    "sha256": make_smaller_chunks,
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_copy_is_the_same_points(kind: str, encrypted: bool, workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    records = history(source := made(one, encrypted=encrypted))
    TARGETS[kind](other)
    done = await copied(one, other, workers)
    assert [record.id for record in records] == [each.id for each in done]
    assert [record.parent for record in records] == [each.parent for each in done]
    assert all(each.copied for each in done)
    copies, damaged = reopened(other).points()
    assert [] == damaged
    for record, copy in zip(records, copies, strict=True):
        same = ("id", "group", "created", "parent", "previous", "host", "consistency", "blobs")
        assert [getattr(record, n) for n in same] == [getattr(copy, n) for n in same]
        assert {**record.labels, COPIED_FROM: str(source.config.id)} == copy.labels
        assert record.lock_until == copy.lock_until
        for disk in record.disks:
            original = await read(one, record, disk.name, workers)
            assert original == await read(other, copy, disk.name, workers)
            if kind == "alike" and not encrypted:
                mine = copy.disk(disk.name)
                assert mine is not None
                assert disk.image_id == mine.image_id
    assert [] == [each.key for store in (one, other) for each in store.list("leases/")]


async def test_from_large_chunks_to_small_ones(workers: Workers) -> None:
    one, middle, other = MemoryStore(), MemoryStore(), MemoryStore()
    records = history(made(one))
    make_other_chunks(middle)
    made(other)
    await copied(one, middle, workers)
    done = await copied(middle, other, workers)
    assert [record.parent for record in records] == [each.parent for each in done]
    for record in records:
        assert await read(one, record, "sda", workers) == await read(other, record, "sda", workers)
    labels = reopened(other).points()[0][0].labels
    assert labels[COPIED_FROM] == str(reopened(one).config.id)


async def test_a_second_time_nothing_is_copied_or_read(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    history(made(one))
    made(other)
    await copied(one, other, workers)
    before = [stored.key for stored in other.list("")]
    reading, writing = FaultyStore(one), FaultyStore(other)
    done = await copied(reading, writing, workers)
    assert [(False, 0, 0)] * 3 == [(each.copied, each.read_bytes, each.new_bytes) for each in done]
    assert before == [stored.key for stored in other.list("")]
    assert [] == [call for call in writing.log if call.method not in {"get", "list"}]
    assert [] == [call for call in reading.log if call.key.startswith(("packs/", "metas/"))]


async def test_what_is_there_is_not_even_read(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    vault = made(one)
    first = add_point(vault, "vm", {"sda": FIRST})
    target = made(other)
    add_point(target, "somebody else", {"vda": FIRST})
    reading = FaultyStore(one)
    (done,) = await copied(reading, other, workers)
    assert (0, 4 * CHUNK + 5000) == (done.read_bytes, done.known_bytes)
    assert [] == [call for call in reading.log if call.key.startswith("packs/")]
    assert 1 == len(list(other.list("packs/")))
    assert FIRST == await read(other, first, "sda", workers)


@pytest.mark.parametrize("kind", TARGETS)
async def test_of_a_child_only_what_changed_is_read(kind: str, workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    vault = made(one)
    unit = TARGETS[kind](other).config.chunk_size
    first = add_point(vault, "vm", {"sda": FIRST})
    await copied(one, other, workers)
    add_point(vault, "vm", {"sda": SECOND}, parent=first.id)
    _, done = await copied(one, other, workers)
    # Two chunks of 64 KiB differ, in as many of the target's.
    assert 2 * CHUNK <= done.read_bytes <= 2 * unit
    assert first.id == done.parent


async def test_pages_that_did_not_change_are_not_read(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    vault = made(one)
    big = b"".join(bytes([n + 1]) * CHUNK for n in range(6 * SLOTS))
    first = add_point(vault, "vm", {"sda": big})
    make_encrypted(other)
    await copied(one, other, workers)
    changed = bytearray(big)
    changed[5 * PAGE + 7] ^= 1
    add_point(vault, "vm", {"sda": bytes(changed)}, parent=first.id)
    reading = FaultyStore(one)
    _, done = await copied(reading, other, workers)
    assert CHUNK == done.read_bytes
    read_there = [call for call in reading.log if call.key.startswith("packs/")]
    pages = [call for call in reading.log if call.key.startswith("metas/")]
    assert 1 == len(read_there)
    assert len(pages) <= 8  # roots, for the disk and for comparing, and the page in both
    assert bytes(changed) == await read(other, reopened(one).points()[0][1], "sda", workers)


async def test_a_child_without_its_parent(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    records = history(made(one))
    make_encrypted(other)
    async with pair(one, other, workers) as (source, target):
        points = await source.points("vm")
        done = await Transfer(source, target).copy(points[1])
        assert (True, None) == (done.copied, done.parent)
        # The parent comes later, and stands before it.
        await Transfer(source, target).copy(points[0])
        third = await Transfer(source, target).copy(points[2])
        assert records[1].id == third.parent
    copies, _ = reopened(other).points()
    assert [record.id for record in records] == [copy.id for copy in copies]
    assert [None, None, records[1].id] == [copy.parent for copy in copies]
    assert [None, None, records[1].id] == [copy.previous for copy in copies]
    for record, expected in zip(records, (FIRST, SECOND, SHRUNK), strict=True):
        assert expected == await read(other, record, "sda", workers)


async def test_a_parent_that_the_source_has_pruned(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    first, second, _ = history(made(one))
    make_encrypted(other)
    async with pair(one, other, workers) as (source, target):
        points = await source.points("vm")
        await Transfer(source, target).copy(points[0])
        one.delete(point_key("vm", first.id))
        done = await Transfer(source, target).copy(points[1])
        assert first.id == done.parent
    assert SECOND == await read(other, second, "sda", workers)


@pytest.mark.parametrize("kind", TARGETS)
async def test_nothing_leads_into_packs_that_are_condemned(kind: str, workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    vault = made(one)
    TARGETS[kind](other)
    first = add_point(vault, "vm", {"sda": FIRST})
    await copied(one, other, workers)
    doomed = [stored.key for prefix in ("packs/", "metas/") for stored in other.list(prefix)]
    names = [key[-67:-3] for key in doomed]
    tombstone = msgspec.json.encode({"v": 1, "packs": names, "metas": names})
    other.put(f"condemned/{new_ulid()}.json", tombstone)
    second = add_point(vault, "vm", {"sda": SECOND}, parent=first.id)
    await copied(one, other, workers)
    for key in doomed:
        other.delete(key)
    for stored in list(other.list("index/")):
        other.delete(stored.key)
    assert SECOND == await read(other, second, "sda", workers)


async def test_one_disk_of_several(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    vault = made(one)
    add_point(vault, "vm", {"sda": FIRST, "sdb": SECOND})
    made(other)
    await copied(one, other, workers, disk="sdb")
    (copy,) = reopened(other).points()[0]
    assert ["sdb"] == [disk.name for disk in copy.disks]
    other = MemoryStore()
    made(other)
    with pytest.raises(PointMissing, match="no disk 'sdc'"):
        await copied(one, other, workers, disk="sdc")


async def test_into_itself(workers: Workers) -> None:
    one = MemoryStore()
    made(one)
    async with pair(one, one, workers) as (source, target):
        with pytest.raises(RepositoryError, match="is the same repository"):
            Transfer(source, target)


def spoilt(store: MemoryStore, prefix: str) -> None:
    for stored in list(store.list(prefix)):
        data = bytearray(store.get(stored.key))
        for at in range(100, len(data) - 100, 50):
            data[at] ^= 1
        store.put(stored.key, data)


@pytest.mark.parametrize("prefix", ["packs/", "metas/"])
@pytest.mark.parametrize("make", [made, make_encrypted])
async def test_damage_is_never_copied(
    prefix: str, make: Callable[[Store], Vault], workers: Workers
) -> None:
    one, other = MemoryStore(), MemoryStore()
    history(made(one))
    make(other)
    spoilt(one, prefix)
    with pytest.raises(CorruptImage):
        await copied(one, other, workers)
    assert ([], []) == reopened(other).points()
    assert [] == [*one.list("leases/"), *other.list("leases/")]


async def test_a_map_that_is_not_what_its_point_says(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    vault = made(one)
    record = add_point(vault, "vm", {"sda": FIRST, "sdb": SECOND})
    sda, sdb = record.disks
    forged = msgspec.structs.replace(sda, image_id=sdb.image_id)
    lie = msgspec.structs.replace(record, disks=[forged])
    data = encode_point(lie, vault.repository, vault.sealing, vault.hashing)
    one.put(point_key("vm", record.id), data)
    made(other)
    with pytest.raises(CorruptImage, match="nothing is committed"):
        await copied(one, other, workers)
    assert ([], []) == reopened(other).points()


@pytest.mark.parametrize("number", [28, 5])
@pytest.mark.parametrize("where", ["packs/.*", "metas/.*", "index/.*", "points/.*"])
async def test_a_target_that_fails_shows_nothing_and_can_be_tried_again(
    where: str, number: int, workers: Workers
) -> None:
    one, other = MemoryStore(), MemoryStore()
    first = add_point(made(one), "vm", {"sda": FIRST})
    made(other)
    faulty = FaultyStore(other, failures=[Failure(calls("put_new", key=where), number)])
    with pytest.raises(StoreError):
        await copied(one, faulty, workers)
    assert ([], []) == reopened(other).points()
    assert [] == list(other.list("leases/"))
    (done,) = await copied(one, other, workers)
    assert done.copied
    assert FIRST == await read(other, first, "sda", workers)


async def test_cancelled_it_leaves_no_lease(workers: Workers) -> None:
    one, other = MemoryStore(), MemoryStore()
    history(made(one))
    made(other)
    slow = FaultyStore(one, delay_s=0.02)
    async with pair(slow, other, workers) as (source, target):
        (point, *_) = await source.points("vm")
        for delay in (0.01, 0.05, 0.1):
            task = asyncio.create_task(Transfer(source, target).copy(point))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [] == list(other.list("leases/"))
        assert [] == await target.points()


@pytest.mark.parametrize("seed", range(6))
async def test_histories(seed: int, workers: Workers) -> None:
    """Disks that change, shrink and grow, copied now and then."""
    source = random.Random(seed)
    one, other = MemoryStore(), MemoryStore()
    vault = made(one, encrypted=seed % 2 == 1)
    list(TARGETS.values())[seed % 4](other)
    disk = bytearray(source.randbytes(20 * CHUNK))
    before = None
    expected: dict[str, bytes] = {}
    for _ in range(6):
        for _ in range(source.randrange(4)):
            at = source.randrange(len(disk))
            end = min(len(disk), at + source.randrange(2 * CHUNK))
            disk[at:end] = source.choice([bytes(end - at), source.randbytes(end - at)])
        if source.random() < 0.3:
            del disk[source.randrange(CHUNK, len(disk)) :]
        if source.random() < 0.3:
            disk += bytes(source.randrange(40 * CHUNK)) + b"end"
        record = add_point(vault, "vm", {"sda": bytes(disk)}, parent=before)
        expected[record.id] = bytes(disk)
        before = record.id
        if source.random() < 0.6:
            await copied(one, other, workers)
    await copied(one, other, workers)
    copies, _ = reopened(other).points()
    assert list(expected) == [copy.id for copy in copies]
    for copy in copies:
        assert expected[copy.id] == await read(other, copy, "sda", workers)
