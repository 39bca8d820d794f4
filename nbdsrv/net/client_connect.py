"""From a URI to a connection in transmission: dial, shake hands, upgrade to TLS.

::

    Uri ── dial ──> PlainChannel ── ClientHandshake ──(StartTls)──> Negotiated ──> Client
     ^                                 |
     └────── Remote.bare ─── HungUp ───┘ the server does not know an option, nor how to say so

The state machine is ``protocol.handshake.client``; this moves its bytes. One deadline covers it
all: a server that accepts and says nothing costs ``Patience.connect_s``.
"""

import asyncio
import errno as os_errno
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbdsrv.errors import ConfigError, DiskError
from nbdsrv.net.channel import Channel, PlainChannel, until_readable, until_writable
from nbdsrv.net.client import Client
from nbdsrv.net.client_tls import NO_CREDENTIALS, Credentials, start_tls
from protocol.constants import Reply
from protocol.errors import LocalProtocolError, Refused, RemoteProtocolError
from protocol.handshake.client import ClientHandshake
from protocol.handshake.client_states import State
from protocol.handshake.wants import (
    ContextsListed,
    Event,
    Mode,
    StartTls,
    TlsPolicy,
    Wants,
)
from protocol.terms import Negotiated
from protocol.uri import Uri

__all__ = ["HungUp", "Patience", "Remote", "connect", "contexts_of", "displayed_uri"]

CHUNK = 4096
"""Bytes read at a time: handshakes are small."""
BACKLOG_PAUSE_S = 0.02
"""Before knocking again at a Unix socket whose backlog is full; connect(2) does not wait there."""

ERRNOS: dict[int, int] = {
    Reply.ERR_UNKNOWN: os_errno.ENOENT,
    Reply.ERR_POLICY: os_errno.EACCES,
    Reply.ERR_TLS_REQD: os_errno.EACCES,
    Reply.ERR_SHUTDOWN: os_errno.ESHUTDOWN,
}


class HungUp(DiskError):
    """The server has closed the connection on an option it need not know; try ``bare``."""


class _HungUpError(RemoteProtocolError):
    pass


OPTIONAL = frozenset({State.EXTENDED, State.STRUCTURED, State.SET_CONTEXTS, State.GO})
"""Asking what a server need not know."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for, in seconds.

    Attributes:
        connect_s: from the first packet to transmission.
        request_s: from a request to the end of its answer; then the connection is given up.
        reconnect_s: after a connection was lost, for a new one.
        turn_s: for others to leave a server of which this process may have but few connections.
    """

    connect_s: float = 10.0
    request_s: float = 60.0
    reconnect_s: float = 30.0
    turn_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Remote:
    """Whom to connect to, and how.

    Attributes:
        context: for TLS; None only where the URI does not demand it.
        queries: meta contexts to select where the server has them.
        credentials: what ``context`` was made of.
        bare: ask by EXPORT_NAME and nothing else.
    """

    uri: Uri
    context: ssl.SSLContext | None = None
    queries: tuple[str, ...] = ()
    patience: Patience = Patience()
    credentials: Credentials = NO_CREDENTIALS
    bare: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return displayed_uri(self.uri)


def displayed_uri(uri: Uri) -> str:
    """The URI without secrets."""
    return _hidden(str(uri))


def _hidden(text: str) -> str:
    """An export of XCP-ng is named after a session that may do more than read it."""
    return re.sub(r"(session_id(?:=|%3D))[^&?\s'\"]*", r"\1***", text, flags=re.IGNORECASE)


async def connect(remote: Remote, *, chunked: bool = True) -> Client:
    """A new connection, in transmission.

    Args:
        remote: where to.
        chunked: ask for structured replies and extended headers; without, answers are simple.

    Raises:
        DiskError: names the URI and the reason; ``HungUp`` if ``Remote.bare`` may help.
    """
    name = remote.name
    chunked = chunked and not remote.bare
    try:
        wants = Wants(
            export=remote.uri.export,
            tls=TlsPolicy.REQUIRE if remote.uri.tls else TlsPolicy.OFF,
            structured=chunked,
            extended=chunked,
            queries=remote.queries if chunked else (),
            go=not remote.bare,
        )
    except LocalProtocolError as error:
        raise ConfigError(f"{name}: {error}") from error
    with _reported(name, remote.patience.connect_s):
        async with asyncio.timeout(remote.patience.connect_s):
            greeting = _Greeting(await _dial(remote.uri), remote, wants)
            terms = await greeting.settle()
    return Client(greeting.channel, terms, name, request_s=remote.patience.request_s)


async def contexts_of(remote: Remote) -> tuple[str, ...]:
    """All meta contexts the server has for the export; none if it does not say.

    Raises:
        DiskError: there is no server. What else is wrong is told by ``connect``.
    """
    wants = Wants(
        export=remote.uri.export,
        mode=Mode.LIST_CONTEXTS,
        tls=TlsPolicy.REQUIRE if remote.uri.tls else TlsPolicy.OFF,
    )
    with _reported(remote.name, remote.patience.connect_s):
        async with asyncio.timeout(remote.patience.connect_s):
            greeting = _Greeting(await _dial(remote.uri), remote, wants)
            try:
                return await greeting.list_contexts()
            except (Refused, RemoteProtocolError):
                return ()


