"""ULIDs: names that sort by time, made without asking anybody.

::

    01M8AEWCAP 6C5J97Y6Y33G6Y7A      26 letters of Crockford's base 32
    48 bits    80 bits
    ms since   random
    1970

Those of one process ascend, also within a millisecond and when the clock steps back. Thread-safe.
"""

import os
import threading
import time

__all__ = ["ULID_PATTERN", "new_ulid", "ulid_at", "ulid_time"]

ULID_PATTERN = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
"""A regular expression for one."""
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class _Clock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        with self._lock:
            fresh = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
            self._last = max(fresh, self._last + 1)
            return self._last


_clock = _Clock()


def new_ulid(after: str = "") -> str:
    """A new one, behind all that this process has made; or behind ``after``, if that is later."""
    number = _clock.next()
    if after and number <= _number(after):
        # Somebody else's clock is ahead of ours: what comes later must sort later all the same.
        number = _number(after) + 1 + int.from_bytes(os.urandom(8), "big")
    return _letters(number)


def ulid_at(seconds: float) -> str:
    """A new one that sorts by a time of the past; those of one millisecond in any order.

    Args:
        seconds: since 1970; what lies before is told as 1970, what is to come as now.
    """
    now = time.time_ns() // 1_000_000
    moment = min(max(int(seconds * 1000), 0), now)
    return _letters(moment << 80 | int.from_bytes(os.urandom(10), "big"))


def ulid_time(ulid: str) -> float:
    """Seconds since 1970, by the clock of who made it."""
    return _number(ulid[:10]) / 1000


def _letters(number: int) -> str:
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def _number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number << 5 | _CROCKFORD.index(letter)
    return number
