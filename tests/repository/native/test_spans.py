"""Few large calls to a distant store: how many, for whom, and never other bytes."""

import errno
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place
from nbdsrv.repository.native.layout import pack_key
from nbdsrv.repository.native.spans import MAX_GAP, MAX_SPAN, SpanStore, spans_of
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.faulty import FaultyStore
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Data, StoreError
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.native.building import CHUNK, PAGE_SLOTS, Building, open_disk
from tests.repository.native.contents import striped

SPAN = CHUNK * PAGE_SLOTS


def _distant(build: Building) -> FaultyStore:
    """From here on the repository is read through spans, from the store returned."""
    far = FaultyStore(build.vault.store)
    build.vault = Vault.open(SpanStore(far), lambda: "open sesame")
    return far


def _reads(store: FaultyStore) -> int:
    return sum(call.method == "get_range" for call in store.log)


@pytest.mark.parametrize("passphrase", [None, "open sesame"])
async def test_contract(workers: Workers, passphrase: str | None) -> None:
    golden = striped(6 * SPAN + 555, 21)
    build = Building.fresh(passphrase=passphrase)
    record = build.point("vm", {"sda": golden})
    inside = build.vault.store

    async def open_distant():
        build.vault = Vault.open(SpanStore(FaultyStore(inside)), lambda: "open sesame")
        return await open_disk(build, workers, record, "sda")

    await check_disk(open_distant, golden)


async def test_who_reads_on_makes_few_calls(workers: Workers) -> None:
    golden = random.Random(1).randbytes(16 * SPAN)
    build = Building.fresh()
    build.pack_bytes = 8 << 20
    record = build.point("vm", {"sda": golden})
    store = _distant(build)
    disk = await open_disk(build, workers, record, "sda")
    before = _reads(store)
    for at in range(0, disk.size, 10_000):
        length = min(10_000, disk.size - at)
        assert await content(disk, at, length) == golden[at : at + length]
    made = _reads(store) - before
    chunks = disk.size // CHUNK
    assert made < chunks // 8, f"{made} calls for {chunks} chunks"
    await disk.close()


async def test_holes_do_not_stop_it(workers: Workers) -> None:
    chance = random.Random(2)
    golden = b"".join(chance.randbytes(CHUNK) + bytes(40 * CHUNK) for _ in range(64))
    build = Building.fresh()
    build.pack_bytes = 8 << 20
    record = build.point("vm", {"sda": golden})
    store = _distant(build)
    disk = await open_disk(build, workers, record, "sda")
    await extent_map(disk)  # the pages are there
    before = _reads(store)
    for at in range(0, disk.size, CHUNK):
        assert await content(disk, at, CHUNK) == golden[at : at + CHUNK]
    assert _reads(store) - before < 32
    await disk.close()


