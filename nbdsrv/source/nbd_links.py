"""The connections of one NbdDisk: spread over, replaced when they die.

::

    choose() ──> the least loaded of  [Client] [Client] [Client] [      ] opened when all are busy
                                                           |
                                                         died
                                                           v
                 none left: one _revive for all who wait, with growing pauses, until reconnect_s

Of several, one is given back when another disk has none (``client_budget``).

Rule: a replacement must lead to the same export on the same terms, or it is refused: a disk that
changed its size behind a restore is not the same disk.
"""

import asyncio
import contextlib
import errno as os_errno
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nbdsrv.disk.watch import Watch
from nbdsrv.errors import DiskError
from nbdsrv.net.client import Client, ConnectionLost
from nbdsrv.net.client_budget import Lease
from nbdsrv.net.client_connect import Patience
from nbdsrv.source.nbd_dialler import Dialler
from protocol.terms import Negotiated

__all__ = ["Incidents", "Links"]

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 2.0
"""Between two attempts to connect again; it doubles from the first to the last."""
MAX_BAD_RANGES = 1024
"""Bad places remembered; more are only counted."""


@dataclass(slots=True)
class Incidents:
    """What went wrong and was mended, or was not.

    Attributes:
        lost: connections that died.
        reconnected: connections that replaced them.
        reread: reads that were asked again after their connection died.
        salvaged: reads that were taken apart because they failed.
        bad: (offset, length) that could not be read even alone, the first MAX_BAD_RANGES.
    """

    lost: int = 0
    reconnected: int = 0
    reread: int = 0
    salvaged: int = 0
    bad: list[tuple[int, int]] = field(default_factory=list)

    def add_bad(self, offset: int, length: int) -> None:
        """Remember a bad place, once."""
        place = (offset, length)
        if len(self.bad) < MAX_BAD_RANGES and place not in self.bad:
            self.bad.append(place)


