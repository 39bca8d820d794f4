"""The writer of points: what is told comes back, once stored is enough, and nothing dangles."""

import asyncio
import errno
import random
import re
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.native.layout import meta_key, pack_key, pack_of
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.scrub import Scrubbing
from nbdsrv.repository.native.sealing import Codec
from nbdsrv.repository.native.tombstones import condemn
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.writer import NativePointWriter, begin
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from tests.disk.threads import running_workers
from tests.repository.native.read_back import KIB, MIB, fresh_vault, listed, noise, read_back

CHUNK = 64 * KIB
CHANGING = ("put_new", "put", "delete")


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    async with running_workers() as running:
        yield running


async def told(
    vault: Vault,
    workers: Workers,
    size: int,
    parts: Sequence[tuple[int, bytes | int]],
    parent: PointRecord | None = None,
) -> PointRecord:
    """A point whose disk is told ``parts``: (offset, bytes or a length of zeroes)."""
    writer = await begin(vault, workers, "vm", parent)
    try:
        disk = await writer.disk("disk", size)
        for offset, part in parts:
            if isinstance(part, int):
                await disk.zero(offset, part)
            else:
                await disk.data(offset, bytearray(part), len(part))
        return await writer.commit_record()
    finally:
        await writer.abort()


async def test_what_was_told_comes_back_and_the_rest_is_zeroes(workers: Workers) -> None:
    vault = fresh_vault()
    head, tail = noise(3 * MIB), noise(CHUNK // 2)
    size = 20 * MIB + CHUNK // 2
    record = await told(vault, workers, size, [(MIB, head), (20 * MIB, tail)])
    content = read_back(vault, record)
    assert content == bytes(MIB) + head + bytes(16 * MIB) + tail
    disk = record.disks[0]
    assert (disk.zero_bytes, disk.unchanged_bytes) == (17 * MIB, 0)
    assert 3 * MIB < disk.new_bytes < 3 * MIB + CHUNK
    assert list(vault.store.list("leases/")) == []


async def test_what_is_not_told_is_as_in_the_parent(workers: Workers) -> None:
    vault = fresh_vault()
    before = noise(8 * MIB)
    parent = await told(vault, workers, 8 * MIB, [(0, before)])
    new = noise(CHUNK)
    record = await told(vault, workers, 8 * MIB, [(MIB, new), (4 * MIB, 2 * CHUNK)], parent)
    wanted = bytearray(before)
    wanted[MIB : MIB + CHUNK] = new
    wanted[4 * MIB : 4 * MIB + 2 * CHUNK] = bytes(2 * CHUNK)
    assert read_back(vault, record) == wanted
    assert read_back(vault, parent) == before
    disk = record.disks[0]
    assert (disk.zero_bytes, disk.unchanged_bytes) == (2 * CHUNK, 8 * MIB - 3 * CHUNK)
    assert record.parent == record.previous == parent.id


async def test_an_unchanged_disk_costs_one_object(workers: Workers) -> None:
    store = FaultyStore(MemoryStore())
    vault = fresh_vault(store)
    content = noise(4 * MIB)
    parent = await told(vault, workers, 4 * MIB, [(0, content)])
    before = {stored.key for stored in store.list("")}
    start = store.calls
    record = await told(vault, workers, 4 * MIB, [], parent)
    again = await told(vault, workers, 4 * MIB, [(0, content)], record)
    after = {stored.key for stored in store.list("")}
    assert {key.partition("/")[0] for key in after - before} == {"points"}
    assert len(after - before) == 2
    assert record.disks[0].root == again.disks[0].root == parent.disks[0].root
    assert not [call for call in store.log[start:] if call.key.startswith("index/")]
    assert again.disks[0].unchanged_bytes == 4 * MIB


async def test_the_same_chunk_is_stored_once(workers: Workers) -> None:
    vault = fresh_vault()
    one = noise(CHUNK)
    writer = await begin(vault, workers, "vm")
    first = await writer.disk("first", 4 * CHUNK)
    second = await writer.disk("second", 4 * CHUNK)
    await first.data(0, bytearray(one * 4), 4 * CHUNK)
    await second.data(0, bytearray(one * 4), 4 * CHUNK)
    record = await writer.commit_record()
    assert read_back(vault, record, "first") == read_back(vault, record, "second") == one * 4
    assert record.disks[0].image_id == record.disks[1].image_id
    assert (first.summary.duplicate_bytes, second.summary.duplicate_bytes) == (3 * CHUNK, 4 * CHUNK)
    assert second.summary.new_bytes == 0
    other = await told(vault, workers, 4 * CHUNK, [(2 * CHUNK, one)])
    assert other.disks[0].new_bytes == 0


@pytest.mark.parametrize(
    "size", [5 * MIB, 5 * MIB + 100, 5 * MIB + 3 * CHUNK, 8 * MIB, 12 * MIB + 7, 16 * MIB]
)
async def test_a_parent_of_another_size(workers: Workers, size: int) -> None:
    vault = fresh_vault()
    old = noise(8 * MIB + 77)
    parent = await told(vault, workers, len(old), [(0, old)])
    now = old[:size] + noise(CHUNK)[: max(0, size - len(old))]
    now += bytes(size - len(now))
    writer = await begin(vault, workers, "vm", parent)
    disk = await writer.disk("disk", size)
    wanted = await disk.wanted()
    common = min(size, len(old)) // CHUNK * CHUNK
    assert wanted == ([(common, size - common)] if common < size else [])
    for offset, length in wanted:
        for at in range(offset, offset + length, MIB):
            part = now[at : min(at + MIB, offset + length)]
            await disk.data(at, bytearray(part), len(part))
    assert await disk.wanted() == []
    record = await writer.commit_record()
    assert read_back(vault, record) == now


async def test_what_is_wanted_and_not_given_is_no_point(workers: Workers) -> None:
    vault = fresh_vault()
    parent = await told(vault, workers, MIB, [(0, noise(MIB))])
    with pytest.raises(RepositoryError, match=r"65536 bytes at 1048576.*--since full"):
        await told(vault, workers, MIB + CHUNK, [], parent)
    assert listed(vault) == [parent]


async def test_pages_that_lie_behind_are_not_kept(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.repository.native.map_writer.MAX_OPEN", 2)
    monkeypatch.setattr("nbdsrv.repository.native.stock.META_TARGET", 2000)
    vault = fresh_vault()
    content = bytearray(noise(24 * MIB))
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", len(content))
    for offset in range(0, len(content), MIB):
        await disk.data(offset, content[offset : offset + MIB], MIB)
        assert len(disk.map._open) <= 5  # two, and those of the packs that have no name
    for offset in (MIB, 7 * MIB + CHUNK, 0, 23 * MIB):  # encoded and put already
        new = noise(CHUNK)
        content[offset : offset + CHUNK] = new
        await disk.data(offset, bytearray(new), CHUNK)
    await disk.zero(3 * MIB, MIB)
    content[3 * MIB : 4 * MIB] = bytes(MIB)
    record = await writer.commit_record()
    assert read_back(vault, record) == content


async def test_ids_are_found_after_a_segment_was_put(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.repository.native.stock.SMALL", 20)
    vault = fresh_vault()
    content = noise(4 * MIB)
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", 8 * MIB)
    for offset in range(0, 8 * MIB, MIB):
        part = content[offset % (4 * MIB) :][:MIB]
        await disk.data(offset, bytearray(part), MIB)
    assert disk.summary.duplicate_bytes == 4 * MIB
    record = await writer.commit_record()
    assert read_back(vault, record) == content * 2
    assert len(list(vault.store.list("index/"))) > 1


@pytest.mark.parametrize("chunk", [64 * KIB, 4 * MIB])
@pytest.mark.parametrize("cipher", [None, "aes-256-gcm"])
@pytest.mark.parametrize("hash_", ["blake3", "sha256"])
async def test_every_kind_of_repository(
    workers: Workers, chunk: int, cipher: str | None, hash_: str
) -> None:
    store = MemoryStore()
    vault = fresh_vault(store, chunk=chunk, cipher=cipher, hash_=hash_)
    text = b"a line of text that compresses\n" * 300_000
    content = text[: 9 * MIB] + noise(100)
    record = await told(
        vault, workers, len(content), [(0, content[: 4 * MIB]), (4 * MIB, content[4 * MIB :])]
    )
    assert record.disks[0].new_bytes < MIB
    opened = Vault.open(store, lambda: "correct horse")
    assert read_back(opened, record) == content
    if cipher:
        stored = b"".join(store.get(row.key) for row in store.list(""))
        assert b"a line of text" not in stored
        assert b'"disk"' not in stored


async def test_nothing_leads_into_a_condemned_pack(workers: Workers) -> None:
    vault = fresh_vault()
    content = noise(4 * MIB)
    parent = await told(vault, workers, 4 * MIB, [(0, content)])
    names = [pack_of(row.key) for row in vault.store.list("packs/")]
    metas = [pack_of(row.key) for row in vault.store.list("metas/")]
    first = vault.page(vault.root(parent.disks[0].root), 0).place(0).pack
    condemn(vault.store, [first], [name for name in metas if name])
    writer = await begin(vault, workers, "vm", parent)
    disk = await writer.disk("disk", 4 * MIB)
    ranges = await disk.wanted()
    assert ranges
    assert ranges[0][0] == 0
    assert sum(length for _, length in ranges) < 4 * MIB
    for offset, length in ranges:
        await disk.data(offset, bytearray(content[offset : offset + length]), length)
    record = await writer.commit_record()
    assert read_back(vault, record) == content
    root = vault.root(record.disks[0].root)
    used = {root.pages.place(page).pack for page in range(len(root))}
    used.add(record.disks[0].root.place.pack)
    for page in range(len(root)):
        used |= {place.pack for _, _, place in vault.page(root, page).places()}
    assert not used & ({first} | set(metas))
    assert len(names) > 1


async def test_condemned_chunks_that_lie_elsewhere_too_are_taken_from_there(
    workers: Workers,
) -> None:
    vault = fresh_vault()
    content = noise(MIB // 2)
    parent = await told(vault, workers, MIB, [(0, content)])
    first = vault.page(vault.root(parent.disks[0].root), 0).place(0).pack
    keys = condemn(vault.store, [first], [])
    await told(vault, workers, MIB, [(0, content)])  # stores it once more
    record = await told(vault, workers, MIB, [], parent)
    page = vault.page(vault.root(record.disks[0].root), 0)
    assert first not in {place.pack for _, _, place in page.places()}
    assert record.disks[0].image_id == parent.disks[0].image_id
    for key in keys:
        vault.store.delete(key)
    assert read_back(vault, record) == content + bytes(MIB // 2)


@pytest.mark.parametrize("told_all", [True, False])
async def test_what_was_found_damaged_is_stored_anew(workers: Workers, *, told_all: bool) -> None:
    """The source still has it: that mends the points that share it, too."""
    store = MemoryStore()
    vault = fresh_vault(store)
    content = noise(2 * MIB)
    parent = await told(vault, workers, 2 * MIB, [(0, content)])
    place = vault.page(vault.root(parent.disks[0].root), 0).place(3)
    key = pack_key(place.pack)
    data = bytearray(store.get(key))
    data[place.offset + 1000] ^= 1
    store.put(key, data)
    with pytest.raises(CorruptImage):
        read_back(vault, parent)
    scrubbing = Scrubbing(store)
    scrubbing.damaged(place.pack, key, "a test")
    scrubbing.save()
    writer = await begin(vault, workers, "vm", parent)
    disk = await writer.disk("disk", 2 * MIB)
    ranges = [(0, 2 * MIB)] if told_all else await disk.wanted()
    for offset, length in ranges:
        await disk.data(offset, bytearray(content[offset : offset + length]), length)
    await writer.commit_record()
    vault = Vault.open(store, lambda: "")
    assert [read_back(vault, record) for record in listed(vault)] == [content, content]


async def test_packs_of_an_interrupted_run_are_adopted(workers: Workers) -> None:
    vault = fresh_vault()
    content = noise(4 * MIB)
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", 4 * MIB)
    await disk.data(0, bytearray(content), 3 * MIB)
    await writer.abort()
    assert listed(vault) == []
    assert list(vault.store.list("index/")) == []
    stored = sum(row.size for row in vault.store.list("packs/"))
    assert stored > 2 * MIB
    record = await told(vault, workers, 4 * MIB, [(0, content)])
    assert record.disks[0].new_bytes < 4 * MIB - stored + 2 * CHUNK
    assert read_back(vault, record) == content


async def test_a_damaged_page_of_the_parent_is_wanted_anew(workers: Workers) -> None:
    store = MemoryStore()
    vault = fresh_vault(store)
    content = noise(4 * MIB)
    parent = await told(vault, workers, 4 * MIB, [(0, content)])
    root = vault.root(parent.disks[0].root)
    place = root.pages.place(1)
    for row in store.list("metas/"):
        if pack_of(row.key) == place.pack:
            data = bytearray(store.get(row.key))
            data[place.offset + 100] ^= 1
            store.put(row.key, data)
    writer = await begin(vault, workers, "vm", parent)
    disk = await writer.disk("disk", 4 * MIB)
    assert await disk.wanted() == []
    new = noise(CHUNK)
    now = bytearray(content)
    now[MIB + CHUNK : MIB + 2 * CHUNK] = new
    await disk.data(MIB + CHUNK, bytearray(new), CHUNK)
    wanted = await disk.wanted()
    assert wanted == [(MIB, CHUNK), (MIB + 2 * CHUNK, 14 * CHUNK)]
    for offset, length in wanted:
        await disk.data(offset, now[offset : offset + length], length)
    assert read_back(vault, await writer.commit_record()) == now


@pytest.mark.parametrize("key", ["packs/.*", "metas/.*", "index/.*", "points/.*"])
async def test_after_an_error_nothing_can_be_committed(workers: Workers, key: str) -> None:
    inside = MemoryStore()
    fresh_vault(inside)
    store = FaultyStore(inside, failures=[Failure(calls("put_new", key=key), errno.ENOSPC, 1)])
    vault = Vault.open(store, lambda: "")
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", 4 * MIB)

    async def all_of_it() -> None:
        for offset in range(0, 4 * MIB, MIB):
            await disk.data(offset, bytearray(noise(MIB)), MIB)
        await writer.commit_record()

    with pytest.raises(DiskError, match=os_text(errno.ENOSPC)) as caught:
        await all_of_it()
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RepositoryError, match="nothing is committed"):
        await writer.commit_record()
    with pytest.raises(RepositoryError, match="nothing is committed"):
        await disk.zero(0, CHUNK)
    await writer.abort()
    await writer.abort()
    assert listed(vault) == []
    assert list(inside.list("leases/")) == []


def os_text(number: int) -> str:
    import os

    return re.escape(os.strerror(number))


async def test_two_writers_at_once(workers: Workers) -> None:
    vault = fresh_vault()
    shared, one, two = noise(MIB), noise(MIB), noise(MIB)
    writers: list[NativePointWriter] = [await begin(vault, workers, "vm") for _ in range(2)]
    disks = [await writer.disk("disk", 2 * MIB) for writer in writers]
    for disk, own in zip(disks, (one, two), strict=True):
        await disk.data(0, bytearray(shared), MIB)
        await disk.data(MIB, bytearray(own), MIB)
    records = [await writer.commit_record() for writer in writers]
    assert read_back(vault, records[0]) == shared + one
    assert read_back(vault, records[1]) == shared + two
    assert records[1].previous == records[0].id


async def test_refusals(workers: Workers) -> None:
    vault = fresh_vault()
    with pytest.raises(RepositoryError, match="200 bytes"):
        await begin(vault, workers, "v" * 300)
    with pytest.raises(ConfigError, match="levels are 0"):
        await begin(vault, workers, "vm", level=23)
    assert list(vault.store.list("leases/")) == []
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", MIB + 1)
    with pytest.raises(RepositoryError, match="name of its own"):
        await writer.disk("disk", MIB)
    with pytest.raises(RepositoryError, match="--chunk-size"):
        await writer.disk("huge", 1 << 52)
    with pytest.raises(DiskError, match="whole chunks"):
        await disk.zero(1, CHUNK)
    with pytest.raises(DiskError, match="beyond"):
        await disk.zero(MIB, CHUNK)
    with pytest.raises(RepositoryError, match="no place in a point for colour"):
        await writer.commit_record({"colour": "red"})
    await writer.abort()


async def test_a_sample_is_of_data_that_is_not_said_to_have_changed(workers: Workers) -> None:
    from nbdsrv.copying.survey import DataMap

    vault = fresh_vault()
    content = noise(2 * MIB) + bytes(2 * MIB)
    parent = await told(vault, workers, 4 * MIB, [(0, content)])
    writer = await begin(vault, workers, "vm", parent)
    disk = await writer.disk("disk", 4 * MIB)
    changed = DataMap(4 * MIB, CHUNK)
    changed.add(0, MIB)
    whole = await disk.sample(100, changed)
    assert whole == [(at, CHUNK) for at in range(MIB, 2 * MIB, CHUNK)]
    assert len(await disk.sample(1e-9, changed)) == 1
    assert await disk.sample(0, changed) == []
    assert await disk.recheck(MIB, bytearray(content[MIB : 2 * MIB]), MIB) == 0
    other = bytearray(content[MIB : 2 * MIB])
    other[CHUNK] ^= 1
    assert await disk.recheck(MIB, other, MIB) == CHUNK
    assert await disk.recheck(MIB, bytearray(MIB), MIB) == MIB
    await writer.abort()


async def test_chunks_far_apart_do_not_keep_their_pages_open(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small chunk in each page: packs are closed early, or all pages would wait for one."""
    monkeypatch.setattr("nbdsrv.repository.native.map_writer.MAX_OPEN", 2)
    monkeypatch.setattr("nbdsrv.repository.native.map_writer.MAX_WAITING", 10)
    vault = fresh_vault(page_slots=16)
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", 100 * MIB)
    content = bytearray(100 * MIB)
    for offset in range(0, 100 * MIB, MIB):
        content[offset : offset + 4096] = noise(4096)
        await disk.data(offset, content[offset : offset + CHUNK], CHUNK)
        assert len(disk.map._open) <= 13
    assert read_back(vault, await writer.commit_record()) == content
    assert len(list(vault.store.list("packs/"))) == 10


@given(
    size=st.integers(0, 40 * CHUNK),
    order=st.permutations(range(20)),
    built=st.booleans(),
    at_once=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_pieces_may_come_in_any_order_and_several_at_once(
    size: int, order: list[int], *, built: bool, at_once: bool
) -> None:
    """Some are told as data, some as zeroes, some not at all."""
    dice = random.Random(size)
    vault = fresh_vault(page_slots=16)
    async with running_workers() as workers:
        content = bytearray(size)
        parent = None
        if built and size:
            content[:] = dice.randbytes(size)
            parent = await told(vault, workers, size, [(0, bytes(content))])
        writer = await begin(vault, workers, "vm", parent)
        disk = await writer.disk("disk", size)
        work = []
        for index in order:
            offset, end = 2 * index * CHUNK, min(2 * (index + 1) * CHUNK, size)
            if offset >= end or index % 4 == 0:
                continue
            if index % 4 == 1:
                content[offset:end] = bytes(end - offset)
                work.append(disk.zero(offset, end - offset))
            else:
                kind = b"same" if index % 4 == 2 else dice.randbytes(4)
                content[offset:end] = (kind * CHUNK)[: end - offset]
                work.append(disk.data(offset, content[offset:end], end - offset))
        if at_once:
            await asyncio.gather(*work)
        else:
            for each in work:
                await each
        record = await writer.commit_record()
    assert read_back(vault, record) == content


async def test_a_page_waits_for_every_pack_it_needs(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packs go up at once, and the later one may be there first."""
    monkeypatch.setattr("nbdsrv.repository.native.map_writer.MAX_OPEN", 0)
    vault = fresh_vault(page_slots=16)
    writer = await begin(vault, workers, "vm")
    disk = await writer.disk("disk", 2 * MIB)
    stock = writer._stock
    filled = []
    for chunk in range(2):
        content = noise(CHUNK)
        id_ = vault.hashing.id_of(content)
        with stock.lock:
            disk.map.set(chunk, stock.add(id_, Codec.RAW, CHUNK, content))
            rest = stock.chunks.rest()
            assert rest is not None
            filled.append(rest)
            stock._waiting += 1
    for rest in reversed(filled):
        assert list(disk.map._open) == [0]
        await stock.put([(stock.chunks, rest)])
        with stock.lock:
            disk.map.relieve()
    assert list(disk.map._open) == []
    await writer.commit_record()


async def test_a_root_in_a_condemned_pack_is_written_anew(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.repository.native.stock.META_TARGET", 1)  # a pack for each page
    vault = fresh_vault()
    content = noise(2 * MIB)
    parent = await told(vault, workers, 2 * MIB, [(0, content)])
    old = parent.disks[0].root
    condemn(vault.store, [], [old.place.pack])
    record = await told(vault, workers, 2 * MIB, [], parent)
    assert record.disks[0].root.id == old.id
    assert record.disks[0].root.pack != old.pack
    vault.store.delete(meta_key(old.place.pack))
    assert read_back(vault, record) == content


async def test_a_point_sorts_behind_one_of_a_host_whose_clock_is_ahead() -> None:
    vault = fresh_vault()
    async with running_workers() as workers:
        ids = []
        for given in ({"id": "7ZZZZZZZZZ" + "0" * 16}, None, None):
            point = await begin(vault, workers, "vm")
            await point.disk("sda", 4 * vault.config.chunk_size)
            record = await point.commit_record(given)
            ids.append(record.id)
    assert sorted(set(ids)) == ids
    assert ids[1] == record.previous
