"""Deadlines: late is an error in time, reads are tried again, changes are not."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from nbdsrv.disk.deadline import MAX_HANGING, Deadline
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.disk.reading import content
from tests.disk.slow_disk import Watched, image, opened

SIZE = 1 << 20


Open = Callable[..., Awaitable[tuple[Deadline, Watched, bytes]]]


@pytest_asyncio.fixture
async def bounded(tmp_path: Path, workers: Workers) -> AsyncIterator[Open]:
    """Opens one over a watched Disk; closed at the end, whatever happens."""
    disks: list[Deadline] = []

    async def open_one(timeout_s: float, *, retries: int = 2) -> tuple[Deadline, Watched, bytes]:
        golden = image(tmp_path, SIZE)
        inside = await opened(tmp_path, workers, writable=True)
        disks.append(Deadline(workers, inside, timeout_s, retries=retries))
        return disks[-1], inside, golden

    yield open_one
    for disk in disks:
        await disk.close()


async def test_a_read_is_tried_again_from_where_it_failed(bounded: Open) -> None:
    disk, inside, golden = await bounded(10)
    inside.bad, inside.failures = 5000, 2
    assert await content(disk, 0, SIZE) == golden
    assert inside.reads == [(0, SIZE), (5000, SIZE - 5000), (5000, SIZE - 5000)]
    assert disk.retried == 2
    await disk.close()


async def test_retries_are_bounded(bounded: Open) -> None:
    disk, inside, golden = await bounded(10, retries=1)
    inside.bad = 5000
    buffer = bytearray(SIZE)
    with pytest.raises(DiskError) as raised:
        await disk.read_into(0, memoryview(buffer))
    assert (raised.value.errno, raised.value.offset) == (errno.EIO, 5000)
    assert buffer[:5000] == golden[:5000]
    assert len(inside.reads) == 2
    await disk.close()


async def test_what_cannot_pass_is_not_tried_again(bounded: Open) -> None:
    disk, inside, _ = await bounded(10)
    with pytest.raises(DiskError):
        await content(disk, SIZE, 1)
    assert disk.retried == 0
    await disk.close()
    with pytest.raises(DiskError):
        await content(disk, 0, 1)
    assert inside.reads == [(0, 1)] * (1 + disk.retried)


@pytest.mark.parametrize("stubborn", [False, True], ids=["polite", "stubborn"])
async def test_late_reads_end_in_time_and_their_memory_is_theirs(
    stubborn: bool, bounded: Open
) -> None:
    disk, inside, golden = await bounded(0.05, retries=1)
    inside.stubborn = stubborn
    inside.gate.clear()
    buffer = bytearray(b"\xa5" * 4096)
    async with asyncio.timeout(5):
        with pytest.raises(DiskError, match=r"took longer than 0\.05 s") as raised:
            await disk.read_into(8192, memoryview(buffer))
    assert (raised.value.errno, raised.value.offset) == (errno.ETIMEDOUT, 8192)
    assert (disk.late, disk.retried) == (2, 1)
    inside.gate.set()
    assert await content(disk, 0, 4096) == golden[:4096]
    assert buffer == b"\xa5" * 4096
    await disk.close()


async def test_a_late_write_is_not_tried_again(bounded: Open, tmp_path: Path) -> None:
    disk, inside, _ = await bounded(0.05)
    inside.stubborn = True
    inside.gate.clear()
    data = bytearray(b"x" * 4096)
    with pytest.raises(DiskError, match="took longer"):
        await disk.write(0, memoryview(data))
    data[:] = b"y" * 4096  # the caller's own again
    inside.gate.set()
    await disk.close()
    assert inside.writes == [(0, 4096)]
    assert (tmp_path / "disk").read_bytes()[:4096] == b"x" * 4096


async def test_a_disk_on_which_all_hangs_is_given_up(bounded: Open) -> None:
    disk, inside, golden = await bounded(0.02, retries=0)
    inside.stubborn = True
    inside.gate.clear()
    reads = (content(disk, 0, 512) for _ in range(MAX_HANGING))
    await asyncio.gather(*reads, return_exceptions=True)
    with pytest.raises(DiskError, match="nothing more is tried"):
        await content(disk, 0, 512)
    assert len(inside.reads) == MAX_HANGING
    inside.gate.set()
    async with asyncio.timeout(5):
        while disk._hanging:
            await asyncio.sleep(0.001)
    assert await content(disk, 0, 512) == golden[:512]
    await disk.close()
