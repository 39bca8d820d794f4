"""Long work in a thread, a little at a time.

::

    async with a client's open:   |turn|turn|turn| ... result
                                       ^ cancelled here: the generator is closed and reads no more

Going through a whole file at open can take minutes. As one job it could not be interrupted, since
``Workers.run`` waits for its thread; so it is a generator that yields every few milliseconds.
"""

from collections.abc import Callable, Generator
from time import monotonic
from typing import TypeVar

from nbdsrv.disk.workers import Workers

__all__ = ["in_turns"]

T = TypeVar("T")

TURN_S = 0.1
"""Seconds of work that are done in one go."""


def _nothing(result: object) -> None:
    del result


async def in_turns(
    workers: Workers, steps: Generator[None, None, T], dispose: Callable[[T], None] = _nothing
) -> T:
    """Run a generator to its end in a thread, a little at a time; its result.

    Cancelled between turns, it is closed where it stands; cancelled in the last one, its result
    is given to ``dispose``.
    """
    results: list[T] = []
    try:
        while not results:
            await workers.run(_one_turn, steps, results)
    except BaseException:
        for result in results:
            dispose(result)
        raise
    finally:
        steps.close()
    return results[0]


def _one_turn(steps: Generator[None, None, T], results: list[T]) -> None:
    until = monotonic() + TURN_S
    try:
        next(steps)
        while monotonic() < until:
            next(steps)
    except StopIteration as end:
        results.append(end.value)
