"""``--listen stdio``: one client, on the descriptors our parent left us.

::

    inetd, libnbd    0 = 1 = one socket               served as it is
    Node.js, shells  0 = in, 1 = out (pipes, sockets)  pumped through a socket pair
"""

import os
import socket
import threading
from dataclasses import dataclass

from nbdsrv.errors import ConfigError

__all__ = ["StandardStream", "standard_stream"]

PIECE = 1 << 18
"""Bytes pumped at a time."""


@dataclass(frozen=True, slots=True)
class StandardStream:
    """The client on standard input and output."""

    sock: socket.socket
    pump: threading.Thread | None = None

    def finish(self, timeout_s: float) -> None:
        """Wait until all replies have left through the pump; blocking."""
        if self.pump is not None:
            self.pump.join(timeout_s)


def standard_stream() -> StandardStream:
    """The client as one stream socket. Standard input and output are no longer ours to use.

    Raises:
        ConfigError: they are a terminal, or closed.
    """
    try:
        both, out = os.fstat(0), os.fstat(1)
    except OSError as error:
        raise ConfigError("--listen stdio: standard input or output is closed") from error
    if os.isatty(0) or os.isatty(1):
        raise ConfigError("--listen stdio speaks NBD on standard input and output, not a terminal")
    if (both.st_dev, both.st_ino) == (out.st_dev, out.st_ino):
        return StandardStream(_adopt())
    ours, theirs = socket.socketpair()
    threading.Thread(target=_pump_in, args=(theirs,), daemon=True).start()
    pump = threading.Thread(target=_pump_out, args=(theirs,), daemon=True)
    pump.start()
    return StandardStream(ours, pump)


def _adopt() -> socket.socket:
    try:
        sock = socket.socket(fileno=os.dup(0))
        kind = sock.type
    except OSError as error:
        raise ConfigError("--listen stdio: standard input is not a socket") from error
    if kind != socket.SOCK_STREAM:
        raise ConfigError("--listen stdio: standard input is not a stream socket")
    return sock


def _pump_in(sock: socket.socket) -> None:
    try:
        while piece := os.read(0, PIECE):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the server's side is gone; nobody is left to tell


def _pump_out(sock: socket.socket) -> None:
    try:
        while piece := sock.recv(PIECE):
            view = memoryview(piece)
            while view:
                view = view[os.write(1, view) :]
        os.close(1)
    except OSError:
        sock.close()  # the client stopped reading: so does the server, then
