"""A disk of a restore point: the contract, what its facts say, and what damage does."""

import errno
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.runs import BlockRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.disk import CHANGED_SINCE, SMALL_MAP, PointDisk
from nbdsrv.repository.native.entry import ENTRY_SIZE
from nbdsrv.repository.native.frames import FRAME
from nbdsrv.repository.native.layout import CONFIG, INDEX, PACKS, meta_key, pack_key, point_key
from nbdsrv.repository.native.pages import Pages
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import StoreError
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from tests.disk.check_disk import CONTRACT, Check, check_disk, extent_map
from tests.disk.reading import content, some_ranges
from tests.disk.threads import running_workers
from tests.repository.native.building import CHUNK, PAGE_SLOTS, Building, open_disk
from tests.repository.native.contents import changed, striped

SPAN = CHUNK * PAGE_SLOTS


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
async def test_contract(workers: Workers, check: Check) -> None:
    golden = striped(5 * SPAN + 3 * CHUNK + 1234, 1)
    build = Building.fresh()
    build.point("vm", {"sda": changed(golden, 3)})
    record = build.point("vm", {"sda": golden, "sdb": b"other"})
    await check(lambda: open_disk(build, workers, record, "sda"), golden)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, SPAN, SPAN + 1, 3 * SPAN - 1])
async def test_sizes(workers: Workers, size: int) -> None:
    golden = striped(size, size)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    await check_disk(lambda: open_disk(build, workers, record, "sda"), golden)


async def test_encrypted_in_a_directory(workers: Workers, tmp_path: os.PathLike[str]) -> None:
    golden = striped(2 * SPAN + 100, 5)
    build = Building.fresh(DirectoryStore(str(tmp_path)), passphrase="open sesame", hash="sha256")
    record = build.point("vm", {"sda": golden})
    build.vault = Vault.open(DirectoryStore(str(tmp_path)), lambda: "open sesame")
    await check_disk(
        lambda: open_disk(build, workers, record, "sda"), golden, extents_granularity=CHUNK
    )


async def test_zero_chunks_are_holes(workers: Workers) -> None:
    golden = bytes(SPAN) + b"x" * CHUNK + bytes(SPAN) + b"y"
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    disk = await open_disk(build, workers, record, "sda")
    try:
        allocation = await disk.status(ALLOCATION, 0, disk.size)
        depth = await disk.status(ALLOCATION_DEPTH, 0, disk.size)
        assert [(e.length, e.flags) for e in allocation] == [
            (SPAN, 3),
            (CHUNK, 0),
            (SPAN, 3),
            (1, 0),
        ]
        assert [e.flags for e in depth] == [0, 1, 0, 1]
    finally:
        await disk.close()


async def test_facts(workers: Workers) -> None:
    build = Building.fresh()
    record = build.point("vm 1", {"sda": b"data"}, consistency="filesystem")
    disk = await open_disk(build, workers, record, "sda")
    try:
        facts = disk.facts
        assert facts["group"] == "vm 1"
        assert facts["point"] == record.id
        assert facts["consistency"] == "filesystem"
        assert facts["image_id"] == record.disks[0].image_id
        assert disk.name == f"memory#vm 1/sda@{record.id}"
    finally:
        await disk.close()


# --- what has changed since another point ---------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_changed_since_is_what_differs(data: st.DataObject) -> None:
    sizes = st.integers(0, 6 * SPAN)
    mine, other = data.draw(_pictures), data.draw(_pictures)
    if data.draw(st.booleans()):  # an increment: most of it as it was
        other = mine[: data.draw(st.integers(0, len(mine)))] + other
    cut = data.draw(sizes), data.draw(sizes)
    contents = [_drawn(picture)[:size] for picture, size in zip((mine, other), cut, strict=True)]
    async with running_workers() as workers:
        build = Building.fresh()
        points = [build.point("vm", {"sda": content}) for content in contents]
        for n, record in enumerate(points):
            disk = await open_disk(build, workers, record, "sda")
            try:
                context = CHANGED_SINCE + points[1 - n].id
                assert context in disk.contexts
                found = await extent_map(disk, context)
                assert found == _expected(contents[n], contents[1 - n])
                for offset, length in some_ranges(disk.size, 30):
                    if length:
                        part = await disk.status(context, offset, length)
                        flags = b"".join(bytes([e.flags]) * e.length for e in part)
                        assert flags == found[offset : part.end]
            finally:
                await disk.close()


