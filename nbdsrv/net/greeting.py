"""The handshake's I/O shell on the server: moves its bytes, opens exports, upgrades to TLS.

The state machine is ``protocol.handshake.server``; this answers its questions. One deadline covers
everything up to the transmission phase, so that a client which connects and stalls costs little
and not for long (CVE-2024-7409); what the server itself takes for opening does not count.
"""

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import DiskError
from nbdsrv.export.access import Grant, Peer
from nbdsrv.export.exports import Catalogue, Export, export_info
from nbdsrv.net.channel import (
    Channel,
    PlainChannel,
    connect_tls,
    until_readable,
    until_writable,
)
from nbdsrv.net.peer import identified
from protocol.constants import Reply
from protocol.handshake.events import (
    Agreement,
    Close,
    Event,
    ListExports,
    OpenExport,
    QueryContexts,
    StartTls,
    TlsMode,
    Transmit,
)
from protocol.handshake.server import ServerHandshake

__all__ = ["Greeting", "Rejected", "Settled"]

log = logging.getLogger(__name__)

MAX_REFUSALS = 16
"""Refusals of one client that are reported: who tries a thousand names fills no disk with it."""
OPENING_S = 60.0
"""Seconds that looking for an export and opening it may take: a chain on a slow disk, a distant
store. Longer than that a client waits in vain."""
CHUNK = 4096
"""Bytes read at a time: handshakes are small, and idle ones should cost nothing."""


class Rejected(ConnectionError):
    """The handshake ended without an export. ``fault``: did the client break a rule?"""

    def __init__(self, reason: str, *, fault: bool) -> None:
        super().__init__(reason)
        self.fault = fault


@dataclass(slots=True)
class Settled:
    """A client that may transmit. The holder closes the channel and releases the export."""

    channel: Channel
    export: Export
    disk: Disk
    agreement: Agreement
    remainder: bytes
    peer: Peer


class _Forbidden(Exception):
    """An export this client may know of and not use."""


