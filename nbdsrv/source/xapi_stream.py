"""A byte stream over TLS whose end is never lost.

::

    SSLSocket, non-blocking ── recv ──> bytes, until the peer's last one
              │                 would block: wait for the descriptor
              └──────────────── 0: the end, with close_notify or without

XAPI's streams end by the end of the connection, and stunnel may close it without close_notify.
uvloop's TLS transport then drops what it has received and not yet handed on (seen with 0.22: the
last kilobytes of 25 streams of 25); here OpenSSL works on the socket itself, as in ``net.channel``.
"""

import asyncio
import contextlib
import socket
import ssl

from nbdsrv.net.channel import shake_hands, until_readable, until_writable

__all__ = ["TlsStream"]

AT_A_TIME = 1 << 16


class TlsStream:
    """A connection. Belongs to one event loop; one reader and one writer at a time."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Use ``connect``."""
        self._sock = sock
        self._held = bytearray()
        self._ended = False

    @classmethod
    async def connect(cls, host: str, port: int, context: ssl.SSLContext) -> "TlsStream":
        """Connect to the first of the host's addresses that answers, and shake hands.

        Raises:
            OSError: nobody answers, or ``ssl.SSLError``: the peer is not who it should be.

        Cancellation closes the socket.
        """
        loop = asyncio.get_running_loop()
        refused: OSError | None = None
        for family, kind, protocol, _, address in await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            plain = socket.socket(family, kind, protocol)
            try:
                plain.setblocking(False)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.sock_connect(plain, address)
            except OSError as error:
                plain.close()
                refused = error
                continue
            except BaseException:
                plain.close()
                raise
            sock = context.wrap_socket(
                plain,
                server_hostname=host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=True,
            )
            try:
                await shake_hands(sock)
            except BaseException:
                sock.close()
                raise
            return cls(sock)
        raise refused or OSError(f"{host} has no address")

    @property
    def certificate(self) -> bytes:
        """The peer's, DER; empty if it showed none."""
        return self._sock.getpeercert(binary_form=True) or b""

    async def read(self, limit: int) -> bytes:
        """Some bytes, at most ``limit``; none at the end of the stream.

        Raises:
            OSError: the connection broke.
        """
        if not self._held:
            return await self._receive(limit)
        found = bytes(self._held[:limit])
        del self._held[:limit]
        return found

    async def readexactly(self, count: int) -> bytes:
        """``count`` bytes.

        Raises:
            asyncio.IncompleteReadError: the stream ends before.
        """
        while len(self._held) < count:
            await self._more(count)
        found = bytes(self._held[:count])
        del self._held[:count]
        return found

    async def readuntil(self, mark: bytes, limit: int) -> bytes:
        """Up to and with ``mark``, which must come within ``limit`` bytes.

        Raises:
            asyncio.IncompleteReadError: the stream ends before.
            asyncio.LimitOverrunError: it does not come.
        """
        while (at := self._held.find(mark)) < 0:
            if len(self._held) > limit:
                raise asyncio.LimitOverrunError("no end of it", len(self._held))
            await self._more(None)
        found = bytes(self._held[: at + len(mark)])
        del self._held[: at + len(mark)]
        return found

    async def _more(self, expected: int | None) -> None:
        part = await self._receive(AT_A_TIME)
        if not part:
            raise asyncio.IncompleteReadError(bytes(self._held), expected)
        self._held += part

    async def _receive(self, limit: int) -> bytes:
        while not self._ended:
            try:
                part = self._sock.recv(limit)
            except ssl.SSLWantReadError:
                await until_readable(self._sock.fileno())
            except ssl.SSLWantWriteError:
                await until_writable(self._sock.fileno())
            else:
                self._ended = not part
                return part
        return b""

    async def write(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            OSError: the connection broke.
        """
        view = memoryview(data)
        while view:
            try:
                count = self._sock.send(view[: 1 << 20])
            except ssl.SSLWantReadError:
                await until_readable(self._sock.fileno())
            except ssl.SSLWantWriteError:
                await until_writable(self._sock.fileno())
            else:
                view = view[count:]

    def close(self) -> None:
        """Send close_notify if that does not block, then close. Idempotent."""
        with contextlib.suppress(OSError, ValueError):
            self._sock.unwrap()
        self._sock.close()
