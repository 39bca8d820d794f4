"""Connecting one disk to its server, within what its host grants this process.

::

    first()    needed: waits for its turn               ┐
    another()  nice to have: waits until none is needed ├─> Lease ─> connect ─> Client
    plain()    for a bad place: a free one, or ...      ┘      ^                  |
               ... the place of a connection of the disk's own '──── closed ──────'

Rule: no disk waits for another to be done while all connections are some disk's only one. So for a
bad place a disk that finds no room lends itself its own, and has it back afterwards.
"""

import asyncio
import errno as os_errno
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from nbdsrv.errors import DiskError
from nbdsrv.net.client import Client
from nbdsrv.net.client_budget import CONNECTIONS, Connections, Lease, host_of
from nbdsrv.net.client_connect import HungUp, Remote, connect

__all__ = ["Dialler"]


class Dialler:
    """Of one disk. Belongs to one event loop.

    Attributes:
        remote: whom it connects to; ``bare`` once that was found to be needed.
        lend: set by its user: gives up a connection and returns its lease, None if there is none.
    """

    def __init__(self, remote: Remote, limit: int, connections: Connections = CONNECTIONS) -> None:
        """``limit``: connections of this process to the host at most, 0 for no limit."""
        self.remote = remote
        self.lend: Callable[[], Awaitable[Lease | None]] = _nothing
        self._host = host_of(remote.uri)
        self._limit = limit
        self._connections = connections
        self._leases: dict[Client, Lease] = {}
        self._lent = False
        self._returned: Lease | None = None
        self._back = asyncio.Event()
        self._closed = False

    async def open(self) -> Client:
        """The very first connection, which finds out how the server is to be asked.

        Raises:
            DiskError: as ``connect``, or no place has become free within ``Patience.turn_s``.
        """
        try:
            return await self.first()
        except HungUp as error:
            self.remote = replace(self.remote, bare=True)
            try:
                return await self.first()
            except DiskError:
                raise error from None

    async def first(self) -> Client:
        """A connection that is needed, for there is no other. Raises as ``open``."""
        if self._lent:
            await self._wait_for_return()
        lease, self._returned = self._returned, None
        if lease is None:
            within_s = self.remote.patience.turn_s
            lease = await self._connections.lease(self._host, self._limit, within_s=within_s)
        return await self._connect(lease)

    async def another(self, give_back: Callable[[Client], None]) -> Client:
        """One more, however long that takes.

        ``give_back`` is called with it when another disk needs its place: close it, or ``keep`` it.

        Raises:
            DiskError: the server does not want it.
        """
        made: list[Client] = []

        def pressed() -> None:
            if made:
                give_back(made[0])

        lease = await self._connections.lease(
            self._host, self._limit, within_s=0, give_back=pressed
        )
        client = await self._connect(lease)
        made.append(client)
        if lease.pressed:
            asyncio.get_running_loop().call_soon(give_back, client)
        return client

    def keep(self, client: Client) -> None:
        """It cannot be given back."""
        if (lease := self._leases.get(client)) is not None:
            lease.keep()

    async def plain(self) -> Client:
        """A connection with simple replies, for one read after the other. Raises as ``open``."""
        lease = self._connections.try_lease(self._host, self._limit)
        if lease is None and (lease := await self.lend()) is not None:
            self._lent = True
            self._back.clear()
            return await self._connect_plain(lease, partial(self._take_back, lease))
        if lease is None:
            within_s = self.remote.patience.turn_s
            lease = await self._connections.lease(self._host, self._limit, within_s=within_s)
        return await self._connect_plain(lease, lease.release)

    def part(self, client: Client) -> Lease:
        """Keep the lease of a connection that is about to be closed."""
        client.on_closed = _forget
        return self._leases.pop(client)

    def close(self) -> None:
        """No connections are made any more. Those there are stay their owners'."""
        self._closed = True
        self._back.set()
        if self._returned is not None:
            self._returned.release()

    async def _connect(self, lease: Lease) -> Client:
        try:
            client = await connect(self.remote)
        except BaseException:
            lease.release()
            raise
        self._leases[client] = lease
        client.on_closed = partial(self._hung_up, client)
        lease.connected()
        return client

    async def _connect_plain(self, lease: Lease, closed: Callable[[], None]) -> Client:
        try:
            client = await connect(replace(self.remote, queries=()), chunked=False)
        except BaseException:
            closed()
            raise
        client.on_closed = closed
        lease.connected()
        return client

    def _hung_up(self, client: Client) -> None:
        self._leases.pop(client).release()

    def _take_back(self, lease: Lease) -> None:
        self._lent = False
        self._back.set()
        if self._leases or self._closed:
            lease.release()  # the disk has others
        else:
            self._returned = lease

    async def _wait_for_return(self) -> None:
        within_s = self.remote.patience.turn_s
        try:
            async with asyncio.timeout(within_s):
                await self._back.wait()
        except TimeoutError:
            text = f"{self.remote.name}: its connection is at a bad place since {within_s:g} s"
            raise DiskError(text, os_errno.ETIMEDOUT) from None


async def _nothing() -> Lease | None:
    return None


def _forget() -> None:
    """The lease goes on."""
