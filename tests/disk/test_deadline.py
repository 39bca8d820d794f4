"""Deadlines: late is an error in time, reads are tried again, changes are not."""

import asyncio
import errno
from pathlib import Path

import pytest

from nbdsrv.disk.deadline import MAX_HANGING, Deadline
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.disk.reading import content
from tests.disk.slow_disk import Watched, image, opened

SIZE = 1 << 20


async def bounded(
    folder: Path, workers: Workers, timeout_s: float, *, retries: int = 2
) -> tuple[Deadline, Watched, bytes]:
    golden = image(folder, SIZE)
    inside = await opened(folder, workers, writable=True)
    return Deadline(workers, inside, timeout_s, retries=retries), inside, golden


async def test_a_read_is_tried_again_from_where_it_failed(tmp_path: Path, workers: Workers) -> None:
    disk, inside, golden = await bounded(tmp_path, workers, 10)
    inside.bad, inside.failures = 5000, 2
    assert await content(disk, 0, SIZE) == golden
    assert inside.reads == [(0, SIZE), (5000, SIZE - 5000), (5000, SIZE - 5000)]
    assert disk.retried == 2
    await disk.close()


async def test_retries_are_bounded(tmp_path: Path, workers: Workers) -> None:
    disk, inside, golden = await bounded(tmp_path, workers, 10, retries=1)
    inside.bad = 5000
    buffer = bytearray(SIZE)
    with pytest.raises(DiskError) as raised:
        await disk.read_into(0, memoryview(buffer))
    assert (raised.value.errno, raised.value.offset) == (errno.EIO, 5000)
    assert buffer[:5000] == golden[:5000]
    assert len(inside.reads) == 2
    await disk.close()


async def test_what_cannot_pass_is_not_tried_again(tmp_path: Path, workers: Workers) -> None:
    disk, inside, _ = await bounded(tmp_path, workers, 10)
    with pytest.raises(DiskError):
        await content(disk, SIZE, 1)
    assert disk.retried == 0
    await disk.close()
    with pytest.raises(DiskError):
        await content(disk, 0, 1)
    assert inside.reads == [(0, 1)] * (1 + disk.retried)


@pytest.mark.parametrize("stubborn", [False, True], ids=["polite", "stubborn"])
async def test_late_reads_end_in_time_and_their_memory_is_theirs(
    stubborn: bool, tmp_path: Path, workers: Workers
) -> None:
    disk, inside, golden = await bounded(tmp_path, workers, 0.05, retries=1)
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


async def test_a_late_write_is_not_tried_again(tmp_path: Path, workers: Workers) -> None:
    disk, inside, _ = await bounded(tmp_path, workers, 0.05)
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


async def test_a_disk_on_which_all_hangs_is_given_up(tmp_path: Path, workers: Workers) -> None:
    disk, inside, golden = await bounded(tmp_path, workers, 0.02, retries=0)
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
