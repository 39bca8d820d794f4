"""Signals to stop: what is being made is cleaned up first, for a bounded time.

::

    the first signal    a command in a loop: its task is cancelled; elsewhere Stopped is raised
        2 s             "stopping": there is something to wait for
        5 s             a silent store is given up: cleaning up goes on as if it had failed
        60 s            the end, whatever is still being cleaned up
    another one         the end, at once

Python's own handlers are used, not the loop's: a signal counts also while the loop stands still,
and before there is one. What the process ignores from its birth on (nohup) it goes on ignoring.
"""

import _thread
import asyncio
import os
import select
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from nbdsrv.cli.waking import heed
from nbdsrv.errors import NbdsrvError
from nbdsrv.store.answers import give_up
from nbdsrv.store.store import StoreError

__all__ = ["SIGNALS", "STOP", "Stop", "Stopped", "run", "say", "stoppable", "unless_stopped"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SOON_S = 2.0
"""Seconds after which somebody who waits wants to know what for; taking leave of an NBD server
takes one."""
PATIENCE_S = 5.0
"""Seconds a store is waited for: what it has not answered by then is left as it is."""
LAST_S = 60.0
"""Seconds after that until the end: QEMU and libvirt have deadlines of their own, well below."""
AGAIN_S = 0.2
"""Seconds within which a second signal is the first one's echo: ``timeout`` signals its child and
then the group that it is in."""

T = TypeVar("T")


class Stopped(BaseException):
    """A signal has ended the command.

    Attributes:
        code: of the process.
    """

    def __init__(self, number: signal.Signals, left: str = "") -> None:
        """``left``: what that leaves, if there is something to know."""
        super().__init__(f"stopped by {number.name}{f': {left}' if left else ''}")
        self.code = 128 + number


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    loop: asyncio.AbstractEventLoop
    act: Callable[[], object]
    patience_s: float
    final: bool


class Stop:
    """What signals to stop do in this process. Belongs to the main thread.

    Attributes:
        told: the signal that has ended everything, once there was one.
    """

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self._stages: list[_Stage] = []
        self._when = float("-inf")

    def install(self) -> None:
        """From now on it is us that signals call."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)
        heed(SIGNALS)

    def take_interrupts(self) -> None:
        """Also where the process was to ignore them, as one is that a script runs behind its back:
        a server says that they end it.
        """
        signal.signal(signal.SIGINT, self._take)

    def retire(self) -> None:
        """From now on they end the process as they would any other."""
        for number in SIGNALS:
            if signal.getsignal(number) == self._take:
                signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def acting(
        self, act: Callable[[], object], patience_s: float = PATIENCE_S, *, final: bool = True
    ) -> Iterator[None]:
        """In the block, the running loop calls ``act`` where ``Stopped`` would be raised.

        Args:
            act: is called once.
            patience_s: as ``PATIENCE_S``.
            final: if not, it ends something only, and another signal does what one would have done
                outside of the block.
        """
        stage = _Stage(asyncio.get_running_loop(), act, patience_s, final)
        self._stages.append(stage)
        try:
            yield
        finally:
            if stage in self._stages:
                self._stages.remove(stage)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._when < AGAIN_S:
            return
        self._when = now
        if self.told is not None:
            _end(number)
        stage = self._stages[-1] if self._stages else None
        if stage is not None and not stage.final:
            self._stages.remove(stage)
        else:
            self.told = signal.Signals(number)
            patience_s = stage.patience_s if stage is not None else PATIENCE_S
            _thread.start_new_thread(_count_down, (self.told, patience_s))
            if stage is None:
                raise Stopped(self.told)
        stage.loop.call_soon_threadsafe(stage.act)


STOP = Stop()
"""Signals are the process's, and so is this."""


async def stoppable(work: Awaitable[T], left: str = "") -> T:
    """Await ``work``; a signal to stop cancels it, once.

    Args:
        work: is awaited in the current task.
        left: what an interruption leaves, for the message.

    Raises:
        Stopped: it was; says what is left, or what went wrong with cleaning up.
    """
    task = asyncio.current_task()
    assert task is not None
    with STOP.acting(task.cancel):
        try:
            return await work
        except asyncio.CancelledError:
            if STOP.told is None:
                raise
            raise Stopped(STOP.told, left) from None
        except NbdsrvError as error:
            if STOP.told is None:
                raise
            # A store that was given up changes nothing about what is left; all else may.
            both = left and isinstance(error, StoreError)
            raise Stopped(STOP.told, f"{left}; {error}" if both else str(error)) from error


async def unless_stopped(work: Awaitable[object]) -> bool:
    """Await ``work``; False if a signal to stop has cancelled it."""
    task = asyncio.current_task()
    assert task is not None
    with STOP.acting(task.cancel):
        try:
            await work
        except (asyncio.CancelledError, NbdsrvError):
            if STOP.told is None:
                raise
    return STOP.told is None


def run(work: Coroutine[Any, Any, T], left: str = "") -> T:
    """``stoppable`` in a loop of its own."""
    import uvloop

    return uvloop.run(stoppable(work, left))


def _count_down(number: signal.Signals, patience_s: float) -> None:
    """In a thread: whatever the others are waiting for."""
    time.sleep(SOON_S)
    say(f"{number.name}: stopping; once more ends it at once")
    time.sleep(max(patience_s - SOON_S, 0))
    give_up()
    time.sleep(LAST_S)
    say(f"stopped by {number.name}: what was not cleaned up by now stays as it is")
    _end(number)


def say(text: str) -> bool:
    """A line on standard error; False if nobody takes it: then nothing waits for that."""
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"nbdsrv: {' '.join(text.split())}\n".encode(errors="backslashreplace"))
            return True
    return False


def _end(number: int) -> None:
    with suppress(OSError, ValueError):
        if os.isatty(2) and select.select([], [2], [], 0)[1]:
            os.write(2, b"\x1b[?25h")  # a bar hides the cursor
    os._exit(128 + number)
