"""Who looks whether a descriptor of ours is readable: the event loop, or a server's reactor.

::

    client ── by itself ───────────> LoopWatch ── add_reader ──> uvloop
           ── behind a proxy ──────> Reactor ──── one epoll with the clients it reads for

A reactor that serves what a connection of ours brings sees both ends at once: it can look for the
answer where it would otherwise go to sleep, and whatever came together leaves together.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

__all__ = ["Handler", "LoopWatch", "Watch"]


class Handler(Protocol):
    """What a descriptor is served by."""

    def on_events(self, events: int) -> None:
        """Descriptor is ready (EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP). Must not raise."""

    def resume(self) -> None:
        """Its turn has come again (see ``Reactor.again``). Must not raise."""


class Watch(Protocol):
    """Calls handlers on one event loop."""

    def add(self, fd: int, handler: Handler, events: int) -> None:
        """Tell ``handler`` of ``events`` on ``fd`` from now on."""

    def remove(self, fd: int) -> None:
        """Tell nothing of ``fd`` any more; call before closing it. Idempotent."""

    def soon(self, call: Callable[[], None]) -> None:
        """Call ``call`` once those who are ready now have been told. Must not raise."""


class LoopWatch:
    """The event loop itself, which tells of reading alone."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def add(self, fd: int, handler: Handler, events: int) -> None:
        """Call ``handler.on_events(events)`` whenever ``fd`` is readable."""
        self._loop.add_reader(fd, handler.on_events, events)

    def remove(self, fd: int) -> None:
        """Tell nothing of ``fd`` any more."""
        self._loop.remove_reader(fd)

    def soon(self, call: Callable[[], None]) -> None:
        """In this turn of the loop or the next."""
        self._loop.call_soon(call)
