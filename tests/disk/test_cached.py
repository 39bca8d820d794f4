"""The block cache: read once, forgotten when changed, bounded, and not the place of errors."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from nbdsrv.disk.cached import Cached
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.disk.reading import content
from tests.disk.slow_disk import Watched, image, opened

SIZE = (1 << 20) + 100
BLOCK = 65536


Open = Callable[..., Awaitable[tuple[Cached, Watched, bytes]]]


@pytest_asyncio.fixture
async def cached(tmp_path: Path, workers: Workers) -> AsyncIterator[Open]:
    """Opens one over a watched Disk; closed at the end, whatever happens."""
    disks: list[Cached] = []

    async def open_one(
        limit: int = 8 * BLOCK, *, writable: bool = False
    ) -> tuple[Cached, Watched, bytes]:
        golden = image(tmp_path, SIZE)
        inside = await opened(tmp_path, workers, writable=writable)
        disks.append(Cached(workers, inside, block=BLOCK, limit=limit))
        return disks[-1], inside, golden

    yield open_one
    for disk in disks:
        await disk.close()


async def test_a_block_is_fetched_once(cached: Open) -> None:
    disk, inside, golden = await cached()
    for at in (70_000, 66_000, 100_000, 131_071):
        assert await content(disk, at, 1) == golden[at : at + 1]
    assert inside.reads == [(BLOCK, BLOCK)]
    await disk.close()


async def test_neighbours_are_fetched_with_one_read(cached: Open) -> None:
    disk, inside, golden = await cached()
    await content(disk, 2 * BLOCK + 5, 10)
    assert await content(disk, 10, 5 * BLOCK) == golden[10 : 10 + 5 * BLOCK]
    assert inside.reads == [(2 * BLOCK, BLOCK), (0, 2 * BLOCK), (3 * BLOCK, 3 * BLOCK)]
    assert await content(disk, SIZE - 100, 100) == golden[-100:]
    assert inside.reads[3:] == [(1 << 20, 100)]
    await disk.close()


async def test_all_who_want_a_block_wait_for_one_read(cached: Open) -> None:
    disk, inside, golden = await cached()
    inside.gate.clear()
    reads = [asyncio.ensure_future(content(disk, at, 100)) for at in range(0, BLOCK - 100, 1000)]
    await asyncio.sleep(0)
    reads[0].cancel()  # who asked first has no special part in it
    await asyncio.sleep(0)
    inside.gate.set()
    found = await asyncio.gather(*reads[1:])
    assert found == [golden[at : at + 100] for at in range(1000, BLOCK - 100, 1000)]
    assert inside.reads == [(0, BLOCK)]
    await disk.close()


async def test_memory_is_bounded(cached: Open) -> None:
    disk, inside, golden = await cached(limit=3 * BLOCK)
    for index in (0, 1, 2, 0, 3, 0, 1):  # 3 takes the place of 1, which is fetched again
        at = index * BLOCK
        assert await content(disk, at, 10) == golden[at : at + 10]
        assert len(disk._shelf) <= 3
    assert [offset // BLOCK for offset, _ in inside.reads] == [0, 1, 2, 3, 1]
    inside.gate.clear()
    reads = [asyncio.ensure_future(content(disk, at, BLOCK)) for at in range(0, 1 << 20, BLOCK)]
    await asyncio.sleep(0)
    assert len(disk._shelf) <= 3
    inside.gate.set()
    assert b"".join(await asyncio.gather(*reads)) == golden[: 1 << 20]
    await disk.close()


async def test_a_long_read_washes_nothing_out(cached: Open) -> None:
    disk, inside, golden = await cached()
    await content(disk, 5, 10)
    assert await content(disk, 0, SIZE) == golden
    assert len(disk._shelf) == 1
    assert inside.reads == [(0, BLOCK), (BLOCK, SIZE - BLOCK)]
    await disk.close()


async def test_a_block_that_changes_while_it_is_fetched_is_not_kept(cached: Open) -> None:
    disk, inside, golden = await cached(writable=True)
    inside.gate.clear()
    read = asyncio.ensure_future(content(disk, 0, 100))
    await asyncio.sleep(0)
    write = asyncio.ensure_future(disk.write(50, memoryview(b"x" * 10)))
    await asyncio.sleep(0)
    inside.gate.set()
    await asyncio.gather(read, write)
    assert await content(disk, 0, 100) == golden[:50] + b"x" * 10 + golden[60:100]
    await disk.zero(0, 20, punch=True, fast=False)
    assert await content(disk, 0, 50) == bytes(20) + golden[20:50]
    await disk.close()


async def test_what_was_read_while_a_write_was_under_way_is_not_kept(cached: Open) -> None:
    disk, inside, golden = await cached(writable=True)
    inside.write_gate.clear()
    write = asyncio.ensure_future(disk.write(50, memoryview(b"x" * 10)))
    await asyncio.sleep(0)
    assert await content(disk, 0, 100) == golden[:100]
    inside.write_gate.set()
    await write
    assert await content(disk, 0, 100) == golden[:50] + b"x" * 10 + golden[60:100]
    await disk.close()


async def test_a_bad_sector_is_only_its_own_readers_trouble(cached: Open) -> None:
    disk, inside, golden = await cached()
    inside.bad = BLOCK + 5000
    assert await content(disk, BLOCK, 5000) == golden[BLOCK : BLOCK + 5000]
    assert await content(disk, BLOCK + 5001, 1000) == golden[BLOCK + 5001 : BLOCK + 6001]
    buffer = bytearray(4 * BLOCK)
    with pytest.raises(DiskError) as raised:
        await disk.read_into(0, memoryview(buffer))
    assert (raised.value.offset, raised.value.errno) == (BLOCK + 5000, errno.EIO)
    assert buffer[: BLOCK + 5000] == golden[: BLOCK + 5000]
    await disk.close()


async def test_closing_ends_what_is_being_fetched(cached: Open) -> None:
    disk, inside, _ = await cached()
    inside.gate.clear()
    read = asyncio.ensure_future(content(disk, 0, 100))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        closing = asyncio.ensure_future(disk.close())
        await asyncio.sleep(0)
        inside.gate.set()
        await closing
        await asyncio.gather(read, return_exceptions=True)
    assert len(disk._shelf) == 0
