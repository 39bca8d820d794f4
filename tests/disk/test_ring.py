"""The kernel brings parts of real files into memory."""

import errno
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nbdsrv.disk.ring as ring_module
from nbdsrv.disk.ring import BATCH, ENTRIES, LONGEST, Ring
from tests.disk.evicting import evict

SIZE = 1 << 20
PART = 4096


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    monkeypatch.setattr(ring_module, "STALLED_S", 60.0)  # machines that run tests are busy
    made = Ring.make()
    if made is None:
        pytest.skip("this kernel has no io_uring for us")
    yield made
    made.close()


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[int]:
    """A file of which nothing is in memory."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    evict(path)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing beside what is asked for
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reading it waits until something is written."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def finish(ring: Ring) -> None:
    """Wait until all has come."""
    with select.epoll() as poll:
        poll.register(ring.fileno(), select.EPOLLIN)
        ring.submit()
        while ring.in_flight:
            assert poll.poll(20)
            ring.complete()


def is_in_memory(fd: int, position: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(PART)], position, os.RWF_NOWAIT) == PART
    except BlockingIOError:
        return False


Told = list[tuple[int, int]]


def teller(told: Told) -> Callable[[int, int], None]:
    return lambda what, result: told.append((what, result))


def test_what_was_brought_is_in_memory(ring: Ring, cold: int) -> None:
    told: Told = []
    wanted = range(0, SIZE, 8 * PART)
    assert not any(is_in_memory(cold, position) for position in wanted)
    for position in wanted:
        assert ring.bring(cold, position, PART, teller(told), position)
    assert ring.in_flight == len(wanted)
    finish(ring)
    assert sorted(told) == [(position, PART) for position in wanted]
    assert all(is_in_memory(cold, position) for position in wanted)
    assert not is_in_memory(cold, 4 * PART)


def test_more_than_there_is_room_for(ring: Ring, cold: int) -> None:
    """Round and round: places and numbers are used again."""
    told: Told = []
    asked = 0
    for _ in range(5):
        while ring.bring(cold, asked * PART % SIZE, LONGEST, teller(told), asked):
            asked += 1
        assert ring.in_flight == ENTRIES
        finish(ring)
    assert [what for what, _ in sorted(told)] == list(range(5 * ENTRIES))
    assert {result for _, result in told} == {
        min(LONGEST, SIZE - position) for position in range(0, SIZE, PART)
    }


def test_what_is_too_long(ring: Ring, cold: int) -> None:
    assert not ring.bring(cold, 0, LONGEST + 1, teller([]), 0)
    assert ring.in_flight == ring.queued == 0


def test_what_cannot_be_read_says_why(ring: Ring, cold: int, tmp_path: Path) -> None:
    told: Told = []
    directory = os.open(tmp_path, os.O_RDONLY)
    closed = 1 << 20
    for number, (fd, position) in enumerate(
        [(directory, 0), (closed, 0), (cold, SIZE), (cold, SIZE - 10), (cold, 0)]
    ):
        assert ring.bring(fd, position, PART, teller(told), number)
    finish(ring)
    os.close(directory)
    assert sorted(told) == [(0, -errno.EISDIR), (1, -errno.EBADF), (2, 0), (3, 10), (4, PART)]


def test_who_is_told_may_fail(ring: Ring, cold: int, caplog: pytest.LogCaptureFixture) -> None:
    told: Told = []

    def fails(_what: object, _result: int) -> None:
        raise ZeroDivisionError

    assert ring.bring(cold, 0, PART, fails, None)
    assert ring.bring(cold, PART, PART, teller(told), 1)
    finish(ring)
    assert told == [(1, PART)]
    assert "ring.bug" in caplog.text


def test_it_rests_after_a_disk_that_let_it_wait(
    ring: Ring, cold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not been begun by then is given back, and nothing is taken for a while."""
    told: Told = []
    monkeypatch.setattr(ring_module, "STALLED_S", -1.0)
    calls, system_call = [], ring_module._system_call
    monkeypatch.setattr(
        ring_module, "_system_call", lambda *args: calls.append(args) or system_call(*args)
    )
    for number in range(3 * BATCH):
        assert ring.bring(cold, number * PART, PART, teller(told), number)
    ring.submit()
    assert len(calls) == 1
    assert not ring.queued
    assert told == [(number, -errno.EAGAIN) for number in range(BATCH, 3 * BATCH)]
    assert not ring.bring(cold, 0, PART, teller(told), 0)
    finish(ring)
    assert sorted(told)[:BATCH] == [(number, PART) for number in range(BATCH)]
    monkeypatch.setattr(ring_module, "STALLED_S", 60.0)
    ring._rests_until = 1e-9  # a second later
    told.clear()
    for number in range(3 * BATCH):
        assert ring.bring(cold, SIZE // 2 + number * PART, PART, teller(told), number)
    finish(ring)
    assert sorted(told) == [(number, PART) for number in range(3 * BATCH)]


@pytest.mark.parametrize("answer", [-1, 0])
def test_the_kernel_may_refuse(
    ring: Ring, cold: int, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    told: Told = []
    assert ring.bring(cold, 0, PART, teller(told), 0)
    with monkeypatch.context() as patch:
        patch.setattr(ring_module, "_system_call", lambda *_: answer)
        patch.setattr(ring_module.ctypes, "get_errno", lambda: errno.EBUSY)
        ring.submit()
    assert told == [(0, -errno.EBUSY if answer else -errno.EAGAIN)]
    assert ring.bring(cold, 0, PART, teller(told), 1)
    finish(ring)
    assert told[1:] == [(1, PART)]


@pytest.mark.usefixtures("ring")  # there is one
def test_closing_does_not_wait(pipe: tuple[int, int]) -> None:
    made = Ring.make()
    assert made is not None
    told: Told = []
    assert made.bring(pipe[0], 0, PART, teller(told), 0)
    made.submit()
    made.complete()
    assert made.in_flight == 1
    made.close()
    os.write(pipe[1], bytes(PART))
    assert told == []


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ring_module, "_system_call", lambda *_: -1)
        assert Ring.make() is None
    monkeypatch.setattr(ring_module.platform, "machine", lambda: "pdp11")
    assert Ring.make() is None