_pictures = st.lists(st.sampled_from("00abc"), max_size=80).map("".join)


def _drawn(picture: str) -> bytes:
    """A chunk for each letter; 0 is zeroes."""
    return b"".join(bytes(CHUNK) if x == "0" else x.encode() * CHUNK for x in picture)


def _expected(mine: bytes, other: bytes) -> bytes:
    flags = bytearray()
    for at in range(0, len(mine), CHUNK):
        ours, theirs = mine[at : at + CHUNK], other[at : at + CHUNK]
        common = min(len(ours), len(theirs))
        # By chunk: one that is shorter in one of them is another chunk, unless it is zeroes.
        same = ours == theirs or not (any(ours) or any(theirs))
        flags += bytes([not same]) * common + b"\1" * (len(ours) - common)
    return bytes(flags)


async def test_unchanged_pages_are_not_read(workers: Workers) -> None:
    golden = bytearray(random.Random(1).randbytes(8 * SPAN))
    build = Building.fresh()
    first = build.point("vm", {"sda": bytes(golden)})
    golden[3 * SPAN] ^= 1
    second = build.point("vm", {"sda": bytes(golden)})
    disk = await open_disk(build, workers, second, "sda")
    faulty = FaultyStore(build.vault.store)
    build.vault.entries._store = faulty
    try:
        found = await disk.status(CHANGED_SINCE + first.id, 0, disk.size)
        assert [(e.length, e.flags) for e in found] == [
            (3 * SPAN, 0),
            (CHUNK, 1),
            (5 * SPAN - CHUNK, 0),
        ]
        assert faulty.calls == 2  # the other's root, and one page of it; ours are in memory
    finally:
        await disk.close()


async def test_since_a_point_that_has_been_pruned_everything_has_changed(workers: Workers) -> None:
    """A server has its disks open for weeks; what else is asked along with it is answered."""
    build = Building.fresh()
    first = build.point("vm", {"sda": random.Random(1).randbytes(SPAN)})
    second = build.point("vm", {"sda": random.Random(2).randbytes(SPAN)})
    disk = await open_disk(build, workers, second, "sda")
    store = build.vault.store
    try:
        store.delete(point_key("vm", first.id))
        collect(Vault.open(store, str), grace_s=0)
        found = await disk.status(CHANGED_SINCE + first.id, 0, disk.size)
        assert [(e.length, e.flags) for e in found] == [(disk.size, 1)]
    finally:
        await disk.close()


async def test_since_a_point_that_the_store_does_not_give_nobody_knows_what_has_changed(
    workers: Workers,
) -> None:
    build = Building.fresh()
    first = build.point("vm", {"sda": random.Random(1).randbytes(SPAN)})
    second = build.point("vm", {"sda": random.Random(2).randbytes(SPAN)})
    disk = await open_disk(build, workers, second, "sda")
    failing = FaultyStore(build.vault.store, failures=[Failure(calls("get_range"), 110, 1)])
    build.vault.entries._store = failing
    try:
        with pytest.raises(StoreError):
            await disk.status(CHANGED_SINCE + first.id, 0, disk.size)
        found = await disk.status(CHANGED_SINCE + first.id, 0, disk.size)
        assert {e.flags for e in found} == {1}
    finally:
        await disk.close()


@pytest.mark.parametrize("pages", [8, SMALL_MAP, SMALL_MAP + 1])
async def test_a_small_map_is_read_when_the_disk_is_opened(workers: Workers, pages: int) -> None:
    build = Building.fresh()
    # A data chunk in each page, and a page of zeroes that does not count.
    content = b"".join(bytes([1 + n % 255]) * 512 + bytes(SPAN - 512) for n in range(pages))
    record = build.point("vm", {"sda": content + bytes(SPAN) + b"end"})
    disk = await open_disk(build, workers, record, "sda")
    try:
        there = [disk.pages.peek(n) is not None for n in range(pages + 1)]
        assert there == [pages + 1 <= SMALL_MAP] * pages + [True]
    finally:
        await disk.close()


