"""Seeing that a client which has stopped does not keep memory from those who wait for it.

A client may take its time: a paused VM is no fault. Only when others wait for memory that it holds
(half a payload, replies it does not read), and nothing has moved for ``STALL_S``, must it go.
"""

import asyncio
from collections.abc import Callable

from nbdsrv.net.buffers import Buffers

__all__ = ["STALL_S", "Stall"]

STALL_S = 30.0
"""Seconds without progress."""


class Stall:
    """Watches one client's progress for as long as it holds something."""

    def __init__(
        self, buffers: Buffers, progress: Callable[[], int | None], give_up: Callable[[str], None]
    ) -> None:
        """``progress`` returns a number that grows, or None while nothing is held."""
        self._buffers = buffers
        self._progress = progress
        self._give_up = give_up
        self._watching = False

    def watch(self) -> None:
        """Something is held from now on; cheap to call again."""
        if not self._watching:
            self._watching = True
            self._check_later(self._progress())

    def _check_later(self, before: int | None) -> None:
        asyncio.get_running_loop().call_later(STALL_S, self._check, before)

    def _check(self, before: int | None) -> None:
        now = self._progress()
        if now is None:
            self._watching = False
        elif now == before and self._buffers.contended:
            self._watching = False
            self._give_up(f"nothing has moved for {STALL_S:g} s, and others wait for memory")
        else:
            self._check_later(now)