@dataclass(slots=True)
class Greeting:
    """One client's handshake.

    Attributes:
        peer: who it is; TLS may find out more.
        refused: told what the client asked for and why it did not get it.
    """

    channel: Channel
    catalogue: Catalogue
    mode: TlsMode
    context: ssl.SSLContext | None
    peer: Peer
    refused: Callable[[Peer, str | None, str], None]
    machine: ServerHandshake = field(init=False)
    _deadline: asyncio.Timeout = field(init=False)
    _held: tuple[Export, Disk] | None = None
    _told: set[tuple[str | None, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.machine = ServerHandshake(self.mode)

    async def settle(self, deadline: asyncio.Timeout) -> Settled:
        """Run the handshake to its end.

        Args:
            deadline: of the caller, running; it is put off by the time that opening takes.

        Raises:
            Rejected: no export was agreed on.
            ConnectionError: the client is gone.

        On any exception, cancellation included, the export is released; the channel is the
        caller's to close.
        """
        self._deadline = deadline
        try:
            return await self._negotiate()
        except BaseException:
            await self._let_go()
            raise

    async def _negotiate(self) -> Settled:
        machine = self.machine
        scratch = memoryview(bytearray(CHUNK))
        while True:
            event = machine.next_event()
            while event is not None:
                if isinstance(event, Transmit):
                    await self._send()
                    return self._settled(event)
                if isinstance(event, Close):
                    await self._send()
                    raise Rejected(event.reason, fault=event.fault)
                if isinstance(event, StartTls):
                    await self._send()
                    await self._upgrade()
                    event = None
                else:
                    with self._at_work():
                        event = await self._answer(event)
                # Sent before the next: pipelined LISTs must not pile up their answers.
                await self._send()
                event = event or machine.next_event()
            await self._send()
            count = await self._receive(scratch)
            if not count:
                raise Rejected("client left during the handshake", fault=False)
            machine.receive(bytes(scratch[:count]))

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """It is the store that takes its time now, not the client."""
        now, due = asyncio.get_running_loop().time, self._deadline.when()
        assert due is not None
        began = now()
        self._deadline.reschedule(max(due, began + OPENING_S))
        try:
            yield
        finally:
            if not self._deadline.expired():
                self._deadline.reschedule(due + now() - began)

    def _settled(self, event: Transmit) -> Settled:
        assert self._held is not None
        export, disk = self._held
        self._held = None
        return Settled(self.channel, export, disk, event.agreement, event.remainder, self.peer)

    async def _answer(self, event: Event) -> Event | None:
        machine = self.machine
        if isinstance(event, ListExports):
            secure = self._may_see_all()
            machine.list_exports(await self.catalogue.listed(secure=secure, peer=self.peer))
        elif isinstance(event, OpenExport):
            return await self._open(event)
        elif isinstance(event, QueryContexts):
            try:
                export, _ = await self._visible(event.name)
                if export is None:
                    return self._unknown(event.name)
                disk = await self._hold(export)
            except _Forbidden:
                return self._forbidden(event.name)
            except DiskError as error:
                return self._unopened(event.name, error)
            machine.contexts(disk.contexts)
        return None

    async def _open(self, event: OpenExport) -> Event | None:
        try:
            export, grant = await self._visible(event.name)
            if export is None:
                return self._unknown(event.name)
            disk = await self._hold(export)
        except _Forbidden:
            return self._forbidden(event.name)
        except DiskError as error:
            return self._unopened(event.name, error)
        writable = grant is Grant.WRITE
        return self.machine.accept(export_info(export, disk, writable=writable))

    def _unknown(self, name: str) -> Event | None:
        """The same answer for what is secret and what does not exist."""
        if not self._may_see_all():
            text = f"export {name!r} is not served without TLS"
            return self.machine.refuse(Reply.ERR_TLS_REQD, text)
        return self.machine.refuse(Reply.ERR_UNKNOWN, f"no export {name!r}")

    def _forbidden(self, name: str) -> Event | None:
        return self.machine.refuse(Reply.ERR_POLICY, f"access to export {name!r} is denied")

    def _unopened(self, name: str, error: DiskError) -> Event | None:
        """The client learns that and why, but not where things lie on this host.

        UNKNOWN whatever the reason, a store that is down, a damaged image, a point that was pruned,
        an overlay that somebody else has: of the replies there are it alone says nothing untrue.
        POLICY and PLATFORM are read as "you may not" and "it never will" by clients.
        """
        log.warning("export.unopened export=%r reason=%s", name, error)
        self._refuse(name, f"cannot be opened: {error}")
        text = f"export {name!r} cannot be opened: {os.strerror(error.errno)}"
        return self.machine.refuse(Reply.ERR_UNKNOWN, text)

    def _may_see_all(self) -> bool:
        return self.channel.secure or self.mode is not TlsMode.PER_EXPORT

    async def _visible(self, name: str) -> tuple[Export | None, Grant]:
        """What this client means by ``name``, and what it may do with it.

        None for what does not exist and what is hidden from it alike: it cannot tell them apart.
        """
        export = await self.catalogue.find(name)
        if export is None:
            reason = "no such export"
        elif export.tls_only and not self.channel.secure:
            reason = "not without TLS"
        else:
            grant = export.access.allows(self.peer)
            if grant is not Grant.NONE:
                return export, grant
            reason = "not allowed"
        self._refuse(name, reason)
        if reason == "not allowed" and export is not None and not export.access.hidden:
            raise _Forbidden
        return None, Grant.NONE

    def _refuse(self, name: str | None, reason: str) -> None:
        if len(self._told) < MAX_REFUSALS and (name, reason) not in self._told:
            self._told.add((name, reason))  # who asks for contexts and then GO is told twice
            self.refused(self.peer, name, reason)

    async def _hold(self, export: Export) -> Disk:
        """Open the export, keeping it until another is asked for: GO follows INFO."""
        if self._held is not None and self._held[0] is export:
            return self._held[1]
        await self._let_go()
        disk = await export.acquire()
        self._held = (export, disk)
        return disk

    async def _let_go(self) -> None:
        if self._held is not None:
            export, self._held = self._held[0], None
            await export.release()

    async def _upgrade(self) -> None:
        assert self.context is not None
        assert isinstance(self.channel, PlainChannel)
        try:
            self.channel = await connect_tls(self.channel, self.context)
            self.peer = identified(self.peer, self.channel.sock)
        except ConnectionError as error:
            self._refuse(None, str(error))
            raise
        self.machine.tls_started()

    async def _send(self) -> None:
        data = memoryview(self.machine.to_send())
        while data:
            count = self.channel.send(data)
            data = data[count:]
            if data:
                await until_writable(self.channel.fileno())

    async def _receive(self, scratch: memoryview) -> int:
        while (count := self.channel.receive_into(scratch)) is None:
            await until_readable(self.channel.fileno())
        return count
