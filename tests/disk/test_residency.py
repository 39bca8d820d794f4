"""What is in the page cache, on a file that really was dropped from it; by either way of asking."""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdsrv.disk.residency import MAX_PROBE, NEVER, Residency, make_resident
from tests.formats.images import Image

MIB = 1 << 20
SIZE = 8 * MIB + 5


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[int]:
    """A file of which nothing is in memory, and whose reads do not run ahead."""
    path = str(tmp_path / "disk.img")
    Image("cold", SIZE, ((0, SIZE),)).make(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        drop(fd)
        yield fd
    finally:
        os.close(fd)


def drop(fd: int) -> None:
    """Out of the page cache, or skip: tmpfs has nowhere else to keep it."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(20):  # a page somebody is busy with stays
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # asking began to read it
            return
        except OSError as error:
            pytest.skip(f"no RWF_NOWAIT on this file system: {error}")
        os.fsync(fd)
        time.sleep(0.01)
    pytest.skip("this file system does not let go of its pages")


def by_counting(fd: int, position: int, length: int) -> bool:
    """As for a file that has been warm for a while."""
    return Residency(os.RWF_NOWAIT).resident(fd, position, length)


def by_reading(fd: int, position: int, length: int) -> bool:
    """As for a file of which something was found cold lately."""
    residency = Residency(os.RWF_NOWAIT)
    residency.cold()
    return residency.resident(fd, position, length)


Ask = Callable[[int, int, int], bool]
both_ways = pytest.mark.parametrize("resident", [by_counting, by_reading])


@both_ways
def test_cold_then_warm(cold: int, resident: Ask) -> None:
    assert not resident(cold, MIB, 65536)
    make_resident(cold, MIB, 65536)
    assert resident(cold, MIB, 65536)
    assert not resident(cold, 6 * MIB, 65536)


@both_ways
@pytest.mark.parametrize("length", [1, 4096, 65535, 65536, 65537, MIB + 7, MAX_PROBE])
def test_of_any_length(cold: int, resident: Ask, length: int) -> None:
    make_resident(cold, 4096, length)
    assert resident(cold, 4096, length)


def test_counting_loads_nothing(cold: int) -> None:
    # Reading does: Linux starts to read ahead on RWF_NOWAIT, without waiting for it.
    for _ in range(5):
        assert not by_counting(cold, 2 * MIB, 65536)


@both_ways
def test_one_missing_page_is_enough(cold: int, resident: Ask) -> None:
    for _ in range(20):
        make_resident(cold, 0, 2 * MIB)
        os.posix_fadvise(cold, MIB, mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
        if by_counting(cold, MIB, mmap.PAGESIZE):
            pytest.skip("this file system keeps pages in larger pieces")
        if not resident(cold, 0, 2 * MIB):
            return
        # The kernel may have read it again meanwhile, ahead of somebody.
        assert by_counting(cold, MIB, mmap.PAGESIZE)
    pytest.fail("a page that is missing was never noticed")


def test_more_than_an_exact_answer_covers_is_cold(cold: int) -> None:
    make_resident(cold, 0, SIZE)
    assert by_reading(cold, 0, MAX_PROBE)
    assert not by_reading(cold, 0, MAX_PROBE + 1)


def test_the_tail(cold: int) -> None:
    make_resident(cold, 0, SIZE)
    assert by_counting(cold, SIZE - 70_000, 70_000)
    assert by_reading(cold, SIZE - 70_000, 70_000)
    assert not by_reading(cold, SIZE - 70_000, 70_001)  # the file ends before


def test_after_something_cold_the_answer_is_exact(cold: int) -> None:
    residency = Residency(os.RWF_NOWAIT)
    make_resident(cold, 0, SIZE)
    assert residency.resident(cold, 0, MAX_PROBE + 1)  # counted: no limit
    residency.cold()
    assert not residency.resident(cold, 0, MAX_PROBE + 1)
    assert residency.resident(cold, 0, MAX_PROBE)


def test_a_file_that_may_never_be_read_inline(cold: int) -> None:
    make_resident(cold, 0, 65536)
    assert not Residency(NEVER).resident(cold, 0, 65536)


@both_ways
def test_a_closed_descriptor_is_not_resident(cold: int, resident: Ask) -> None:
    closed = os.dup(cold)
    os.close(closed)
    assert not resident(closed, 0, 65536)
    make_resident(closed, 0, 65536)  # the error shows when the bytes are really read


def test_making_a_truncated_range_resident_ends(cold: int) -> None:
    make_resident(cold, SIZE - 10, 100_000)
    make_resident(cold, 1 << 40, 100_000)


def test_memory_is_always_resident() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    fd = os.memfd_create("nbdsrv-test")
    try:
        os.write(fd, b"x" * 100_000)
        assert Residency(0).resident(fd, 0, 100_000)
        assert not Residency(0).resident(fd, 0, 100_000 + mmap.PAGESIZE)
    finally:
        os.close(fd)
