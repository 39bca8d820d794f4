"""Waiting for a pause between the guests' requests, so that what is not urgent disturbs nobody.

::

    guests   ##  ### #      ####                 ##
    ours            |--3 ms--|no  |------3 ms------| now          or when patience is at its end

Whoever waits gets a turn after its patience all the same: guests that never pause must not keep
what goes on behind them from ever being done.
"""

import asyncio
from collections.abc import Callable

__all__ = ["NOBODY", "Quiet", "Traffic"]

QUIET_S = 0.003
"""Seconds without a request that count as a pause. A guest that reads one block after the other
asks again within a fraction of that."""

Traffic = Callable[[], int | None]
"""A number that changes with each request of any client; None while one waits for its answer."""


def NOBODY() -> int:  # noqa: N802 - a constant, as a function
    """The traffic of a server without clients."""
    return 0


class Quiet:
    """The pauses in one server's traffic. Belongs to the loop."""

    def __init__(self, traffic: Traffic, patience_s: float) -> None:
        """``patience_s``: seconds after which a turn comes without a pause."""
        self._traffic = traffic
        self._patience_s = patience_s

    async def pause(self) -> None:
        """Return in a pause, or when patience is at its end."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        before = self._traffic()
        while loop.time() < deadline:
            await asyncio.sleep(QUIET_S)
            now = self._traffic()
            if now is not None and now == before:
                return
            before = now
