"""Long work in a thread, a little at a time.

::

    async with a client's open:   |turn|turn|turn| ... result
                                       ^ cancelled here: the generator is closed and reads no more

Going through a whole file at open can take minutes. As one job it could not be interrupted, since
``Workers.run`` waits for its thread; so it is a generator that yields every few milliseconds.
"""

from collections.abc import Generator
from time import monotonic
from typing import TypeVar

from nbdsrv.disk.workers import Workers

__all__ = ["in_turns"]

T = TypeVar("T")

TURN_S = 0.1
"""Seconds of work that are done in one go."""


async def in_turns(workers: Workers, steps: Generator[None, None, T]) -> T:
    """Run a generator to its end in a thread, a little at a time; its result.

    Cancelled between turns, it is closed where it stands.
    """
    try:
        while True:
            result = await workers.run(_one_turn, steps)
            if result:
                return result[0]
    finally:
        steps.close()


def _one_turn(steps: Generator[None, None, T]) -> tuple[()] | tuple[T]:
    until = monotonic() + TURN_S
    try:
        while monotonic() < until:
            next(steps)
    except StopIteration as end:
        return (end.value,)
    return ()
