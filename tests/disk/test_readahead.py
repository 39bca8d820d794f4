"""Read-ahead: who reads on finds it there; who does not is left alone; memory is bounded."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from nbdsrv.disk.readahead import ReadAhead
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.disk.reading import content
from tests.disk.slow_disk import Watched, image, opened

CHUNK = 65536
SIZE = 64 * CHUNK + 100


Open = Callable[..., Awaitable[tuple[ReadAhead, Watched, bytes]]]


@pytest_asyncio.fixture
async def ahead(tmp_path: Path, workers: Workers) -> AsyncIterator[Open]:
    """Opens one over a watched Disk; closed at the end, whatever happens."""
    disks: list[ReadAhead] = []

    async def open_one(
        window: int = 16 * CHUNK, *, writable: bool = False
    ) -> tuple[ReadAhead, Watched, bytes]:
        golden = image(tmp_path, SIZE)
        inside = await opened(tmp_path, workers, writable=writable)
        disks.append(ReadAhead(workers, inside, chunk=CHUNK, window=window))
        return disks[-1], inside, golden

    yield open_one
    for disk in disks:
        await disk.close()


async def test_a_sequential_reader_is_served_from_the_window(ahead: Open) -> None:
    disk, inside, golden = await ahead()
    step = CHUNK // 4
    for at in range(0, SIZE, step):
        count = min(step, SIZE - at)
        assert await content(disk, at, count) == golden[at : at + count]
    own = [read for read in inside.reads if read[1] == step]
    fetched = [offset for offset, count in inside.reads if count != step]
    assert len(own) <= 8, "after a few reads everything had been there"
    assert fetched == sorted(set(fetched)), "each chunk once, in order"
    assert sum(count for _, count in inside.reads) <= SIZE + CHUNK
    await disk.close()


async def test_the_window_is_filled_while_nobody_waits(ahead: Open) -> None:
    disk, inside, golden = await ahead()
    for at in range(0, 6 * CHUNK, CHUNK):
        await content(disk, at, CHUNK)
    async with asyncio.timeout(5):
        while len(inside.reads) < 6 + 8:
            await asyncio.sleep(0.001)
    inside.gate.clear()  # from here on the disk answers nothing
    async with asyncio.timeout(5):
        at = 6 * CHUNK
        assert await content(disk, at, 4 * CHUNK) == golden[at : at + 4 * CHUNK]
    inside.gate.set()
    await disk.close()


async def test_random_readers_cause_nothing(ahead: Open) -> None:
    disk, inside, _ = await ahead()
    places = [(at * 7919) % 60 * CHUNK for at in range(50)]
    for at in places:
        await content(disk, at, 4096)
    assert inside.reads == [(at, 4096) for at in places]
    await disk.close()


async def test_two_readers_are_told_apart(ahead: Open) -> None:
    disk, inside, golden = await ahead()
    for at in range(0, 20 * CHUNK, CHUNK):
        for start in (0, 40 * CHUNK):
            begin = start + at
            assert await content(disk, begin, CHUNK) == golden[begin : begin + CHUNK]
            assert len(disk._shelf) <= 16
    assert len(inside.reads) == len(set(inside.reads)), "nothing was read twice"
    await disk.close()


async def test_memory_is_bounded_and_may_be_short(ahead: Open) -> None:
    disk, _, golden = await ahead(window=2 * CHUNK)
    for at in range(0, 30 * CHUNK, 10_000):
        assert await content(disk, at, 10_000) == golden[at : at + 10_000]
        assert len(disk._shelf) <= 2
    await disk.close()


async def test_what_is_written_into_the_window_is_read(ahead: Open) -> None:
    disk, _, golden = await ahead(writable=True)
    model = bytearray(golden)
    for at in range(0, 40 * CHUNK, CHUNK):
        assert await content(disk, at, CHUNK) == model[at : at + CHUNK]
        there = at + CHUNK + 5
        await disk.write(there, memoryview(b"new"))
        model[there : there + 3] = b"new"
    await disk.close()


async def test_an_error_ahead_waits_for_its_reader(ahead: Open) -> None:
    disk, inside, golden = await ahead()
    bad = 20 * CHUNK + 777
    inside.bad = bad
    at = 0
    while at + CHUNK <= bad:
        assert await content(disk, at, CHUNK) == golden[at : at + CHUNK]
        at += CHUNK
    with pytest.raises(DiskError) as raised:
        await content(disk, at, CHUNK)
    assert (raised.value.offset, raised.value.errno) == (bad, errno.EIO)
    assert await content(disk, at, 777) == golden[at : at + 777]
    await disk.close()
