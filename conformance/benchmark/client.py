"""The few raw NBD connections `idle` needs: a thousand at once, and ones that never read.

::

    server  NBDMAGIC IHAVEOPT flags:2
    client  flags:4 | IHAVEOPT NBD_OPT_GO:4 length:4 | name length:4 = 0, info requests:2 = 0
    server  (reply magic:8 option:4 type:4 length:4 data)*  until NBD_REP_ACK
    client  (request magic:4 flags:2 type:2 cookie:8 offset:8 length:4)*

Written with plain sockets and constants of its own, so that our code is not on both sides.
See proto.md, "Fixed newstyle negotiation".
"""

import socket
import struct
import time

from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.servers import Server, receive

__all__ = ["attach", "pour_reads"]

CONNECT_TIMEOUT_S = 20.0
GREETING = struct.Struct(">8s8sH")
OPTION = struct.Struct(">I8sII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
OPTION_REPLY_MAGIC = 0x0003E889045565A9
FIXED_NO_ZEROES = 3
OPT_GO = 7
REP_ACK, REP_INFO = 1, 3
MAX_INFO = 4096
"""Bytes of one NBD_REP_INFO this client takes; the largest is a name or description."""

READ_LENGTH = 256 * 1024
READS = 20_000
"""Requests a client that never reads sends at most: 5 GiB of replies, far over any bound."""
STUCK_S = 1.0
"""Without a byte taken for so long, the server has stopped reading from us: back-pressure."""


def attach(server: Server) -> socket.socket:
    """A connection to the default export, past NBD_OPT_GO, that asks nothing further.

    Raises BenchmarkError when the server refuses it or hangs up.
    """
    connection = server.connect(CONNECT_TIMEOUT_S)
    try:
        magic, have_option, _ = GREETING.unpack(_exactly(connection, GREETING.size))
        if (magic, have_option) != (b"NBDMAGIC", b"IHAVEOPT"):
            raise BenchmarkError(f"{server.peer} greets with {magic!r} {have_option!r}")
        go = OPTION.pack(FIXED_NO_ZEROES, b"IHAVEOPT", OPT_GO, 6)
        connection.sendall(go + bytes(6))
        while True:
            header = _exactly(connection, OPTION_REPLY.size)
            reply_magic, option, kind, length = OPTION_REPLY.unpack(header)
            if reply_magic != OPTION_REPLY_MAGIC or option != OPT_GO or length > MAX_INFO:
                raise BenchmarkError(f"{server.peer}: not a reply to NBD_OPT_GO: {header.hex()}")
            _exactly(connection, length)
            if kind == REP_ACK:
                return connection
            if kind != REP_INFO:
                raise BenchmarkError(f"{server.peer} refuses NBD_OPT_GO with {kind:#x}")
    except OSError as error:
        connection.close()
        raise BenchmarkError(f"{server.peer}, while attaching: {error}") from error
    except BenchmarkError:
        connection.close()
        raise


def pour_reads(connection: socket.socket, size: int) -> int:
    """Send reads and take no reply, until the server stops taking requests.

    Returns the number of whole requests it has taken, socket buffers included.
    """
    requests = b"".join(
        REQUEST.pack(REQUEST_MAGIC, 0, 0, n, n * READ_LENGTH % (size - READ_LENGTH), READ_LENGTH)
        for n in range(READS)
    )
    view, sent, last = memoryview(requests), 0, time.monotonic()
    connection.setblocking(False)
    while sent < len(view) and time.monotonic() - last < STUCK_S:
        try:
            sent += connection.send(view[sent:])
            last = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # the server has hung up: a bound too
            break
    return sent // REQUEST.size


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = receive(connection, length)
    if len(data) != length:
        raise BenchmarkError("the server hung up during the handshake")
    return data
