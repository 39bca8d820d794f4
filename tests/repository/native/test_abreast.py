"""Many requests at a time to a store that is far away: how many, and never in another order."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdsrv.repository.native.abreast import AHEAD, AHEAD_BYTES, THREADS_AFAR, abreast
from nbdsrv.repository.native.census import Census
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.layout import INDEX, METAS, PACKS, POINTS
from nbdsrv.repository.native.mark import mark
from nbdsrv.repository.native.prune import prune
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.verify import verify
from nbdsrv.repository.retention import Rules
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import MAX_OBJECT, Data
from tests.repository.native.building import CHUNK, Building

TOGETHER = 10


class Afar(MemoryStore):
    """A read below ``slow`` waits for others, until so many have been on their way at a time.

    Attributes:
        most: that were on their way at a time.
        lonely: one that no others came to join.
    """

    distant = True

    def __init__(self, inside: MemoryStore, slow: str) -> None:
        super().__init__()
        for stored in inside.list(""):
            self.put(stored.key, inside.get(stored.key))
        self.most = 0
        self.lonely = ""
        self._slow = slow
        self._now = 0
        self._counting = threading.Lock()
        self._enough = threading.Event()
        self._patience_s = 10.0

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        self._wait(key)
        return super().get(key, limit)

    def get_range(self, key: str, offset: int, length: int) -> Data:
        self._wait(key)
        return super().get_range(key, offset, length)

    def _wait(self, key: str) -> None:
        if not key.startswith(self._slow):
            return
        with self._counting:
            self._now += 1
            self.most = max(self.most, self._now)
            if self.most >= TOGETHER:
                self._enough.set()
        if not self._enough.wait(self._patience_s):
            self.lonely, self._patience_s = key, 0.0
        with self._counting:
            self._now -= 1


@pytest.fixture(scope="module")
def made() -> MemoryStore:
    """A year of small backups, each with a root and a page of its own."""
    build = Building.fresh()
    for n in range(40):
        build.point("vm", {"sda": b"%d" % n + bytes(CHUNK)})
    store = build.vault.store
    assert isinstance(store, MemoryStore)
    return store


WORK: list[Callable[[Vault], object]] = [
    lambda vault: prune(vault, None, Rules(last=40)),
    lambda vault: collect(vault, grace_s=0),
    verify,
]


@pytest.mark.parametrize("work", WORK, ids=["prune", "gc", "verify"])
def test_points_are_read_many_at_a_time(made: MemoryStore, work: Callable[[Vault], object]) -> None:
    store = Afar(made, POINTS)
    work(Vault.open(store, str))
    assert store.lonely == ""
    assert TOGETHER <= store.most <= THREADS_AFAR


@pytest.mark.parametrize("work", WORK[1:], ids=["gc", "verify"])
def test_roots_and_pages_are_read_many_at_a_time(
    made: MemoryStore, work: Callable[[Vault], object]
) -> None:
    near = Vault.open(made, str)
    roots = [near.root(disk.root) for record in near.points()[0] for disk in record.disks]
    assert len({root.pages.place(0)[:2] for root in roots}) == 40
    store = Afar(made, METAS)
    work(Vault.open(store, str))
    assert store.lonely == ""
    assert TOGETHER <= store.most <= THREADS_AFAR


@pytest.mark.parametrize("work", [Vault.index, Census], ids=["index", "census"])
def test_segments_of_the_index_are_read_many_at_a_time(
    made: MemoryStore, work: Callable[[Vault], object]
) -> None:
    """Every backup leaves one, until a collector merges them."""
    store = Afar(made, INDEX)
    work(Vault.open(store, str))
    assert store.lonely == ""
    assert TOGETHER <= store.most <= THREADS_AFAR


def test_what_is_marked_is_the_same_near_and_afar(made: MemoryStore) -> None:
    """Also who misses what, and in which order that is told."""
    for stored in list(made.list(PACKS))[::3]:
        made.delete(stored.key)
    told = []
    for store in (made, Afar(made, "nothing")):
        vault = Vault.open(store, str)
        found = mark(vault, Census(vault), frozenset())
        live = {name: list(each.rows()) for name, each in found.live.items()}
        told.append((live, found.missing, found.missing_count, found.points))
    assert told[0] == told[1]
    assert len(told[0][1]) == 14
    assert [each.point for each in told[0][1]] == sorted(each.point for each in told[0][1])


# --- by itself -----------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_items() -> None:
    first = threading.Event()

    def ask(number: int) -> int:
        if number:
            first.set()
        else:
            assert first.wait(10)
        return -number

    with ThreadPoolExecutor(4) as threads:
        assert list(abreast(threads, ask, range(200), lambda _: 1)) == [(n, -n) for n in range(200)]


@pytest.mark.parametrize(
    ("size", "ahead"), [(1, AHEAD), (AHEAD_BYTES // 4, 4), (AHEAD_BYTES, 1), (AHEAD_BYTES * 9, 1)]
)
def test_no_more_is_taken_than_there_is_room_for(size: int, ahead: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(4) as threads:
        for number, _ in abreast(threads, str, items(), lambda _: size):
            assert len(taken) <= number + 1 + ahead


def test_an_error_comes_in_its_turn_and_ends_the_asking() -> None:
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        return 10 // (number - 5)

    with ThreadPoolExecutor(2) as threads:
        answers = abreast(threads, ask, range(1000), lambda _: 1)
        assert [next(answers)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ZeroDivisionError):
            next(answers)
    assert len(asked) <= 5 + AHEAD


def test_an_error_ends_the_asking_of_those_before_too() -> None:
    """A store that is down may take a minute for each."""
    over = threading.Event()
    asked = []

    def second(item: tuple[int, None]) -> None:
        number, _ = item
        if number == 5:
            raise ZeroDivisionError
        if number > 5:
            assert over.wait(10)

    with ThreadPoolExecutor(1) as threads:
        first = abreast(threads, asked.append, range(1000), lambda _: 1)
        answers = abreast(threads, second, first, lambda _: 1)
        assert [next(answers)[0][0] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ZeroDivisionError):
            next(answers)
        over.set()
    assert len(asked) < 64 + 16


def test_without_threads_nothing_is_asked_before_its_turn() -> None:
    asked: list[int] = []
    for number, _ in abreast(None, asked.append, range(10), lambda _: 1):
        assert asked == list(range(number + 1))
