"""HTTP of one's own making: a service that answers a request as a test says, or not at all."""

import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import BinaryIO, NamedTuple

__all__ = ["HANG", "HANG_UP", "Request", "Rude", "answer", "rude_service"]

HANG = b"hang"
"""Instead of an answer: silence, until the client gives up."""
HANG_UP = b"hang up"
"""Instead of an answer: the end of the connection."""


class Request(NamedTuple):
    """What was asked. Header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Rude(NamedTuple):
    """A running service.

    Attributes:
        endpoint: its URL.
        requests: all that it was asked, in order.
    """

    endpoint: str
    requests: list[Request]


def answer(status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    """An answer; with a ``length`` that is not the body's it ends with the connection."""
    lines = [
        f"HTTP/1.1 {status} Whatever",
        f"Content-Length: {len(body) if length is None else length}",
    ]
    fields = {"ETag": '"etag"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", **headers}
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    if length is not None:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def rude_service(
    answers: Callable[[Request], bytes], tls: ssl.SSLContext | None = None
) -> Iterator[Rude]:
    """Serve until the end of the block, with a context encrypted and as ``localhost``."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[Request] = []
    open_connections: list[socket.socket] = []
    threads: list[threading.Thread] = []
    over = threading.Event()

    def encrypted(connection: socket.socket) -> socket.socket:
        spoken = connection if tls is None else tls.wrap_socket(connection, server_side=True)
        open_connections.append(spoken)
        return spoken

    def converse(connection: socket.socket) -> None:
        with suppress(OSError), encrypted(connection) as spoken, spoken.makefile("rb") as file:
            while (request := _request(file)) is not None:
                requests.append(request)
                said = answers(request)
                if said == HANG:
                    over.wait(20)
                if said in {HANG, HANG_UP}:
                    return
                spoken.sendall(said)
                if b"\r\nConnection: close\r\n" in said:
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=converse, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        host = "http://127.0.0.1" if tls is None else "https://localhost"
        yield Rude(f"{host}:{listener.getsockname()[1]}", requests)
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        listener.close()
        accepting.join()
        for connection in open_connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def _request(file: BinaryIO) -> Request | None:
    first = file.readline().decode()
    if not first:
        return None
    headers = {}
    while line := file.readline().decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = file.read(int(headers.get("content-length", 0)))
    match = re.fullmatch(r"(\S+) (\S+) HTTP/1.1\r\n", first)
    assert match, first
    return Request(match[1], match[2], headers, body)
