"""Beginnings and ends: our server started by libnbd itself, DISC, SIGTERM, several clients.

Scenarios like those of libnbd_requests.py; where they start the server, its command line
follows the image's path.
"""

import os
import signal
from pathlib import Path
from typing import Any

from conformance.programs.libnbd_session import (
    demand,
    fails,
    main,
    nbd,
    open_handle,
    still_in_sync,
)

IN_FLIGHT = 64
LENGTH = 1 << 18
"""Sixty-four of these are more than a socket holds: most replies are still to be sent."""


def command(image: str, *words: str) -> None:
    """nbd_connect_command: one socket as stdin and stdout, one client, then the end."""
    handle = nbd.NBD()
    handle.connect_command(list(words))
    still_in_sync(handle, Path(image))
    handle.shutdown()


def socket_activation(image: str, *words: str) -> None:
    """nbd_connect_systemd_socket_activation: LISTEN_FDS, LISTEN_PID, descriptor 3."""
    handle = nbd.NBD()
    handle.connect_systemd_socket_activation(list(words))
    still_in_sync(handle, Path(image))
    handle.shutdown()


def disconnect(uri: str, image: str) -> None:
    """DISC behind 64 reads: all of them are answered before the server closes."""
    handle = open_handle(uri)
    content = Path(image).read_bytes()
    waiting = _ask(handle)
    handle.aio_disconnect()
    for cookie, buffer, offset in waiting:
        while not handle.aio_command_completed(cookie):
            demand(handle.poll(20_000) == 1, "a read before DISC was never answered")
        wanted = content[offset : offset + LENGTH]
        demand(buffer.to_bytearray() == wanted, f"wrong bytes at {offset} before DISC")
    _wait_for_close(handle)


def several_clients(uri: str, image: str) -> None:
    """CAN_MULTI_CONN: what one connection wrote and flushed, the others read."""
    handles = [open_handle(uri) for _ in range(4)]
    demand(all(handle.can_multi_conn() for handle in handles), "CAN_MULTI_CONN is not advertised")
    for turn in range(32):
        writer, block = handles[turn % 4], bytes([turn + 1]) * 65_536
        offset = turn * 65_536 + turn
        writer.pwrite(block, offset)
        writer.flush()
        for reader in handles:
            demand(reader.pread(65_536, offset) == block, f"turn {turn}: an old block was read")
    for handle in handles:
        still_in_sync(handle, Path(image))


def truncated(uri: str, image: str) -> None:
    """An image cut short while it is served: EIO where bytes are missing, the rest as before."""
    handle = open_handle(uri)
    content = Path(image).read_bytes()
    cut = len(content) - (4 << 20)
    os.truncate(image, cut)
    for length, offset in ((4096, cut), (LENGTH, cut - 4096), (1, len(content) - 1)):
        fails("EIO", handle.pread, length, offset)
    demand(handle.pread(LENGTH, cut - LENGTH) == content[cut - LENGTH : cut], "the rest is wrong")
    still_in_sync(handle, Path(image))


def _ask(handle: Any) -> list[tuple[Any, Any, int]]:
    waiting = []
    for index in range(IN_FLIGHT):
        buffer, offset = nbd.Buffer(LENGTH), index * LENGTH
        waiting.append((handle.aio_pread(buffer, offset), buffer, offset))
    return waiting


def _wait_for_close(handle: Any) -> None:
    """Demand that the server closes a connection on which nothing is asked any more."""
    try:
        while not (handle.aio_is_closed() or handle.aio_is_dead()):
            demand(handle.poll(10_000) == 1, "a client that is idle keeps its connection")
    except nbd.Error:
        # A server's closing is an error to libnbd: only the client may end a session softly.
        demand(handle.aio_is_dead() or handle.aio_is_closed(), "neither closed nor open")


def drain(uri: str, image: str, pid: str) -> None:
    """SIGTERM with reads in flight: each is answered, with its bytes or with ESHUTDOWN.

    Then both clients are disconnected, also the one that had asked for nothing.
    """
    handle, idle = open_handle(uri), open_handle(uri)
    content = Path(image).read_bytes()
    waiting = _ask(handle)
    os.kill(int(pid), signal.SIGTERM)
    good = 0
    for cookie, buffer, offset in waiting:
        try:
            while not handle.aio_command_completed(cookie):
                demand(handle.poll(20_000) == 1, "a read in flight was never answered")
        except nbd.Error as error:
            demand(error.errno == "ESHUTDOWN", f"after {good} answers: {error}")
            continue
        wanted = content[offset : offset + LENGTH]
        demand(buffer.to_bytearray() == wanted, f"wrong bytes at {offset} while draining")
        good += 1
    demand(good >= 1, "not one read in flight was answered with its bytes")
    for left in (idle, handle):
        _wait_for_close(left)


if __name__ == "__main__":
    main(globals())
