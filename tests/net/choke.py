"""A handshake that stops after any given byte, in plain text or in TLS.

::

    script()  generator: yields what to send, is sent what the server answered
    play      runs it over a socket, sending ``limit`` bytes at most, then gives up

TLS runs over memory buffers, so that also the bytes of its handshake are counted one by one.
"""

import socket
import ssl
from collections.abc import Generator

from wire import TIMEOUT, Address, info_data, meta_data, option, request

from protocol import structs
from protocol.constants import Command, Option, Reply

RECEIVE = 1 << 16
Script = Generator[bytes | int, bytes, None]
"""Yields bytes to send, or how many bytes it wants to receive next."""


def options(export: str) -> Script:
    """All kinds of options, up to a first READ."""
    for number, data in (
        (Option.EXTENDED_HEADERS, b""),
        (Option.LIST, b""),
        (Option.SET_META_CONTEXT, meta_data(export, ["base:allocation"])),
        (Option.INFO, info_data(export)),
        (Option.GO, info_data(export, [3])),
    ):
        yield option(number, data)
        while True:
            header = structs.OptionReplyHeader.parse((yield 20))
            if header.length:
                yield header.length
            if header.reply == Reply.ACK:
                break
            assert header.reply < 1 << 31, Reply(header.reply).name
    yield request(Command.READ, 0, 512, extended=True)
    yield 40 + 512


def greeting() -> Script:
    """Greeting and client flags."""
    yield 18
    yield structs.ClientFlags.build({"flags": 3})


def starttls() -> Script:
    """The option alone."""
    yield option(Option.STARTTLS)
    yield 20


class Choked(Exception):
    """The limit was reached."""


class Throat:
    """Sends ``limit`` bytes and no more."""

    def __init__(self, sock: socket.socket, limit: int) -> None:
        self._sock = sock
        self._left = limit
        self._tls: ssl.SSLObject | None = None
        self._received, self._due = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.sent = 0

    def play(self, script: Script) -> None:
        """Run a script to its end; raises ``Choked`` when the limit is met."""
        answer = b""
        try:
            step = next(script)
            while True:
                if isinstance(step, int):
                    answer = self._receive(step)
                else:
                    self._send(step)
                    answer = b""
                step = script.send(answer)
        except StopIteration:
            return

    def upgrade(self, context: ssl.SSLContext) -> None:
        """The TLS handshake."""
        self._tls = context.wrap_bio(self._received, self._due, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._push(self._due.read())
                self._pull()
            else:
                self._push(self._due.read())
                return

    def _send(self, data: bytes) -> None:
        if self._tls is not None:
            self._tls.write(data)
            data = self._due.read()
        self._push(data)

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            if self._tls is None:
                chunk = self._sock.recv(length - len(data))
                if not chunk:
                    raise EOFError("the server closed")
                data += chunk
                continue
            try:
                data += self._tls.read(length - len(data))
            except ssl.SSLWantReadError:
                self._pull()
        return data

    def _push(self, data: bytes) -> None:
        part = data[: self._left]
        self._left -= len(part)
        self.sent += len(part)
        self._sock.sendall(part)
        if len(part) < len(data):
            raise Choked

    def _pull(self) -> None:
        data = self._sock.recv(RECEIVE)
        if not data:
            raise EOFError("the server closed")
        self._received.write(data)


def handshake(
    address: Address, export: str, limit: int, context: ssl.SSLContext | None = None
) -> int:
    """Connect, send at most ``limit`` bytes of a handshake and leave; how many were sent."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(address)
        throat = Throat(sock, limit)
        try:
            throat.play(greeting())
            if context is not None:
                throat.play(starttls())
                throat.upgrade(context)
            throat.play(options(export))
        except Choked:
            pass
        return throat.sent
