"""Worker threads: results, exceptions, cancellation, bounds, the end."""

import asyncio
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future

import pytest

from nbdsrv.disk.workers import Workers
from tests.disk.threads import running_workers


class Gate:
    """Work that lasts until it is let through."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        self.passed = 0

    def work(self) -> str:
        self.entered.set()
        assert self._open.wait(30)
        self.passed += 1
        return "through"

    def open(self) -> None:
        self._open.set()


async def entered(gate: Gate) -> None:
    async with asyncio.timeout(10):
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("nbdsrv-")]


async def test_results_come_back(workers: Workers) -> None:
    assert await workers.run(divmod, 17, 5) == (3, 2)
    assert await workers.run({1: 2}.get, 3) is None
    found = await asyncio.gather(*(workers.run(pow, at, 2) for at in range(500)))
    assert found == [at * at for at in range(500)]
    assert workers.outstanding == 0


async def test_work_is_done_on_another_thread_and_answered_on_ours(workers: Workers) -> None:
    assert await workers.run(threading.get_ident) != threading.get_ident()
    answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    workers.submit(int, "7", done=lambda _, __: answered.set_result(threading.get_ident()))
    assert await answered == threading.get_ident()


async def test_exceptions_come_back_as_they_are(workers: Workers) -> None:
    error = OSError(5, "of this very disk")

    def fail() -> None:
        raise error

    with pytest.raises(OSError, match="of this very disk") as raised:
        await workers.run(fail)
    assert raised.value is error
    with pytest.raises(SystemExit):
        await workers.run(sys.exit, 3)
    assert await workers.run(int, "1") == 1


async def test_submit_hands_over_result_or_error(workers: Workers) -> None:
    outcomes: asyncio.Queue[tuple[object, BaseException | None]] = asyncio.Queue()
    workers.submit(int, "12", done=lambda *outcome: outcomes.put_nowait(outcome))
    assert await outcomes.get() == (12, None)
    workers.submit(int, "twelve", done=lambda *outcome: outcomes.put_nowait(outcome))
    result, error = await outcomes.get()
    assert result is None
    assert isinstance(error, ValueError)


STOP_ITERATION = """
import asyncio
from tests.disk.threads import running_workers

async def main():
    async with running_workers(1) as workers:
        try:
            await workers.run(next, iter(()))
        except RuntimeError:
            print("raised")
        print(await workers.run(int, "1"))

asyncio.run(main())
"""


def test_an_exception_no_future_can_carry_does_not_hang() -> None:
    # In a process of its own: what hangs here cannot be cancelled.
    command = [sys.executable, "-c", STOP_ITERATION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    assert (done.stdout, done.stderr) == ("raised\n1\n", "")


async def test_cancellation_waits_for_the_thread(workers: Workers) -> None:
    gate = Gate()
    task = asyncio.ensure_future(workers.run(gate.work))
    await entered(gate)
    for _ in range(3):  # impatience changes nothing
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.passed == 1


async def test_a_cancelled_job_in_the_queue_is_waited_for_too() -> None:
    async with running_workers(1) as workers:
        gate, ran = Gate(), threading.Event()
        first = asyncio.ensure_future(workers.run(gate.work))
        await entered(gate)
        second = asyncio.ensure_future(workers.run(ran.set))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0.01)
        assert not second.done()
        gate.open()
        assert await first == "through"
        with pytest.raises(asyncio.CancelledError):
            await second
        assert ran.is_set()
        assert workers.outstanding == 0


async def test_a_timeout_is_a_timeout_once_the_thread_is_done(workers: Workers) -> None:
    gate = Gate()
    asyncio.get_running_loop().call_later(0.05, gate.open)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await workers.run(gate.work)
    assert gate.passed == 1


async def test_the_error_of_work_nobody_waits_for_is_not_reported_as_lost(
    workers: Workers,
) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    gate = Gate()

    def fail() -> None:
        gate.work()
        raise OSError(5, "nobody is interested")

    task = asyncio.ensure_future(workers.run(fail))
    await entered(gate)
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    assert await workers.run(int, "1") == 1
    assert complaints == []


async def test_threads_are_bounded_and_started_when_needed() -> None:
    before = len(our_threads())
    async with running_workers(4) as workers:
        assert len(our_threads()) == before
        await workers.run(int, "1")
        assert len(our_threads()) == before + 1
        gates = [Gate() for _ in range(20)]
        tasks = [asyncio.ensure_future(workers.run(gate.work)) for gate in gates]
        for gate in gates[:4]:
            await entered(gate)
        await asyncio.sleep(0.02)
        assert sum(gate.entered.is_set() for gate in gates) == 4
        assert len(our_threads()) == before + 4
        for gate in gates:
            gate.open()
        assert await asyncio.gather(*tasks) == ["through"] * 20
    assert len(our_threads()) == before


async def test_a_blocked_thread_does_not_hold_up_the_others() -> None:
    async with running_workers(2) as workers:
        gate = Gate()
        blocked = asyncio.ensure_future(workers.run(gate.work))
        await entered(gate)
        async with asyncio.timeout(10):
            for number in range(200):
                assert await workers.run(int, str(number)) == number
        gate.open()
        await blocked


async def test_close_finishes_what_is_queued_and_frees_its_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    done: list[int] = []
    workers = Workers(2)
    for number in range(50):
        workers.submit(done.append, number, done=lambda _, __: None)
    workers.close()
    assert sorted(done) == list(range(50))
    assert os.listdir("/proc/self/fd") == before


async def test_an_idle_thread_keeps_no_buffer_alive(workers: Workers) -> None:
    work: Future[None] = Future()  # something a weak reference can be made to
    seen = weakref.ref(work)
    await workers.run(work.done)
    del work
    async with asyncio.timeout(5):
        while seen() is not None:
            await asyncio.sleep(0.001)


async def test_looking_up_does_not_wait_behind_work_that_waits_for_a_disk() -> None:
    async with running_workers(2) as workers:
        gate = Gate()
        busy = [asyncio.ensure_future(workers.run(gate.work)) for _ in range(10)]
        await entered(gate)
        async with asyncio.timeout(10):
            assert await workers.look_up(int, "7") == 7
            with pytest.raises(ValueError, match="seven"):
                await workers.look_up(int, "seven")
        gate.open()
        assert await asyncio.gather(*busy) == ["through"] * 10


async def test_a_server_has_its_threads_before_the_first_burst(workers: Workers) -> None:
    workers.muster()
    mustered = len(our_threads())
    assert mustered >= 16
    gates = [Gate() for _ in range(16)]
    tasks = [asyncio.ensure_future(workers.run(gate.work)) for gate in gates]
    for gate in gates:
        await entered(gate)
    assert len(our_threads()) == mustered
    workers.muster()
    assert len(our_threads()) == mustered
    for gate in gates:
        gate.open()
    assert await asyncio.gather(*tasks) == ["through"] * 16
