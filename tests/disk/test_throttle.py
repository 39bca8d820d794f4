"""The pace: together no faster than the rate, no slower either, fair, and cancelled for nothing."""

import asyncio
from pathlib import Path

import pytest

from nbdsrv.disk.throttle import BURST_S, Rate, Throttle
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from tests.disk.reading import content
from tests.disk.slow_disk import image, opened

SIZE = 1 << 20
SLACK_S = 1.0
"""Seconds a busy machine may add."""


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_several_disks_share_a_rate(tmp_path: Path, workers: Workers) -> None:
    golden = image(tmp_path, SIZE)
    rate = Rate(10 * SIZE)
    disks = [Throttle(workers, await opened(tmp_path, workers), rate) for _ in range(3)]
    begin = now()
    found = await asyncio.gather(*(content(disk, 0, SIZE) for disk in disks))
    assert 3 * SIZE / rate.bytes_per_s - BURST_S <= now() - begin < 0.3 + SLACK_S
    assert found == [golden] * 3
    for disk in disks:
        await disk.close()


async def test_a_long_read_does_not_shut_out_a_short_one(tmp_path: Path, workers: Workers) -> None:
    size = 6 << 20
    image(tmp_path, size)
    rate = Rate(5 << 20)
    disk = Throttle(workers, await opened(tmp_path, workers), rate)
    long = asyncio.ensure_future(content(disk, 0, size))
    await asyncio.sleep(0)
    await content(disk, 0, 512)
    assert not long.done()
    long.cancel()
    await asyncio.wait([long])
    await disk.close()


async def test_who_is_cancelled_takes_nothing(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path, SIZE)
    disk = Throttle(workers, await opened(tmp_path, workers, writable=True), Rate(SIZE / 100))
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await disk.write(0, memoryview(bytes(SIZE)))
    begin = now()
    await content(disk, 0, 100)
    assert now() - begin < SLACK_S
    await disk.close()


async def test_what_moves_no_bytes_is_not_held_up(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path, SIZE)
    disk = Throttle(workers, await opened(tmp_path, workers, writable=True), Rate(1))
    async with asyncio.timeout(10):
        await disk.zero(0, SIZE, punch=True, fast=False)
        await disk.extents(0, SIZE)
        await disk.flush()
    await disk.close()


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_that_moves_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError):
        Rate(rate)