async def test_random_reads_fetch_what_they_need(workers: Workers) -> None:
    golden = random.Random(3).randbytes(32 * SPAN)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    store = _distant(build)
    disk = await open_disk(build, workers, record, "sda")
    chunks = list(range(0, disk.size // CHUNK, 40))
    random.Random(5).shuffle(chunks)
    for chunk in chunks:
        at = chunk * CHUNK + 512
        assert await content(disk, at, 512) == golden[at : at + 512]
    packs = [call for call in store.log if call.method == "get_range" and "packs/" in call.key]
    assert len(packs) <= len(chunks)
    await disk.close()


@pytest.mark.parametrize("passphrase", [None, "open sesame"])
async def test_a_span_that_broke_on_its_way_is_fetched_again(
    workers: Workers, passphrase: str | None
) -> None:
    """It is kept in memory: what it held was an error until something pushed it out."""

    class Noisy(FaultyStore):
        def get_range(self, key: str, offset: int, length: int) -> Data:
            data = super().get_range(key, offset, length)
            if length < 2 * CHUNK:
                return data
            spans.append(key)
            return bytes(length)

    spans: list[str] = []
    golden = random.Random(4).randbytes(4 * SPAN)
    build = Building.fresh(passphrase=passphrase)
    record = build.point("vm", {"sda": golden})
    build.vault = Vault.open(SpanStore(Noisy(build.vault.store)), lambda: "open sesame")
    disk = await open_disk(build, workers, record, "sda")
    for at in range(0, disk.size, CHUNK):
        assert await content(disk, at, CHUNK) == golden[at : at + CHUNK]
    assert spans
    await disk.close()


async def test_a_span_that_fails_is_read_piece_by_piece(workers: Workers) -> None:
    golden = random.Random(4).randbytes(4 * SPAN)
    build = Building.fresh()
    record = build.point("vm", {"sda": golden})
    inside = build.vault.store
    assert isinstance(inside, MemoryStore)
    store = _ShortBreath()
    store._objects = inside._objects
    build.vault = Vault.open(SpanStore(store), lambda: "")
    disk = await open_disk(build, workers, record, "sda")
    for at in range(0, disk.size, CHUNK):
        assert await content(disk, at, CHUNK) == golden[at : at + CHUNK]
    assert store.failed
    await disk.close()


class _ShortBreath(MemoryStore):
    """Large reads time out."""

    failed = 0

    def get_range(self, key: str, offset: int, length: int) -> Data:
        if length > 2 * CHUNK:
            self.failed += 1
            raise StoreError(f"{key}: timed out", errno.ETIMEDOUT)
        return super().get_range(key, offset, length)


class _Slow(MemoryStore):
    """Counts reads, and holds them back until told."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.reads = 0

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        self.reads += 1
        assert self.go.wait(10)
        return bytes(super().get_range(key, offset, length))


def test_one_fetch_for_all_who_wait() -> None:
    inside = _Slow()
    inside.put("packs/x", bytes(range(200)))
    store = SpanStore(inside)
    store.announce("packs/x", 10, 100)
    store.announce("packs/x", 20, 50)  # is on its way already
    got: list[bytes] = []
    readers = [
        threading.Thread(target=lambda n=n: got.append(bytes(store.get_range("packs/x", n, 5))))
        for n in range(10, 60, 10)
    ]
    for reader in readers:
        reader.start()
    inside.go.set()
    for reader in readers:
        reader.join()
    assert sorted(got) == [bytes(range(n, n + 5)) for n in range(10, 60, 10)]
    assert inside.reads == 1
    store.close()


def test_spans_are_kept_within_their_bound() -> None:
    inside = MemoryStore()
    inside.put("packs/x", bytes(1000))
    store = SpanStore(inside, limit=250)
    for at in range(0, 1000, 100):
        store.announce("packs/x", at, 100)
        assert bytes(store.get_range("packs/x", at, 100)) == bytes(100)
        assert store._size <= 250
    assert len(store._spans) == sum(map(len, store._of.values())) == 2
    store.announce("packs/gone", 0, 10)
    with pytest.raises(Exception, match="no such object"):
        store.get_range("packs/gone", 0, 10)
    store.close()
    store.announce("packs/x", 0, 10)
    assert store._pool is None


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(64, 20 << 20), st.integers(0, 1 << 20)),
        max_size=30,
    )
)
def test_spans_hold_their_entries(rows: list[tuple[int, int, int]]) -> None:
    places = [Place(bytes([n]) * 32, offset, length, 0) for n, offset, length in rows]
    spans = list(spans_of(Kind.CHUNK, places))
    for place in places:
        stop = place.offset + ENTRY_SIZE + place.length
        assert any(
            key == pack_key(place.pack) and offset <= place.offset and stop <= offset + length
            for key, offset, length in spans
        )
    assert len(spans) <= len(places)
    wanted = sum(ENTRY_SIZE + place.length for place in places)
    assert sum(length for _, _, length in spans) <= wanted + MAX_GAP * len(places)
    assert all(length <= max(MAX_SPAN, ENTRY_SIZE + (1 << 20)) for _, _, length in spans)
