"""Crews: every job once, none behind another that takes long, no thread woken for nothing."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from nbdsrv.disk.crew import Crew, Results

PATIENCE_S = 30.0


@pytest.fixture
def results() -> Iterator[Results]:
    results = Results()
    yield results
    results.close()


def drain(results: Results, count: int) -> list[object]:
    """What ``count`` jobs have returned, as it comes."""
    found: list[object] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        results.begin()
        while (finished := results.take()) is not None:
            crew, _, result, error = finished
            assert error is None
            crew.outstanding -= 1
            found.append(result)
        time.sleep(0)
    return found


def nobody(result: object, error: BaseException | None) -> None:
    """Results are looked at by the test."""


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_job_is_done_once(results: Results, threads: int) -> None:
    crew = Crew("crew", threads, results)
    found: list[object] = []
    for burst in range(400):  # threads fall idle between some, and are busy at others
        numbers = range(burst * 9, burst * 9 + burst % 9)
        for number in numbers:
            crew.put((int, (number,), nobody))
        if burst % 3:
            found += drain(results, len(numbers))
    done = 400 // 9 * sum(range(9)) + sum(range(400 % 9))
    found += drain(results, done - len(found))
    crew.close()
    assert crew.outstanding == 0
    assert sorted(found) == sorted(n for b in range(400) for n in range(b * 9, b * 9 + b % 9))


def test_no_job_waits_for_one_that_takes_long_while_a_thread_is_idle(results: Results) -> None:
    crew = Crew("crew", 4, results)
    crew.muster(4)
    for _ in range(300):
        gates = [threading.Event() for _ in range(3)]
        for gate in gates:
            crew.put((gate.wait, (PATIENCE_S,), nobody))
        crew.put((str, ("short",), nobody))
        assert drain(results, 1) == ["short"]
        for gate in gates:
            gate.set()
        assert drain(results, 3) == [True] * 3
    crew.close()


def test_the_thread_that_fell_idle_last_is_woken_first(results: Results) -> None:
    crew = Crew("crew", 8, results)
    crew.muster(8)
    time.sleep(0.05)  # they all wait
    seen = set()
    for _ in range(50):
        crew.put((threading.get_ident, (), nobody))
        seen.update(drain(results, 1))
        time.sleep(0.001)  # it falls idle again
    crew.close()
    assert len(seen) <= 2


def test_the_loop_is_told_once_until_it_looks(results: Results) -> None:
    crew = Crew("crew", 2, results)
    for number in range(20):
        crew.put((int, (number,), nobody))
    crew.close()  # all of them are done
    assert os.eventfd_read(results.eventfd) == 1
    assert len(drain(results, 20)) == 20


def test_closing_does_what_is_queued_first(results: Results) -> None:
    crew = Crew("crew", 2, results)
    for number in range(200):
        crew.put((int, (number,), nobody))
    crew.close()
    assert sorted(drain(results, 200)) == list(range(200))
