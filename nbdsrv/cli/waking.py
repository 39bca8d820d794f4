"""Signals that the main thread would sleep through.

::

    signal ── C handler ──> a mark for the main thread, a byte in a pipe
                 main thread: looks for marks, ... goes to sleep in a lock
                            └ a signal that comes just here is not seen until it wakes up
    pipe ──> a thread of ours ── SIGURG, to the main thread alone, until it has seen that

Python's handlers run in the main thread, between two of its bytecodes; a lock that it waits for is
waited for in C. A signal interrupts that wait, but one that came a moment before it began, or that
another thread was given, does not. Event loops wake up by a pipe of their own while they run, and
put ours back (uvloop 0.23).
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Collection
from types import FrameType

__all__ = ["heed"]

AGAIN_S = 0.05
"""Seconds until the next attempt: the main thread was about to sleep, or computes in C."""


def heed(signals: Collection[int]) -> None:
    """From now on, handlers of ``signals`` are called also while a lock is waited for.

    For the main thread, once; takes ``signal.set_wakeup_fd`` and SIGURG, which nothing else here
    uses and which ends no process.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    main = threading.get_ident()
    awake = False

    def woken(_number: int, _frame: FrameType | None) -> None:
        nonlocal awake
        awake = True

    def watch() -> None:
        nonlocal awake
        while number := os.read(reader, 1):
            if number[0] in signals:
                awake = False
                while not awake:
                    signal.pthread_kill(main, signal.SIGURG)
                    time.sleep(AGAIN_S)

    signal.signal(signal.SIGURG, woken)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # full: we are awake enough
    _thread.start_new_thread(watch, ())
