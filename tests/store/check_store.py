"""What every store must do. Each check takes a store and leaves it as it found it."""

import errno
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from nbdsrv.store.store import ObjectMissing, Store, StoreError

__all__ = ["CHECKS", "check_store"]

SIZES = (0, 1, 511, 4096, 65537, (1 << 20) + 1)
NO_KEYS = ("", "/", "/a", "a/", "a//b", ".", "..", "a/../b", ".tmp/a", "a/.b", "ä", "a b", "a\0")
NO_PREFIXES = ("a", "/", "/a/", "../", "a//", ".tmp/", "a/../")
KEYS = ("packs/0f/0fa9.pk", "packs/0f-1", "packs/0f.x", "packs/0g/%25a_b", "top", "x..y/-%2e-")


def check_store(store: Store) -> None:
    """Every check, one after the other, on an empty store."""
    for check in CHECKS:
        check(store)
        assert list(store.list("")) == [], check.__name__


def pattern(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def cleared(store: Store) -> None:
    for row in list(store.list("")):
        store.delete(row.key)


def check_sizes(store: Store) -> None:
    for size in SIZES:
        data = pattern(size)
        assert store.put_new(f"sizes/{size}", data)
        assert store.get(f"sizes/{size}") == data
        assert store.get(f"sizes/{size}", size) == data
        assert isinstance(store.get(f"sizes/{size}"), bytes)
    assert {row.key: row.size for row in store.list("sizes/")} == {
        f"sizes/{size}": size for size in SIZES
    }
    cleared(store)


def check_buffers(store: Store) -> None:
    data = bytearray(pattern(1000))
    view = memoryview(data)[17:300]
    assert store.put_new("view", view)
    assert store.put_new("array", data)
    store.put("put", view)
    data[:] = bytes(1000)  # it is the caller's again
    expected = pattern(1000)
    assert store.get("view") == store.get("put") == expected[17:300]
    assert store.get("array") == expected
    cleared(store)


def check_creating_twice(store: Store) -> None:
    assert store.put_new("a/key", b"first")
    assert not store.put_new("a/key", b"second")
    assert store.get("a/key") == b"first"
    store.delete("a/key")
    assert store.put_new("a/key", b"third")
    assert store.get("a/key") == b"third"
    cleared(store)


def check_replacing(store: Store) -> None:
    for data in (b"one", b"", b"a longer one", b"two"):
        store.put("leases/a", data)
        assert store.get("leases/a") == data
        assert [row.size for row in store.list("leases/")] == [len(data)]
    cleared(store)


def check_missing(store: Store) -> None:
    store.put_new("there/is/one", b"x")
    for key in ("nothing", "there/is/none", "there/is", "there"):
        for call in (
            lambda key=key: store.get(key),
            lambda key=key: store.get_range(key, 0, 1),
            lambda key=key: store.get_ranges(key, [(0, 1)]),
        ):
            with pytest.raises(ObjectMissing) as caught:
                call()
            assert caught.value.errno == errno.ENOENT
            assert key in str(caught.value)
            assert store.name in str(caught.value)
    store.delete("nothing")
    store.delete("there/is/none")
    assert list(store.list("nothing/")) == []
    assert list(store.list("there/is/one/")) == []
    cleared(store)


def check_limit(store: Store) -> None:
    store.put_new("long", bytes(100))
    with pytest.raises(StoreError, match="100 bytes") as caught:
        store.get("long", 99)
    assert caught.value.errno == errno.EFBIG
    cleared(store)


def check_ranges(store: Store) -> None:
    data = pattern(3 << 20)
    store.put_new("packs/a", data)
    for offset, length in ((0, 1), (0, len(data)), (len(data) - 1, 1), (4095, 131072), (77, 3)):
        assert bytes(store.get_range("packs/a", offset, length)) == data[offset : offset + length]
    for offset, length in ((len(data) - 1, 2), (len(data), 1), (len(data) + 5, 1), (1 << 40, 9)):
        with pytest.raises(StoreError) as caught:
            store.get_range("packs/a", offset, length)
        assert caught.value.errno == errno.EIO
    for offset, length in ((-1, 2), (0, 0), (5, -1)):
        with pytest.raises(StoreError):
            store.get_range("packs/a", offset, length)
    cleared(store)


def check_many_ranges(store: Store) -> None:
    data = pattern(4 << 20)
    store.put_new("packs/a", data)
    chosen = random.Random(1)
    for count in (0, 1, 2, 20):
        ranges = []
        for _ in range(count):
            offset = chosen.randrange(len(data))
            ranges.append((offset, chosen.randint(1, min(200_000, len(data) - offset))))
        found = [bytes(part) for part in store.get_ranges("packs/a", ranges)]
        assert found == [data[offset : offset + length] for offset, length in ranges]
    overlapping = [(100, 50), (0, 4 << 20), (100, 50), (120, 1)]
    found = [bytes(part) for part in store.get_ranges("packs/a", overlapping)]
    assert found == [data[offset : offset + length] for offset, length in overlapping]
    with pytest.raises(StoreError) as caught:
        store.get_ranges("packs/a", [(0, 10), (len(data) + 100, 1)])
    assert caught.value.errno == errno.EIO
    cleared(store)


def check_listing(store: Store) -> None:
    before = time.time()
    for key in reversed(KEYS):
        store.put_new(key, key.encode())
    rows = list(store.list(""))
    assert [row.key for row in rows] == sorted(KEYS)
    for row in rows:
        assert row.size == len(row.key)
        assert before - 2 < row.modified < time.time() + 2
    for prefix in ("packs/", "packs/0f/", "packs/0g/", "x..y/", "pack/", "top/"):
        expected = sorted(key for key in KEYS if key.startswith(prefix))
        assert [row.key for row in store.list(prefix)] == expected
    cleared(store)


def check_deleting_while_listing(store: Store) -> None:
    for number in range(30):
        store.put_new(f"many/{number % 3}/{number:02}", b"x")
    listing = store.list("many/")
    next(listing)
    for row in list(store.list("many/")):
        store.delete(row.key)
    assert len(list(listing)) <= 29
    assert list(store.list("many/")) == []


def check_what_is_no_key(store: Store) -> None:
    for key in (*NO_KEYS, "a" * 256, "a/" * 400 + "a"):
        for call in (
            lambda key=key: store.put_new(key, b"x"),
            lambda key=key: store.put(key, b"x"),
            lambda key=key: store.get(key),
            lambda key=key: store.get_range(key, 0, 1),
            lambda key=key: store.delete(key),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL
            assert "\n" not in str(caught.value)
    for prefix in NO_PREFIXES:
        with pytest.raises(StoreError) as caught:
            store.list(prefix)  # at once, not at the first row
        assert caught.value.errno == errno.EINVAL


def check_threads(store: Store) -> None:
    def work(number: int) -> None:
        for step in range(4):
            key = f"threads/{number}/{step}"
            data = pattern(number * 1000 + step + 1, number)
            assert store.put_new(key, data)
            assert store.get(key) == data
            assert bytes(store.get_range(key, step, 1)) == data[step : step + 1]
            store.put("threads/shared", data)
            assert len(store.get("threads/shared")) > 0
            assert key in {row.key for row in store.list(f"threads/{number}/")}

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(list(store.list("threads/"))) == 33
    cleared(store)


def check_races(store: Store) -> None:
    for turn in range(5):
        start = Barrier(8)

        def work(number: int, turn: int = turn, start: Barrier = start) -> bool:
            start.wait()
            return store.put_new(f"races/{turn}", b"%d" % number * 5000)

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(work, range(8)))
        assert sum(won) == 1
        assert store.get(f"races/{turn}") == b"%d" % won.index(True) * 5000
    cleared(store)


CHECKS: tuple[Callable[[Store], None], ...] = (
    check_sizes,
    check_buffers,
    check_creating_twice,
    check_replacing,
    check_missing,
    check_limit,
    check_ranges,
    check_many_ranges,
    check_listing,
    check_deleting_while_listing,
    check_what_is_no_key,
    check_threads,
    check_races,
)
