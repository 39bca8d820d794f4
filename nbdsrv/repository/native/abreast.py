"""Asking a store for many things at a time, and taking the answers in their order. Blocking.

::

    items    a  b  c  d  e  f  g ...     taken as there is room: what yields them may ask, too
                └──┴──┴──┘               on their way, or here and waiting for their turn
    answers  a, b, c, ...

A repository on S3 is a round trip for each object: a thousand points one behind the other are half
a minute in which nothing is done but wait. In a directory it is the work that takes the time, and
the interpreter does one thing at a time anyway.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from nbdsrv.errors import DiskError
from nbdsrv.store.store import Store, Stored

__all__ = ["THREADS_AFAR", "abreast", "objects_abreast", "threads_for"]

THREADS_AFAR = 24
"""That wait for a distant store, each for a request of some 20 ms: a year of daily points in a
third of a second."""
AHEAD = 64
"""Items, at most, whose answers have not been taken."""
AHEAD_BYTES = 16 << 20
"""Likewise what their answers take in memory, but for one that is larger."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def threads_for(store: Store, near: int) -> int:
    """How many threads should wait for a store; ``near`` for one that is here."""
    return max(THREADS_AFAR, near) if store.distant else near


def objects_abreast(
    store: Store, read: Callable[[Stored], Answer], objects: Iterable[Stored]
) -> Iterator[tuple[Stored, Answer | DiskError]]:
    """Each object with what ``read`` makes of it, or why it cannot be read, in their order.

    Of a distant store many are read at a time, of one that is here one after the other.
    """

    def answer(stored: Stored) -> Answer | DiskError:
        try:
            return read(stored)
        except DiskError as error:
            return error

    with ThreadPoolExecutor(THREADS_AFAR, "nbdsrv-afar") as threads:
        afar = threads if store.distant else None
        yield from abreast(afar, answer, objects, lambda stored: stored.size)


def abreast(
    threads: Executor | None,
    ask: Callable[[Item], Answer],
    items: Iterable[Item],
    size: Callable[[Item], int],
) -> Iterator[tuple[Item, Answer]]:
    """Each item with what ``ask`` says of it, in their order.

    Args:
        threads: that ask; several ``abreast`` may share them. None: asked one by one, by the
            caller, once the answer is taken.
        ask: blocking.
        items: taken by the caller's thread.
        size: bytes an answer takes, about.

    Raises:
        what ``ask`` does, in its turn. Who leaves early may find some more to have been asked.
    """
    if threads is None:
        for item in items:
            yield item, ask(item)
        return
    waiting: deque[tuple[Item, int, Future[Answer]]] = deque()
    held = 0
    try:
        for item in items:
            takes = size(item)
            while waiting and (len(waiting) >= AHEAD or held + takes > AHEAD_BYTES):
                first, freed, answer = waiting.popleft()
                held -= freed
                yield first, answer.result()
            waiting.append((item, takes, threads.submit(ask, item)))
            held += takes
        while waiting:
            first, _, answer = waiting.popleft()
            yield first, answer.result()
    finally:
        for _, _, answer in waiting:
            answer.cancel()
        if isinstance(items, Generator):
            items.close()  # it may be asking ahead, too, and a store that is down takes its time