async def test_a_read_of_several_frames_takes_these_alone(workers: Workers) -> None:
    build = Building.fresh(chunk=4 * CHUNK)
    golden = random.Random(5).randbytes(8 * CHUNK)
    record = build.point("vm", {"sda": golden})
    disk = await open_disk(build, workers, record, "sda")
    try:
        at, length = 3 * FRAME - 100, FRAME + 200
        runs = disk.locate(at, length)
        assert runs is not None
        assert [100, FRAME, 100] == [run.length for run in runs]
        assert golden[at : at + length] == await content(disk, at, length)
        (whole,) = disk.locate(10, 3 * CHUNK) or ()
        assert isinstance(whole, BlockRun)
        assert (0, 10) == (whole.key, whole.skip)
        across = disk.locate(4 * CHUNK - 10, 20)
        assert across is not None
        assert [10, 10] == [run.length for run in across]
    finally:
        await disk.close()


async def test_contexts_name_the_points_that_have_the_disk(workers: Workers) -> None:
    build = Building.fresh()
    build.point("other", {"sda": b"x"})
    old = build.point("vm", {"sda": b"x"})
    build.point("vm", {"sdb": b"x"})
    middle = build.point("vm", {"sda": b"y", "sdb": b"x"})
    new = build.point("vm", {"sda": b"z"})
    disk = await open_disk(build, workers, middle, "sda")
    try:
        assert disk.contexts[2:] == (CHANGED_SINCE + new.id, CHANGED_SINCE + old.id)
        with pytest.raises(DiskError) as refused:
            await disk.status(CHANGED_SINCE + middle.id, 0, 1)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(DiskError):
            await disk.status(old.id, 0, 1)  # the prefix is part of the name
    finally:
        await disk.close()


# --- damage --------------------------------------------------------------------------------------


def _flip(store: MemoryStore, key: str, at: int) -> None:
    data, modified = store._objects[key]
    wrong = bytearray(data)
    wrong[at] ^= 1 << at % 8
    store._objects[key] = bytes(wrong), modified


