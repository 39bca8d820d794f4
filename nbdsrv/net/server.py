"""The server: accepts clients, takes each through its handshake, hands it to the reactor.

::

    Listener ── accept ──> Greeting (deadline) ──> Transmission (in the Reactor) ──> gone
                   |            |
               cap reached:  the one that has waited longest makes room

Stopping drains: no more clients, everything received is answered, then connections close.
"""

import asyncio
import contextlib
import errno as os_errno
import logging
import os
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass

from nbdsrv.disk.workers import Workers
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.net.buffers import DEFAULT_BUDGET, Buffers
from nbdsrv.net.channel import PlainChannel
from nbdsrv.net.greeting import Greeting, Rejected, Settled
from nbdsrv.net.listener import Listener
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.transmission import Transmission
from protocol.handshake.events import TlsMode

__all__ = ["Limits", "Server"]

log = logging.getLogger(__name__)

ACCEPT_BATCH = 64
"""Connections accepted before others have their turn."""
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
    """Serves a catalogue to any number of clients. Belongs to one event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        workers: Workers,
        *,
        limits: Limits | None = None,
        tls: TlsMode = TlsMode.OFF,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._limits = limits or Limits()
        self._tls = tls
        self._context = context
        self._reactor = Reactor(workers, Buffers(self._limits.memory))
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._greetings: dict[asyncio.Task[None], socket.socket] = {}  # in order of arrival
        self._dismissed: dict[asyncio.Task[None], socket.socket] = {}
        self._clients: set[Transmission] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def listen(self, listeners: Iterable[Listener]) -> None:
        """Accept clients from these sockets; they are closed with the server."""
        for listener in listeners:
            listener.sock.setblocking(False)
            self._listeners.append(listener)
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def serve(self, sock: socket.socket) -> None:
        """Serve one connected client."""
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
        for client in list(self._clients):
            client.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                await self._empty.wait()
        for client in list(self._clients):
            client.abort()
        await self._empty.wait()
        if self._releases:
            await asyncio.wait(self._releases)
        self._reactor.close()

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
        if len(self._greetings) + len(self._clients) < self._limits.connections:
            return
        oldest = next(iter(self._greetings), None)
        if oldest is not None:
            self._dismiss(oldest)

    def _dismiss(self, greeting: "asyncio.Task[None]") -> None:
        """End a handshake; it no longer counts."""
        self._dismissed[greeting] = self._greetings.pop(greeting)
        greeting.cancel()

    def _full(self) -> bool:
        return len(self._clients) >= self._limits.connections

    # --- one client ------------------------------------------------------

    async def _greet(self, sock: socket.socket) -> None:
        greeting = None
        settled = None
        try:
            if self._full():
                raise Rejected(f"{self._limits.connections} clients are connected", fault=False)
            channel = PlainChannel(sock)
            greeting = Greeting(channel, self._catalogue, self._tls, self._context)
            async with asyncio.timeout(self._limits.handshake_s):
                settled = await greeting.settle()
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
        export = settled.export
        log.info("session.open export=%r tls=%s", export.name, settled.channel.secure)
        client = Transmission(
            self._reactor,
            settled.channel,
            settled.disk,
            settled.agreement,
            lambda: self._gone(client, export),
        )
        self._clients.add(client)
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
        self._clients.discard(client)
        release = self._loop.create_task(export.release())
        self._releases.add(release)
        release.add_done_callback(self._released)

    def _released(self, release: "asyncio.Task[None]") -> None:
        self._releases.discard(release)
        self._check_empty()

    def _check_empty(self) -> None:
        busy = self._greetings or self._dismissed or self._clients or self._releases
        if not busy:
            self._empty.set()
