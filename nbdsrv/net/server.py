"""The server: accepts clients, takes each through its handshake, hands it to the reactor.

::

    Listener ── accept ──> Greeting (deadline) ──> Transmission (in the Reactor) ──> gone
                   |            |
               cap reached:  the one that has waited longest makes room

Stopping drains: no more clients, everything received is answered, then connections close.

What is served, to whom and where may change while clients are attached: they keep what they have.
"""

import asyncio
import contextlib
import errno as os_errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbdsrv.disk.patience import set_within
from nbdsrv.disk.workers import Workers
from nbdsrv.export.access import Peer
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.net.buffers import DEFAULT_BUDGET, Buffers
from nbdsrv.net.channel import PlainChannel, TlsChannel
from nbdsrv.net.greeting import Greeting, Rejected, Settled
from nbdsrv.net.listener import Listener
from nbdsrv.net.measures import Histogram, Measures
from nbdsrv.net.peer import peer_of
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.session import Nobody, Observer, Session
from nbdsrv.net.transmission import Transmission
from protocol.constants import TransmissionFlag
from protocol.handshake.events import TlsMode

__all__ = ["Limits", "Server", "measured_as"]

log = logging.getLogger(__name__)

ACCEPT_BATCH = 64
"""Connections accepted before others have their turn."""
WATCH_S = 0.1
"""Seconds between turns of a client that are timed."""
UNHEARD_S = 8.0
"""Seconds without taking a byte after which a server that stops no longer waits for a client."""
PATIENCE_S = 5.0
"""Seconds after which a server that stops says what keeps it: a store or disk that hangs."""
ACCEPT_PAUSE = 0.5
"""Seconds without accepting after the process ran out of descriptors."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server grants its clients together.

    Attributes:
        connections: at any one time, handshakes included.
        handshake_s: seconds from connection to transmission.
        drain_s: seconds that requests in flight are waited for when stopping.
        memory: bytes lent for payloads and cold reads at any one time.
    """

    connections: int = 4096
    handshake_s: float = 10.0
    drain_s: float = 30.0
    memory: int = DEFAULT_BUDGET


