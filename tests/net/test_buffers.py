"""Borrowed memory: lent again, bounded, and waited for."""

import asyncio

import pytest

from nbdsrv.net.buffers import DEFAULT_BUDGET, KEPT_FREE, MIN_CLASS, Buffers

MIB = 1 << 20


@pytest.mark.parametrize("length", [0, 1, 5, MIN_CLASS, MIN_CLASS + 1, 100_000, MIB, 32 * MIB])
def test_at_least_what_was_asked_for(length: int) -> None:
    buffers = Buffers()
    buffer = buffers.borrow(length)
    assert len(buffer.data) == len(buffer.block) == buffer.size >= max(length, MIN_CLASS)
    assert buffer.size & (buffer.size - 1) == 0
    assert len(buffer.view(length)) == length
    assert buffers.lent == buffer.size
    buffers.release(buffer)
    assert buffers.lent == 0


def test_a_view_is_the_buffers_own_memory() -> None:
    buffer = Buffers().borrow(10)
    buffer.view(4)[:] = b"data"
    assert bytes(buffer.block[:4]) == b"data"


def test_what_came_back_is_lent_again() -> None:
    buffers = Buffers()
    first = buffers.borrow(200_000)
    buffers.release(first)
    assert buffers.borrow(262_144) is first
    other = buffers.borrow(200_000)
    assert other is not first


def test_no_two_borrowers_share() -> None:
    buffers = Buffers()
    lent = [buffers.borrow(70_000) for _ in range(20)]
    for buffer in lent[::2]:
        buffers.release(buffer)
    lent = lent[1::2] + [buffers.borrow(70_000) for _ in range(15)]
    assert len({id(buffer.block) for buffer in lent}) == len(lent) == 25


def test_what_is_kept_for_later_is_bounded() -> None:
    buffers = Buffers()
    lent = [buffers.borrow(4 * MIB) for _ in range(20)]
    for buffer in lent:
        buffers.release(buffer)
    again = [buffers.borrow(4 * MIB) for _ in range(20)]
    kept = sum(any(buffer is other for other in lent) for buffer in again)
    assert kept == KEPT_FREE // (4 * MIB) == 8


def test_the_budget_holds_eight_of_the_largest_requests() -> None:
    buffers = Buffers()
    for _ in range(8):
        assert buffers.affords(32 * MIB)
        buffers.borrow(32 * MIB)
    assert not buffers.affords(1)
    assert buffers.lent == DEFAULT_BUDGET


async def test_who_cannot_afford_it_waits_until_half_is_back() -> None:
    buffers = Buffers(8 * MIB)
    lent = [buffers.borrow(MIB) for _ in range(8)]
    waiting = asyncio.ensure_future(buffers.afford(MIB))
    await asyncio.sleep(0)
    assert buffers.contended
    for buffer in lent[:3]:
        buffers.release(buffer)
    await asyncio.sleep(0)
    assert not waiting.done()
    buffers.release(lent[3])
    await asyncio.wait_for(waiting, 5)
    assert not buffers.contended
    assert buffers.affords(MIB)


async def test_who_can_afford_it_does_not_wait() -> None:
    buffers = Buffers(8 * MIB)
    await asyncio.wait_for(buffers.afford(8 * MIB), 5)
    assert not buffers.contended


async def test_all_who_wait_get_their_turn() -> None:
    buffers = Buffers(4 * MIB)
    served: list[int] = []

    async def borrower(number: int) -> None:
        await buffers.afford(2 * MIB)
        buffer = buffers.borrow(2 * MIB)
        assert buffers.lent <= buffers.budget
        await asyncio.sleep(0)
        buffers.release(buffer)
        served.append(number)

    async with asyncio.timeout(20):
        await asyncio.gather(*(borrower(number) for number in range(50)))
    assert sorted(served) == list(range(50))
    assert buffers.lent == 0


async def test_a_cancelled_borrower_hinders_nobody() -> None:
    buffers = Buffers(2 * MIB)
    lent = buffers.borrow(2 * MIB)
    first = asyncio.ensure_future(buffers.afford(MIB))
    second = asyncio.ensure_future(buffers.afford(MIB))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    buffers.release(lent)
    await asyncio.wait_for(second, 5)
    assert first.cancelled()