@contextmanager
def _reported(name: str, connect_s: float) -> Iterator[None]:
    """What went wrong as a DiskError."""
    try:
        yield
    except TimeoutError:
        text = f"{name}: no answer within {connect_s:g} s"
        raise DiskError(text, os_errno.ETIMEDOUT) from None
    except Refused as error:
        hint = "; use nbds:// for TLS" if error.reply == Reply.ERR_TLS_REQD else ""
        number = ERRNOS.get(error.reply, os_errno.EIO)
        raise DiskError(_hidden(f"{name}: {error}{hint}"), number) from error
    except _HungUpError as error:
        raise HungUp(_hidden(f"{name}: {error}"), os_errno.EPROTO) from error
    except RemoteProtocolError as error:
        raise DiskError(_hidden(f"{name}: {error}"), os_errno.EPROTO) from error
    except OSError as error:
        number = error.errno or os_errno.EIO
        reason = os.strerror(number) if error.errno and error.errno > 0 else str(error)
        raise DiskError(f"{name}: {reason}", abs(number)) from error


async def _dial(uri: Uri) -> PlainChannel:
    if uri.socket is not None:
        return await _dial_unix(os.fsencode(uri.socket))
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConnectionError(f"host {uri.host}: {error.strerror}") from error
    except UnicodeError as error:
        raise ConnectionError(f"host {uri.host}: no host can have this name") from error
    failed: OSError = ConnectionError(f"host {uri.host} has no address")
    for family, kind, number, _, address in found:
        sock = socket.socket(family, kind, number)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            return PlainChannel(sock)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
    raise failed


async def _dial_unix(path: bytes) -> PlainChannel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                await asyncio.sleep(BACKLOG_PAUSE_S)
            else:
                return PlainChannel(sock)
    except BaseException:
        sock.close()
        raise


class _Greeting:
    """One handshake. Closes its channel unless it comes to terms."""

    def __init__(self, channel: PlainChannel, remote: Remote, wants: Wants) -> None:
        self.channel: Channel = channel
        self._remote = remote
        self._machine = ClientHandshake(wants)
        self._answered = False  # by the server, since it has been asked for TLS

    async def settle(self) -> Negotiated:
        try:
            event = await self._negotiate()
            assert isinstance(event, Negotiated)  # nothing else was asked for
            return event
        except Refused:
            await self._say_goodbye()
            self.channel.close()
            raise
        except BaseException:
            self.channel.close()
            raise

    async def list_contexts(self) -> tuple[str, ...]:
        """What LIST_META_CONTEXT tells; then the channel is closed."""
        try:
            event = await self._negotiate()
            await self._say_goodbye()
            return event.names if isinstance(event, ContextsListed) else ()
        finally:
            self.channel.close()

    async def _negotiate(self) -> Negotiated | ContextsListed:
        machine = self._machine
        scratch = memoryview(bytearray(CHUNK))
        while True:
            try:
                await self._send()
                count = await self._receive(scratch)
            except (ConnectionResetError, BrokenPipeError):
                count = 0  # it has closed with some of our bytes unread
            except ConnectionError as error:  # an alert of TLS
                raise ConnectionError(f"{error}{self._wanting()}") from error
            self._answered |= count > 0
            events = machine.receive_data(scratch[:count]) if count else self._hung_up()
            for event in events:
                if isinstance(event, StartTls):
                    await self._upgrade()
                elif isinstance(event, Negotiated | ContextsListed):
                    return event

    def _hung_up(self) -> list[Event]:
        asked = self._machine.state
        try:
            return self._machine.eof()
        except RemoteProtocolError as error:
            if asked in OPTIONAL:
                raise _HungUpError(f"{error}{self._wanting()}") from error
            raise

    def _wanting(self) -> str:
        """With TLS 1.3 our side of the handshake is done before the server looks for ours."""
        mine = self._remote.credentials
        if self._answered or not self.channel.secure or mine.cert or mine.exact is not None:
            return ""
        return "; if it wants a certificate of ours, NBDSRV_TLS_CERTIFICATES is where to put it"

    async def _upgrade(self) -> None:
        context = self._remote.context
        assert context is not None  # whoever made the Remote saw to it: TLS is asked for by URI
        assert isinstance(self.channel, PlainChannel)
        self.channel = await start_tls(
            self.channel, context, self._remote.uri, self._remote.credentials
        )
        self._answered = False
        self._machine.tls_started()

    async def _say_goodbye(self) -> None:
        """ABORT, if that still makes sense; its answer is not waited for."""
        if self._machine.state in {State.IDLE, State.DENIED}:
            self._machine.abort()
            try:
                await self._send()
            except OSError:
                return

    async def _send(self) -> None:
        data = memoryview(self._machine.data_to_send())
        while data:
            data = data[self.channel.send(data) :]
            if data:
                await until_writable(self.channel.fileno())

    async def _receive(self, scratch: memoryview) -> int:
        while (count := self.channel.receive_into(scratch)) is None:
            await until_readable(self.channel.fileno())
        return count