class Server:
    """Serves a catalogue to any number of clients. Belongs to one event loop.

    Attributes:
        sessions: of all clients that have attached, by their transmission.
        measures: of all exports somebody has ever used, by ``measured_as``.
        lag: how late the loop was when it should have done something at a given time.
        accepted: connections.
        refused: of them, those that were refused an export, or shook hands in vain.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        workers: Workers,
        *,
        limits: Limits | None = None,
        tls: TlsMode = TlsMode.OFF,
        context: ssl.SSLContext | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._observer: Observer = observer or Nobody()
        self._catalogue = catalogue
        self._limits = limits or Limits()
        self._tls = tls
        self._context = context
        self._reactor = Reactor(workers, Buffers(self._limits.memory))
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._greetings: dict[asyncio.Task[None], socket.socket] = {}  # in order of arrival
        self._dismissed: dict[asyncio.Task[None], socket.socket] = {}
        self._watching: asyncio.TimerHandle | None = None
        self._last_id = 0
        self.sessions: dict[Transmission, Session] = {}
        self.measures: dict[str, Measures] = {}
        self.lag = Histogram()
        self.accepted = 0
        self.refused = 0
        self._releases: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def listen(self, listeners: Iterable[Listener]) -> None:
        """Accept clients from these sockets; they are closed with the server."""
        for listener in listeners:
            listener.sock.setblocking(False)
            self._listeners.append(listener)
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def unlisten(self, listeners: Iterable[Listener], *, close: bool = True) -> None:
        """Accept nobody from these sockets any more, and close them."""
        for listener in listeners:
            self._listeners.remove(listener)
            self._loop.remove_reader(listener.sock.fileno())
            if close:
                listener.close()

    @property
    def listeners(self) -> Sequence[Listener]:
        """Where clients are accepted."""
        return tuple(self._listeners)

    @property
    def limits(self) -> Limits:
        """What clients are granted."""
        return self._limits

    @property
    def tls(self) -> TlsMode:
        """Who is served over TLS."""
        return self._tls

    @property
    def buffers(self) -> Buffers:
        """The memory that requests borrow."""
        return self._reactor.buffers

    @property
    def handshakes(self) -> int:
        """Clients that have not attached yet."""
        return len(self._greetings)

    def traffic(self) -> int | None:
        """A number that changes with each request; None while one waits for its answer."""
        total = 0
        for client in self.sessions:
            if client.waited_for:
                return None
            total += client.asked
        return total

    def change(self, *, limits: Limits, tls: TlsMode, context: ssl.SSLContext | None) -> None:
        """For whoever connects from now on. The memory budget stays what it is."""
        self._limits, self._tls, self._context = limits, tls, context

    def drop(self, session: Session, reason: str) -> None:
        """End a client's connection at once; what it has in flight finishes unheard."""
        if session.client in self.sessions:
            session.client.reason = reason
            session.client.abort()

    def watch(self) -> None:
        """Measure waits from now on: one turn of each client, ten times a second."""
        if self._watching is None:
            self._watch_again()

    def _watch_again(self) -> None:
        due = time.monotonic() + WATCH_S
        self._watching = self._loop.call_later(WATCH_S, self._watch_now, due)

    def _watch_now(self, due: float) -> None:
        self.lag.add(max(0.0, time.monotonic() - due))
        for client in self.sessions:
            client.watch()
        self._watch_again()

    def forget_unserved(self) -> None:
        """Drop the measures of exports that are gone and that nobody uses."""
        names = {export.name for export in self._catalogue}
        names |= {collection.name for collection in self._catalogue.collections}
        names |= {measured_as(session.export) for session in self.sessions.values()}
        for name in [name for name in self.measures if name not in names]:
            del self.measures[name]

    def serve(self, sock: socket.socket) -> None:
        """Serve one connected client."""
        self.accepted += 1
        self._make_room()
        self._empty.clear()
        task = self._loop.create_task(self._greet(sock))
        self._greetings[task] = sock
        task.add_done_callback(self._greeted)

    async def wait_empty(self) -> None:
        """Return when there is no client."""
        await self._empty.wait()

    async def stop(self) -> None:
        """Drain and close everything. Answers in flight get ``Limits.drain_s`` to leave."""
        for listener in self._listeners:
            self._loop.remove_reader(listener.sock.fileno())
            listener.close()
        self._listeners.clear()
        for task in list(self._greetings):
            self._dismiss(task)
        if self._watching is not None:
            self._watching.cancel()
        for client in list(self.sessions):
            client.reason = "the server stops"
            client.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                await self._drained()
        for client in list(self.sessions):
            client.abort()
        if not await set_within(self._empty, PATIENCE_S):
            names = sorted({session.name for session in self.sessions.values()})
            log.warning("stop.waiting for what is in flight exports=%r", names)
        await self._empty.wait()
        if self._releases:
            await asyncio.wait(self._releases)
        self._reactor.close()

    async def _drained(self) -> None:
        """Return when there is no client.

        One that takes nothing of its answers is not waited for to the end: it has been stopped, or
        hangs, and would hold up everybody's restart.
        """
        sent: dict[Transmission, int] = {}
        while not self._empty.is_set():
            await set_within(self._empty, UNHEARD_S)
            for client in list(self.sessions):
                now = client.tally().sent
                if client.unheard and sent.get(client) == now:
                    client.reason = "the server stops, and it takes no answers"
                    client.abort()
                sent[client] = now

    # --- accepting ------------------------------------------------------

    def _accept(self, listener: Listener) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                sock, _ = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {os_errno.EMFILE, os_errno.ENFILE, os_errno.ENOBUFS}:
                    self._pause(listener, error)
                return  # otherwise the client was gone before it was accepted
            self.serve(sock)

    def _pause(self, listener: Listener, error: OSError) -> None:
        log.warning("accept.pause reason=%s", os.strerror(error.errno or 0))
        self._loop.remove_reader(listener.sock.fileno())
        self._loop.call_later(ACCEPT_PAUSE, self._go_on, listener)

    def _go_on(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _make_room(self) -> None:
        """At the cap, whoever has been shaking hands for longest gives way to the newcomer."""
        if len(self._greetings) + len(self.sessions) < self._limits.connections:
            return
        oldest = next(iter(self._greetings), None)
        if oldest is not None:
            self._dismiss(oldest)

    def _dismiss(self, greeting: "asyncio.Task[None]") -> None:
        """End a handshake; it no longer counts."""
        self._dismissed[greeting] = self._greetings.pop(greeting)
        greeting.cancel()

    def _full(self) -> bool:
        return len(self.sessions) >= self._limits.connections

    # --- one client ------------------------------------------------------

    async def _greet(self, sock: socket.socket) -> None:
        greeting = None
        settled = None
        peer = peer_of(sock)
        try:
            if self._full():
                reason = f"{self._limits.connections} clients are connected"
                self._refused(peer, None, reason)
                raise Rejected(reason, fault=False)
            channel = PlainChannel(sock)
            greeting = Greeting(
                channel, self._catalogue, self._tls, self._context, peer, self._refused
            )
            async with asyncio.timeout(self._limits.handshake_s) as deadline:
                settled = await greeting.settle(deadline)
        except TimeoutError:
            log.info("handshake.timeout after=%gs", self._limits.handshake_s)
        except (ConnectionError, OSError) as error:
            level = logging.WARNING if isinstance(error, Rejected) and error.fault else logging.INFO
            log.log(level, "handshake.end reason=%s", error)
        finally:
            if settled is None:
                (greeting.channel if greeting else sock).close()
        self._transmit(settled)

    def _transmit(self, settled: Settled | None) -> None:
        if settled is None:
            return
        export, channel, agreement = settled.export, settled.channel, settled.agreement
        measures = self.measures.setdefault(measured_as(export), Measures())
        measures.attached += 1
        client = Transmission(
            self._reactor,
            settled.channel,
            settled.disk,
            settled.agreement,
            lambda: self._gone(client, export),
            measures,
        )
        self._last_id += 1
        session = Session(
            id=self._last_id,
            peer=settled.peer,
            export=export,
            name=export.name,
            read_only=TransmissionFlag.READ_ONLY in agreement.flags,
            tls=(channel.sock.version() or "TLS") if isinstance(channel, TlsChannel) else "",
            dialect=agreement.dialect.name.lower(),
            client=client,
        )
        self.sessions[client] = session
        log.info("session.open export=%r tls=%s", export.name, channel.secure)
        self._observer.attached(session)
        client.start(settled.remainder)

    def _greeted(self, task: "asyncio.Task[None]") -> None:
        sock = self._dismissed.pop(task, None) or self._greetings.pop(task, None)
        if sock is not None and task.cancelled():
            sock.close()  # a task cancelled before its first step has not done so itself
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session.bug in handshake", exc_info=error)
        self._check_empty()

    def _gone(self, client: Transmission, export: Export) -> None:
        log.info("session.close export=%r", export.name)
        session = self.sessions.pop(client)
        measures = self.measures.get(measured_as(export))
        if measures is not None:
            measures.departed.add(client.tally())
        self._observer.detached(session, client.reason)
        release = self._loop.create_task(export.release())
        self._releases.add(release)
        release.add_done_callback(self._released)

    def _released(self, release: "asyncio.Task[None]") -> None:
        self._releases.discard(release)
        self._check_empty()

    def _check_empty(self) -> None:
        busy = self._greetings or self._dismissed or self.sessions or self._releases
        if not busy:
            self._empty.set()

    def _refused(self, peer: Peer, export: str | None, reason: str) -> None:
        self.refused += 1
        self._observer.refused(peer, export, reason)


def measured_as(export: Export) -> str:
    """The name an export is counted under: restore points come and go, their repository stays."""
    return export.name if export.collection is None else export.collection.name
