"""Bytes in flight: many on a long way, few on a short one, and never more than allowed."""

import asyncio
import time
from contextlib import AsyncExitStack

from nbdsrv.source.nbd_depth import LEAST, MOST, Depth

PIECE = 1 << 20
MIB = 1 << 20


class Way:
    """A server ``delay_s`` away that answers ``rate`` bytes a second."""

    def __init__(self, delay_s: float, rate: float) -> None:
        self.delay_s, self.rate = delay_s, rate
        self._free = 0.0

    async def carry(self, length: int) -> None:
        now = time.monotonic()
        self._free = max(self._free, now) + length / self.rate
        await asyncio.sleep(self._free - now + self.delay_s)


async def traffic(depth: Depth, way: Way, seconds: float, askers: int = 128) -> None:
    ends = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < ends:
            await depth.enter(PIECE)
            try:
                assert depth.in_flight <= MOST
                await way.carry(PIECE)
                depth.answered(PIECE)
            finally:
                depth.leave(PIECE)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(askers):
            tasks.create_task(ask())


async def test_a_long_way_is_filled() -> None:
    depth = Depth()
    await traffic(depth, Way(0.05, 4e9), 2.0)
    assert depth.bytes >= MOST // 2  # half of it may be on trial
    assert depth.in_flight == 0


async def test_a_short_one_is_not() -> None:
    depth = Depth()
    await traffic(depth, Way(0.0001, 500e6), 1.0)
    assert depth.bytes <= 2 * LEAST  # a trial may be under way


async def test_only_as_far_as_the_rate_rises() -> None:
    """100 MB/s over 50 ms are 5 MB: more would only queue up."""
    depth = Depth()
    await traffic(depth, Way(0.05, 100e6), 2.5)
    assert LEAST <= depth.bytes <= 16 * MIB


async def test_less_will_do_once_the_way_is_short_again() -> None:
    depth, way = Depth(), Way(0.05, 1e9)
    await traffic(depth, way, 1.2)
    assert depth.bytes >= 32 * MIB
    way.delay_s = 0.0005
    await traffic(depth, way, 3.0)
    assert depth.bytes <= 16 * MIB


async def test_who_asks_for_little_changes_nothing() -> None:
    depth = Depth()
    await traffic(depth, Way(0.01, 1e9), 0.5, askers=1)
    assert depth.bytes == LEAST


async def test_small_requests_do_not_wait() -> None:
    depth = Depth()
    await depth.enter(LEAST)
    async with asyncio.timeout(1):
        await depth.enter(4096)
    assert depth.in_flight == LEAST + 4096


async def test_in_order_and_cancelled() -> None:
    depth = Depth()
    await depth.enter(LEAST)
    order: list[int] = []

    async def one(number: int, length: int) -> None:
        await depth.enter(length)
        order.append(number)

    tasks = []
    for number, length in enumerate([LEAST, PIECE, PIECE, PIECE]):
        tasks.append(asyncio.ensure_future(one(number, length)))
        await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    depth.leave(LEAST)
    tasks[0].cancel()  # let in just now
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [2, 3]
    assert depth.in_flight == 2 * PIECE


async def test_a_request_larger_than_everything_goes_alone() -> None:
    depth = Depth()
    async with asyncio.timeout(1), AsyncExitStack():
        await depth.enter(2 * MOST)
    assert depth.in_flight == 2 * MOST
