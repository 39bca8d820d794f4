"""Progress: what moved is counted, what failed is not, and it is told at a bounded rate."""

from pathlib import Path

import pytest

from nbdsrv.disk.progress import Moved, Progress
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from tests.disk.reading import content
from tests.disk.slow_disk import image, opened

SIZE = 1 << 20


async def test_bytes_are_counted_and_the_last_is_told(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path, SIZE)
    told: list[tuple[int, int]] = []
    inside = await opened(tmp_path, workers, writable=True)
    disk = Progress(workers, inside, lambda moved: told.append((moved.read, moved.written)), 3600)
    for at in range(0, 100_000, 1000):
        await content(disk, at, 1000)
    await disk.write(0, memoryview(bytes(5)))
    await disk.zero(0, 4096, punch=True, fast=False)
    assert told == [(1000, 0)]
    await disk.close()
    await disk.close()
    assert told == [(1000, 0), (100_000, 4101)]


async def test_without_an_interval_all_is_told(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path, SIZE)
    told: list[int] = []
    disk = Progress(workers, await opened(tmp_path, workers), lambda m: told.append(m.read), 0)
    for _ in range(5):
        await content(disk, 0, 10)
    await disk.close()
    assert told == [10, 20, 30, 40, 50]


async def test_what_failed_has_not_moved(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path, SIZE)
    inside = await opened(tmp_path, workers)
    disk = Progress(workers, inside, lambda _: None)
    inside.bad = 0
    with pytest.raises(DiskError):
        await content(disk, 0, 10)
    assert disk.moved == Moved(0, 0)
    await disk.close()
