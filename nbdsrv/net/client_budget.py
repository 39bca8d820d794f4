"""How many connections this process has to each server, over all of its disks.

::

    XCP-ng host: 16     |A|A|A|B|B|B|C|...|     leases, one for each connection
    waiting             D (its first)   A (one more)   B (one more)
                        next            when nobody waits for a first one

A server that grants 16 connections to all the world must not lose them all to the first disk. So a
disk's first connection comes before anybody's further ones, in the order of asking; and while one
is waited for, disks that have several are asked to give one back.

Where there is a limit connections are also made one at a time: XAPI plugs a virtual block device
for each, behind a backlog of five.

Rule: the strictest limit among those who hold or want a lease is everybody's.
"""

import asyncio
import errno as os_errno
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from nbdsrv.errors import DiskError
from protocol.uri import Uri

__all__ = ["CONNECTIONS", "Connections", "Lease", "host_of"]


class Lease:
    """One connection's place at a server. Thread-safe.

    Attributes:
        limit: connections to the server at most, 0 for as many as one likes.
        extra: is it one more of a disk that has others?
    """

    def __init__(self, host: "_Host", limit: int, give_back: Callable[[], None] | None) -> None:
        self.limit = limit
        self.extra = give_back is not None
        self._host = host
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()

    def connected(self) -> None:
        """The connection is made; others may begin."""
        self._host.connected(self)

    def release(self) -> None:
        """The connection is closed, or was never made. Idempotent."""
        self._host.release(self)

    def keep(self) -> None:
        """It is the holder's only one by now, or busy: somebody else is to be asked."""
        self._host.keep(self)

    def press(self) -> None:
        """Somebody waits for it."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(give_back)

    @property
    def pressed(self) -> bool:
        """Has its holder been asked for it, or must not be?"""
        return self._give_back is None


class Connections:
    """The registry. Thread-safe, for disks of several event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    def count(self, host: str) -> int:
        """Leases held."""
        with self._lock:
            found = self._hosts.get(host)
            return len(found.held) if found is not None else 0

    async def lease(
        self,
        host: str,
        limit: int,
        *,
        within_s: float,
        give_back: Callable[[], None] | None = None,
    ) -> Lease:
        """Wait for a place.

        Args:
            host: as ``host_of`` calls it.
            limit: connections of this process to it at most, 0 for no limit.
            within_s: deadline of a disk's first connection. A further one is waited for as long
                as the caller likes.
            give_back: only for one more of a disk that has others: called, once at most and on
                the caller's loop, when somebody waits for a first one. Then ``release`` the
                lease, soon, or ``keep`` it.

        Raises:
            DiskError: ETIMEDOUT, no place has become free.

        Cancellation leaves the queue.
        """
        place = self._host(host)
        lease = Lease(place, limit, give_back)
        granted = place.apply(lease)
        if granted is None:
            return lease
        try:
            async with asyncio.timeout(None if lease.extra else within_s):
                await granted
        except TimeoutError:
            lease.release()
            text = f"{host}: all {place.limit(lease)} connections this process may have are in use"
            raise DiskError(f"{text}; waited {within_s:g} s", os_errno.ETIMEDOUT) from None
        except BaseException:
            lease.release()
            raise
        return lease

    def try_lease(self, host: str, limit: int) -> Lease | None:
        """A place if there is one now and nobody waits for it."""
        place = self._host(host)
        lease = Lease(place, limit, None)
        if place.apply(lease, wait=False) is None:
            return lease
        return None

    def _host(self, name: str) -> "_Host":
        with self._lock:
            for idle in [key for key, host in self._hosts.items() if not host.used]:
                if idle != name:
                    del self._hosts[idle]
            return self._hosts.setdefault(name, _Host())


class _Host:
    """One server: who is connected, who waits."""

    def __init__(self) -> None:
        self.held: list[Lease] = []
        self._connecting: set[Lease] = set()
        self._first: deque[tuple[Lease, Callable[[], None]]] = deque()
        self._extra: deque[tuple[Lease, Callable[[], None]]] = deque()
        self._lock = threading.Lock()

    @property
    def used(self) -> bool:
        return bool(self.held or self._first or self._extra)

    def limit(self, lease: Lease) -> int:
        """Connections at most, were ``lease`` among them; 0 for no limit."""
        return min((each.limit for each in [*self.held, lease] if each.limit), default=0)

    def apply(self, lease: Lease, *, wait: bool = True) -> "asyncio.Future[None] | None":
        """None if it is granted; else a future, which without ``wait`` is nobody's."""
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[None] = loop.create_future()
        with self._lock:
            queue = self._extra if lease.extra else self._first
            if not self._first and not queue and self._fits(lease):
                self._grant(lease)
                return None
            if wait:
                queue.append((lease, partial(_tell, loop, granted)))
                if not lease.extra:
                    self._press()
        return granted

    def connected(self, lease: Lease) -> None:
        with self._lock:
            self._connecting.discard(lease)
            self._serve()

    def release(self, lease: Lease) -> None:
        with self._lock:
            if lease in self.held:
                self.held.remove(lease)
            self._connecting.discard(lease)
            for queue in (self._first, self._extra):
                for entry in [entry for entry in queue if entry[0] is lease]:
                    queue.remove(entry)
            self._serve()

    def keep(self, lease: Lease) -> None:
        with self._lock:
            lease.extra = False
            self._press()

    def _fits(self, lease: Lease) -> bool:
        limit = self.limit(lease)
        return not limit or (len(self.held) < limit and not self._connecting)

    def _grant(self, lease: Lease) -> None:
        self.held.append(lease)
        self._connecting.add(lease)

    def _serve(self) -> None:
        """Grant what can be, in order."""
        while queue := self._first or self._extra:
            lease, tell = queue[0]
            if not self._fits(lease):
                self._press()
                return
            queue.popleft()
            self._grant(lease)
            tell()

    def _press(self) -> None:
        """For each who waits for a first connection one further one is asked back."""
        asked = sum(lease.extra and lease.pressed for lease in self.held)
        for lease in reversed(self.held):
            if asked >= len(self._first):
                return
            if not lease.pressed:
                lease.press()
                asked += 1


def _tell(loop: asyncio.AbstractEventLoop, granted: "asyncio.Future[None]") -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(_set, granted)


def _set(granted: "asyncio.Future[None]") -> None:
    if not granted.done():
        granted.set_result(None)


def host_of(uri: Uri) -> str:
    """What connections are counted by."""
    if uri.socket is not None:
        return f"unix:{uri.socket}"
    host = f"[{uri.host}]" if ":" in uri.host else uri.host.lower()
    return f"{host}:{uri.port}"


CONNECTIONS = Connections()
"""Of this process."""
