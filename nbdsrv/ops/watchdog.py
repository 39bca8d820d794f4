"""systemd's watchdog: as long as the event loop turns, it is told so.

A service whose loop hangs (a bug: nothing here may block) is killed and started again instead of
keeping its clients waiting for ever. sd_watchdog_enabled(3).
"""

import asyncio
import os
import re
from collections.abc import Mapping

from nbdsrv.ops.notify import notify

__all__ = ["Watchdog", "interval"]


def interval(environ: Mapping[str, str]) -> float | None:
    """Seconds after which systemd loses patience; None if it does not watch this process."""
    text = environ.get("WATCHDOG_USEC", "")
    if not re.fullmatch("[0-9]{1,15}", text) or not int(text):
        return None
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6


class Watchdog:
    """Says that we live, twice within that time. Belongs to the running loop."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._period = interval(environ)
        self._next: asyncio.TimerHandle | None = None
        self._bark()

    def _bark(self) -> None:
        if self._period is not None:
            notify("WATCHDOG=1")
            self._next = asyncio.get_running_loop().call_later(self._period / 2, self._bark)

    def close(self) -> None:
        """No more; systemd is patient with a service that is stopping."""
        if self._next is not None:
            self._next.cancel()
