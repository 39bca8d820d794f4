"""An event, and no longer."""

import asyncio

from nbdsrv.disk.patience import set_within


async def test_the_event_or_the_end() -> None:
    event = asyncio.Event()
    assert not await set_within(event, 0.01)
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await set_within(event, 60)
    assert await set_within(event, 0)


async def test_a_cancellation_that_comes_with_the_event() -> None:
    event = asyncio.Event()
    task = asyncio.create_task(set_within(event, 60))
    await asyncio.sleep(0.01)
    event.set()
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
