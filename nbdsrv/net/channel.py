"""A connected byte stream, non-blocking: plain or TLS behind the same few calls.

Rule: would-block is a return value here, never an exception; a dead peer is ``ConnectionError``.

TLS runs OpenSSL directly on the socket (``SSLContext.wrap_socket``), not asyncio's ``start_tls``:
that one keeps plain text it had buffered before the upgrade and delivers it as if it had been
encrypted. Here nothing is buffered but what the handshake was given, and the handshake refuses
to go on if that was more than the STARTTLS option.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Sequence

__all__ = ["Channel", "PlainChannel", "TlsChannel", "connect_tls", "shake_hands"]

SEND_BUFFER = 1 << 20
"""Bytes the kernel may hold for a slow reader on a Unix socket; the default of 208 KiB makes a
256 KiB reply wait for the client in its middle. TCP sizes its own."""


class PlainChannel:
    """Plain text over a stream socket."""

    secure = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        elif sock.family in {socket.AF_INET, socket.AF_INET6}:
            _tune_tcp(sock)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.sock.fileno()

    def receive_into(self, view: memoryview) -> int | None:
        """Bytes received, 0 at the end of the stream, None if there are none now."""
        try:
            return self.sock.recv_into(view)
        except BlockingIOError:
            return None

    def send(self, view: memoryview | bytes, *, more: bool = False) -> int:
        """Bytes taken, possibly 0; ``more``: the rest of the message follows at once."""
        try:
            return self.sock.send(view, socket.MSG_MORE if more else 0)
        except BlockingIOError:
            return 0

    def send_several(self, views: Sequence[memoryview | bytes]) -> int:
        """Bytes taken of these, one after the other, possibly 0."""
        try:
            return self.sock.sendmsg(views)
        except BlockingIOError:
            return 0

    def send_file(self, fd: int, position: int, length: int) -> int | None:
        """Bytes sent straight from a file, 0 at the end of the file, None if the socket is full."""
        try:
            return os.sendfile(self.sock.fileno(), fd, position, length)
        except BlockingIOError:
            return None

    def pending(self) -> bool:
        """Have bytes been received that polling the descriptor would not show?"""
        return False

    def shut_down(self) -> None:
        """End the stream both ways without closing; for a socket another thread is using."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; nothing is waited for."""
        self.sock.close()


class TlsChannel:
    """The same over TLS."""

    secure = True

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.sock.fileno()

    def receive_into(self, view: memoryview) -> int | None:
        """As for plain text; fills ``view`` from as many records as have arrived."""
        done = 0
        while done < len(view):
            try:
                count = self.sock.recv_into(view[done:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return done or None
            except ssl.SSLError as error:
                raise ConnectionError(f"TLS: {error.reason or error}") from error
            if not count:
                return done
            done += count
        return done

    def send(self, view: memoryview | bytes, *, more: bool = False) -> int:
        """As for plain text. OpenSSL takes one record (16 KiB) at a time."""
        del more
        done = 0
        data = memoryview(view)
        while done < len(data):
            try:
                done += self.sock.send(data[done:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except ssl.SSLEOFError as error:
                raise BrokenPipeError("TLS: the other side has closed the connection") from error
            except ssl.SSLError as error:
                raise ConnectionError(f"TLS: {error.reason or error}") from error
        return done

    def pending(self) -> bool:
        """OpenSSL may hold the rest of a decrypted record."""
        return self.sock.pending() > 0

    def shut_down(self) -> None:
        """As for plain text; below TLS, so without close_notify."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Send close_notify if that does not block, then close."""
        try:
            self.sock.unwrap()
        except (OSError, ValueError):  # SSLWantRead: sent, and the peer's is not waited for
            pass
        self.sock.close()


Channel = PlainChannel | TlsChannel


async def connect_tls(channel: PlainChannel, context: ssl.SSLContext) -> TlsChannel:
    """The server's side of a TLS handshake; the plain channel is used up.

    Raises:
        ConnectionError: the handshake failed, for instance for want of a client certificate.

    Cancellation (the handshake deadline) closes the socket.
    """
    channel.sock.setblocking(False)
    sock = context.wrap_socket(
        channel.sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
    )
    try:
        return await shake_hands(sock)
    except (ssl.SSLError, OSError) as error:
        sock.close()
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"TLS handshake failed: {reason}") from error
    except BaseException:
        sock.close()
        raise


async def shake_hands(sock: ssl.SSLSocket) -> TlsChannel:
    """Either side's TLS handshake on a non-blocking socket, which stays the caller's on errors.

    Raises:
        OSError: it failed (``ssl.SSLError``), or the peer is gone.
    """
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            await until_readable(sock.fileno())
        except ssl.SSLWantWriteError:
            await until_writable(sock.fileno())
        else:
            return TlsChannel(sock)


async def until_readable(fd: int) -> None:
    """Wait until ``fd`` has something to read."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def until_writable(fd: int) -> None:
    """Wait until ``fd`` takes something."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _tune_tcp(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A client host that vanished is noticed after five minutes instead of two hours.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
