"""Connections per host: never more than allowed, first ones first, in the order of asking."""

import asyncio
import errno
import random
import threading
from collections.abc import Callable

import pytest

from nbdsrv.errors import DiskError
from nbdsrv.net.client_budget import Connections, Lease, host_of
from protocol.uri import parse

HOST = "xcp:10809"


async def granted(connections: Connections, limit: int, count: int) -> list[Lease]:
    """As many first ones, all connected."""
    leases = []
    for _ in range(count):
        leases.append(await connections.lease(HOST, limit, within_s=1))
        leases[-1].connected()
    return leases


def asking(
    connections: Connections,
    limit: int,
    *,
    within_s: float = 10,
    give_back: Callable[[], None] | None = None,
) -> "asyncio.Task[Lease]":
    work = connections.lease(HOST, limit, within_s=within_s, give_back=give_back)
    return asyncio.get_running_loop().create_task(work)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_without_a_limit_everybody_is_let_in_at_once() -> None:
    connections = Connections()
    leases = [await connections.lease(HOST, 0, within_s=0) for _ in range(100)]
    assert connections.count(HOST) == 100
    for lease in leases:
        lease.release()
        lease.release()
    assert connections.count(HOST) == 0


async def test_the_deadline_names_the_host_and_the_limit() -> None:
    connections = Connections()
    held = await granted(connections, 2, 2)
    with pytest.raises(DiskError, match=r"xcp:10809: all 2 .* waited 0\.05 s") as raised:
        await connections.lease(HOST, 2, within_s=0.05)
    assert raised.value.errno == errno.ETIMEDOUT
    held[0].release()
    (await connections.lease(HOST, 2, within_s=0.05)).release()


async def test_first_come_first_served() -> None:
    connections = Connections()
    [held] = await granted(connections, 1, 1)
    order = []

    async def one(number: int) -> None:
        lease = await connections.lease(HOST, 1, within_s=5)
        order.append(number)
        lease.release()

    tasks = []
    for number in range(20):
        tasks.append(asyncio.ensure_future(one(number)))
        await turns()
    held.release()
    await asyncio.gather(*tasks)
    assert order == list(range(20))


async def test_a_first_connection_comes_before_further_ones() -> None:
    connections = Connections()
    [held] = await granted(connections, 1, 1)
    further = asking(connections, 1, give_back=lambda: None)
    await turns()
    first = asking(connections, 1)
    await turns()
    held.release()
    lease = await first
    assert not further.done()
    lease.release()
    (await further).release()


async def test_somebody_with_several_is_asked_for_one_and_only_one() -> None:
    connections = Connections()
    pressed: list[Lease] = []
    [mine] = await granted(connections, 4, 1)
    extras = []
    for _ in range(3):
        lease = await connections.lease(
            HOST, 4, within_s=0, give_back=lambda: pressed.append(extras[-1])
        )
        lease.connected()
        extras.append(lease)
    waiting = asking(connections, 4)
    await turns()
    assert pressed == [extras[-1]]
    extras[-1].release()
    (await waiting).connected()
    assert len(pressed) == 1
    assert connections.count(HOST) == 4
    mine.release()


async def test_one_connection_is_made_at_a_time_where_they_are_counted() -> None:
    connections = Connections()
    lease = await connections.lease(HOST, 16, within_s=1)
    second = asking(connections, 16)
    await turns()
    assert not second.done()
    lease.connected()
    await second
    third = asking(connections, 16)
    await turns()
    (await second).release()  # it could not connect
    await third


async def test_the_strictest_limit_holds_for_all() -> None:
    connections = Connections()
    held = await granted(connections, 2, 2)
    generous = asking(connections, 0)
    await turns()
    assert not generous.done()
    held[0].release()
    await generous
    assert connections.try_lease(HOST, 100) is None


async def test_hosts_are_counted_apart() -> None:
    connections = Connections()
    await granted(connections, 1, 1)
    other = await connections.lease("other:1", 1, within_s=0.01)
    assert (connections.count(HOST), connections.count("other:1")) == (1, 1)
    other.release()


async def test_cancelled_in_the_queue_or_just_when_it_was_granted() -> None:
    connections = Connections()
    [held] = await granted(connections, 1, 1)
    tasks = [asking(connections, 1) for _ in range(3)]
    await turns()
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    held.release()
    tasks[1].cancel()  # it has been told, but has not woken yet
    await asyncio.wait(tasks[1:2])
    (await tasks[2]).release()
    assert connections.count(HOST) == 0


async def test_whatever_happens_the_limit_holds_and_nobody_is_forgotten() -> None:
    connections, chance, limit = Connections(), random.Random(4), 5
    served = 0

    async def one() -> None:
        nonlocal served
        give_back = (lambda: None) if chance.random() < 0.4 else None
        lease = await connections.lease(HOST, limit, within_s=20, give_back=give_back)
        assert connections.count(HOST) <= limit
        served += 1
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        lease.connected()
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        lease.release()

    tasks = [asyncio.ensure_future(one()) for _ in range(300)]
    cancelled = chance.sample(tasks, 60)
    for task in cancelled:
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served >= 240
    assert connections.count(HOST) == 0


async def test_disks_of_another_event_loop_share_the_budget() -> None:
    connections = Connections()
    [held] = await granted(connections, 1, 1)
    got: list[int] = []

    async def elsewhere() -> None:
        lease = await connections.lease(HOST, 1, within_s=5)
        got.append(connections.count(HOST))
        lease.release()

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    await asyncio.sleep(0.05)
    assert not got
    held.release()
    await asyncio.to_thread(thread.join)
    assert got == [1]


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("nbd://XCP.example/a?x-y=1", "xcp.example:10809"),
        ("nbds://[::1]:99/", "[::1]:99"),
        ("nbd+unix:///x?socket=/run/s", "unix:/run/s"),
    ],
)
async def test_what_a_host_is(uri: str, host: str) -> None:
    assert host_of(parse(uri)) == host