class Links:
    """Up to ``limit`` connections to one export.

    Attributes:
        terms: of the first connection, and so of all.
        on_lost: called with every connection that has died or was given up.
    """

    def __init__(
        self,
        first: Client,
        dialler: Dialler,
        limit: int,
        patience: Patience,
        incidents: Incidents,
    ) -> None:
        self.terms = first.terms
        self.on_lost: Callable[[Client], None] = lambda _: None
        self._name = first.name
        self._dialler = dialler
        dialler.lend = self._lend
        self._limit = limit
        self._patience = patience
        self._incidents = incidents
        self._clients: list[Client] = []
        self._opening: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._gave_up = False
        self._closed = False
        self._watch: Watch | None = None
        self._adopt(first)

    @property
    def count(self) -> int:
        """Connections there are now."""
        return len(self._clients)

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients)

    async def choose(self) -> Client:
        """The connection that has least to do.

        Raises:
            DiskError: there is none, and there will be none within ``Patience.reconnect_s``.
        """
        deadline = pause = 0.0
        while (client := self.ready()) is None:
            if self._closed:
                raise DiskError(f"{self._name} is closed", os_errno.EBADF)
            now = asyncio.get_running_loop().time()
            if not pause:
                deadline, pause = now + self._patience.reconnect_s, FIRST_PAUSE_S
            elif now + pause > deadline:
                text = f"{self._name}: its server closes each connection as soon as it is made"
                raise DiskError(text, os_errno.ECONNRESET)
            else:  # the new one has died before we had our turn
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE_S)
            if not self._clients:
                await self._revived()
        return client

    async def ask(self, question: Callable[[Client], Awaitable[T]]) -> T:
        """What one answers; a server that is about to stop says so on each, and is come back to.

        Raises:
            DiskError: as ``choose``, or what ``question`` raises.
        """
        for _ in range(self.count):
            client = await self.choose()
            try:
                return await question(client)
            except ConnectionLost as error:
                if error.errno != os_errno.ESHUTDOWN:
                    raise
        return await question(await self.choose())

    def ready(self) -> Client | None:
        """The same as ``choose``, if there is one that can be used at once."""
        while best := self._least():
            if best.usable:
                if best.load and len(self._clients) < self._limit and self._opening is None:
                    self._opening = asyncio.get_running_loop().create_task(self._open_another())
                return best
            self._dismiss(best)  # the server is shutting down
        return None

    def _least(self) -> Client | None:
        clients = self._clients
        if clients and not clients[0].load:
            return clients[0]
        return min(clients, key=_load, default=None)

    async def close(self) -> None:
        """Say goodbye on all connections. Idempotent."""
        self._closed = True
        tasks = [task for task in (self._opening, self._reviving) if task is not None]
        for task in tasks:
            task.cancel()
        clients, self._clients = self._clients, []
        await asyncio.gather(*(client.close() for client in clients))
        self._dialler.close()
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)

    # --- coming and going ----------------------------------------------------------------

    def watch_by(self, watch: Watch) -> None:
        """Have ``watch`` tell of answers on all connections, and on those that follow."""
        self._watch = watch
        for client in self._clients:
            client.watch_by(watch)

    def _adopt(self, client: Client) -> None:
        if self._watch is not None:
            client.watch_by(self._watch)
        client.on_lost = lambda: self._lost(client)
        self._clients.append(client)

    def _lost(self, client: Client) -> None:
        log.warning("nbd.lost reason=%s", client.lost)
        self._incidents.lost += 1
        if client in self._clients:
            self._clients.remove(client)
        self.on_lost(client)

    def _dismiss(self, client: Client) -> None:
        self._clients.remove(client)
        self.on_lost(client)
        self._in_background(client.close())

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _give_back(self, client: Client) -> None:
        """Another disk needs its place; not if this one has no other, or has to flush it."""
        if client not in self._clients:
            return  # on its way out already
        if len(self._clients) == 1 or client.unflushed:
            self._dialler.keep(client)
            return
        self._clients.remove(client)
        self._in_background(_finish(client))

    async def _lend(self) -> Lease | None:
        """Give up a connection, but not its place."""
        clean = [client for client in self._clients if not client.unflushed]
        if not clean:
            return None
        client = min(clean, key=_load)
        self._clients.remove(client)
        try:
            await client.finish()
        except BaseException:
            self._in_background(client.close())
            raise
        if client.lost is not None:
            return None  # and its place went with it
        lease = self._dialler.part(client)
        try:
            await client.close()
        except BaseException:
            lease.release()
            raise
        return lease

    async def _open_another(self) -> None:
        """One connection more; a server that does not grant it is left alone."""
        try:
            client = await self._dialler.another(self._give_back)
            self._adopt(await self._same(client))
        except DiskError as error:
            log.info("nbd.alone connections=%d reason=%s", len(self._clients), error)
            self._limit = max(len(self._clients), 1)
        finally:
            self._opening = None

    async def _revived(self) -> None:
        """Wait for a new connection; everybody waits for the same attempts."""
        if self._reviving is None:
            self._reviving = asyncio.get_running_loop().create_task(self._revive())
            self._reviving.add_done_callback(self._seen)
        reviving = self._reviving
        await asyncio.wait([reviving])
        error = None if reviving.cancelled() else reviving.exception()
        if isinstance(error, DiskError):
            raise DiskError(str(error), error.errno) from error
        if error is not None:
            raise error

    def _seen(self, revived: "asyncio.Task[None]") -> None:
        self._reviving = None
        if not revived.cancelled():
            revived.exception()  # whoever waits has it too, but all may have been cancelled

    async def _revive(self) -> None:
        """Try until ``reconnect_s``; once that was in vain, later only once at a time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (0.0 if self._gave_up else self._patience.reconnect_s)
        pause = FIRST_PAUSE_S
        while True:
            try:
                self._adopt(await self._same(await self._dialler.first()))
            except DiskError as error:
                if loop.time() + pause > deadline or isinstance(error, _Changed):
                    self._gave_up = True
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE_S)
            else:
                self._gave_up = False
                self._incidents.reconnected += 1
                log.info("nbd.reconnected uri=%s", self._name)
                return

    async def _same(self, client: Client) -> Client:
        if _identity(client.terms) == _identity(self.terms):
            return client
        with contextlib.suppress(DiskError):
            await client.close()
        text = f"{self._name} is not what it was when it was opened: open it anew"
        raise _Changed(text, os_errno.ESTALE)


async def _finish(client: Client) -> None:
    await client.finish()
    await client.close()


class _Changed(DiskError):
    pass


def _load(client: Client) -> int:
    return client.load


def _identity(terms: Negotiated) -> Negotiated:
    """What must be the same: all but words, and the numbers of contexts."""
    names = dict(enumerate(sorted(terms.contexts.values())))
    return replace(terms, contexts=names, refusals=(), description=None)