async def _bad_bytes(disk: PointDisk, golden: bytes) -> set[int]:
    """Numbers of the chunks that cannot be read; all others must be exact."""
    bad = set()
    for at in range(0, disk.size, CHUNK):
        end = min(at + CHUNK, disk.size)
        try:
            assert await content(disk, at, end - at) == golden[at:end]
        except DiskError as error:
            if (error.errno, error.offset) != (errno.EIO, at):
                raise
            bad.add(at // CHUNK)
    return bad


@pytest.mark.parametrize("passphrase", [None, "open sesame"])
async def test_a_damaged_chunk_spoils_itself_only(workers: Workers, passphrase: str | None) -> None:
    golden = striped(2 * SPAN + 77, 9)
    build = Building.fresh(passphrase=passphrase)
    record = build.point("vm", {"sda": golden})
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    pristine = dict(store._objects)
    chance = random.Random(3)
    for _ in range(40):
        store._objects = dict(pristine)
        keys = [key for key in pristine if key.startswith(PACKS)]
        key = chance.choice(keys)
        at = chance.randrange(len(pristine[key][0]))
        _flip(store, key, at)
        disk = await open_disk(build, workers, record, "sda")
        try:
            bad = await _bad_bytes(disk, golden)
            hit = {
                number
                for number in range(-(-len(golden) // CHUNK))
                for place in [build.places.get(_id(build, golden, number))]
                if place
                and pack_key(place.pack) == key
                and place.offset <= at < place.offset + ENTRY_SIZE + place.length
            }
            assert bad <= hit, f"byte {at} of {key}"
            if bad:
                first = min(bad) * CHUNK
                with pytest.raises(DiskError) as failed:
                    await content(disk, 0, disk.size)
                assert failed.value.offset == first
        finally:
            await disk.close()


def _id(build: Building, golden: bytes, number: int) -> bytes:
    return build.vault.hashing.id_of(golden[number * CHUNK : (number + 1) * CHUNK])


async def test_a_damaged_page_spoils_its_own_range_only(workers: Workers) -> None:
    golden = random.Random(4).randbytes(4 * SPAN + 10)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    root = build.vault.root(record.disks[0].root)
    place = root.pages.place(1)
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    _flip(store, meta_key(place.pack), place.offset + ENTRY_SIZE + 5)
    disk = await open_disk(build, workers, record, "sda")
    try:
        assert await _bad_bytes(disk, golden) == set(range(PAGE_SLOTS, 2 * PAGE_SLOTS))
        with pytest.raises(CorruptImage) as failed:
            await content(disk, SPAN - 10, SPAN)
        assert failed.value.offset == SPAN
        assert await extent_map(disk) == bytes(disk.size)  # what is lost is data, never a hole
        _flip(store, meta_key(place.pack), place.offset + ENTRY_SIZE + 5)
        assert await content(disk, 0, disk.size) == golden  # mended: no need to open it again
    finally:
        await disk.close()


async def test_every_byte_of_the_metadata_may_be_wrong(workers: Workers) -> None:
    golden = striped(SPAN + 3 * CHUNK, 11)
    build = Building.fresh()
    build.point("vm", {"sda": changed(golden, 2)})
    record = build.point("vm", {"sda": golden})
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    pristine = dict(store._objects)
    refused = 0
    for key in pristine:
        if key.startswith((PACKS, INDEX)) or key == CONFIG:
            continue
        for at in range(0, len(pristine[key][0]), 7):
            store._objects = dict(pristine)
            _flip(store, key, at)
            try:
                disk = await open_disk(build, workers, record, "sda")
            except CorruptImage:
                refused += 1
                continue
            try:
                await _bad_bytes(disk, golden)
            finally:
                await disk.close()
    assert refused


async def test_a_missing_pack_is_found_elsewhere(workers: Workers) -> None:
    golden = striped(SPAN, 12)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    packs = [key for key in store._objects if key.startswith(PACKS)]
    build.places.clear()  # everything is stored once more, in packs of other names
    build.point("copy", {"sda": golden})
    build.vault = Vault.open(store, lambda: "")
    for key in packs:
        store.delete(key)
    disk = await open_disk(build, workers, record, "sda")
    try:
        assert await content(disk, 0, disk.size) == golden
    finally:
        await disk.close()


async def test_a_failing_store_is_no_damage(workers: Workers) -> None:
    golden = striped(SPAN, 13)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    disk = await open_disk(build, workers, record, "sda")
    failure = Failure(calls("get_range"), errno.ETIMEDOUT, times=2)
    build.vault.entries._store = FaultyStore(build.vault.store, failures=[failure])
    try:
        with pytest.raises(DiskError) as failed:
            await content(disk, 0, disk.size)
        assert failed.value.errno == errno.ETIMEDOUT
        assert await content(disk, 0, disk.size) == golden
    finally:
        await disk.close()


async def test_cache_decodes_ahead(workers: Workers) -> None:
    golden = random.Random(6).randbytes(6 * CHUNK)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    disk = await open_disk(build, workers, record, "sda")
    try:
        await disk.cache(0, disk.size)
        build.vault.entries._store = MemoryStore()
        assert await content(disk, 0, disk.size) == golden
    finally:
        await disk.close()


async def test_pages_are_kept_within_their_bound(workers: Workers) -> None:
    golden = random.Random(7).randbytes(40 * SPAN)
    build = Building.fresh(chunk=CHUNK, page_slots=PAGE_SLOTS)
    record = build.point("vm", {"sda": golden})
    disk = await open_disk(build, workers, record, "sda")
    disk.pages = Pages(build.vault, disk.pages.root, limit=10_000)
    try:
        for offset, length in some_ranges(disk.size, 60):
            if length <= SPAN:
                assert await content(disk, offset, length) == golden[offset : offset + length]
        assert disk.pages._size <= 10_000
        assert len(disk.pages._held) == len(disk.pages._clock) > 1
    finally:
        await disk.close()
