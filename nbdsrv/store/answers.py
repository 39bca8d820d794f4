"""Waiting for a service that may never answer, for as long as this process is to live.

::

    caller ── answered(call) ──> a thread of ours ── call() ──> obstore, up to minutes
       └ waits for its future <─────────────────────── answer
       └ or for give_up(): the process has been told to stop, and has waited long enough

obstore's calls cannot be interrupted: what waits in one can neither be cancelled nor take a signal.
So the caller waits beside it, and leaves the thread behind when it must.
"""

import _thread
import errno as os_errno
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from nbdsrv.store.store import StoreError

__all__ = ["answered", "give_up", "some_left_behind"]

T = TypeVar("T")


class _State:
    """Of this process: it is the process that is told to stop."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.over = False
        self.left_behind = False
        self.waiting: set[Future[Any]] = set()
        self.idle: list[SimpleQueue[tuple[Callable[[], Any], Future[Any]]]] = []


_state = _State()


def answered(name: str, call: Callable[[], T]) -> T:
    """What ``call()`` returns or raises; blocks. For any thread.

    Args:
        name: of what is asked for, for the message.
        call: goes on behind our back where it is given up: it must use nothing but memory.

    Raises:
        StoreError: ETIMEDOUT, it has been given up.
    """
    future: Future[T] = Future()
    with _state.lock:
        if not _state.over:
            _state.waiting.add(future)
            queue = _state.idle.pop() if _state.idle else _started()
            queue.put((call, future))
        else:
            future.set_exception(_given_up())
    try:
        return future.result()
    except _GivenUpError:
        text = f"{name}: no answer so far, and this process has been told to stop"
        raise StoreError(text, os_errno.ETIMEDOUT) from None
    finally:
        with _state.lock:
            _state.waiting.discard(future)
            _state.left_behind |= not future.done()


def give_up() -> None:
    """All who wait now, and all who will, are told that there is no answer."""
    with _state.lock:
        _state.over = True
        for future in _state.waiting:
            with suppress(InvalidStateError):
                future.set_exception(_given_up())
                _state.left_behind = True


def some_left_behind() -> bool:
    """Are there threads in calls that were given up? They must not see the interpreter end."""
    return _state.left_behind


class _GivenUpError(Exception):
    pass


def _given_up() -> _GivenUpError:
    return _GivenUpError()


def _started() -> "SimpleQueue[tuple[Callable[[], Any], Future[Any]]]":
    """A thread that nobody waits for at the end, as ``threading`` would."""
    queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
    _thread.start_new_thread(_serve, (queue,))
    return queue


def _serve(queue: "SimpleQueue[tuple[Callable[[], Any], Future[Any]]]") -> None:
    while True:
        call, future = queue.get()
        result, error = None, None
        try:
            result = call()
        except BaseException as caught:  # noqa: BLE001 - handed to who waits
            error = caught
        with _state.lock:
            _state.idle.append(queue)
        with suppress(InvalidStateError):  # it has been given up
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        del call, future, result, error  # an idle thread keeps no answer alive
