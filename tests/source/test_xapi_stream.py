"""The end of a TLS stream, however the peer ends it."""

import asyncio
import hashlib
import random
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine

import pytest
import uvloop
from authority import Certificates

from nbdsrv.source.xapi_stream import TlsStream

Run = Callable[[Coroutine[None, None, None]], None]
CONTENT = random.Random(7).randbytes((3 << 20) + 12_345)
PAIRS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


class Sender:
    """Sends CONTENT to each of ``clients`` over TLS, and hangs up."""

    def __init__(self, certificates: Certificates, clients: int, *, politely: bool) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = certificates.server
        self._context.load_cert_chain(server.certificate, server.key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._politely = politely
        self._thread = threading.Thread(target=self._serve, args=(clients,), daemon=True)
        self._thread.start()

    def _serve(self, clients: int) -> None:
        with self._listener:
            for _ in range(clients):
                plain, _ = self._listener.accept()
                plain.settimeout(20)
                sock = self._context.wrap_socket(plain, server_side=True)
                sock.sendall(CONTENT)
                if self._politely:
                    sock.unwrap()
                else:
                    sock.shutdown(socket.SHUT_WR)
                    sock.recv(1)
                sock.close()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates.ca))


@pytest.mark.parametrize("politely", [True, False], ids=["close_notify", "none"])
@PAIRS
def test_the_last_byte_arrives(certificates: Certificates, run: Run, *, politely: bool) -> None:
    sender = Sender(certificates, 10, politely=politely)

    async def receive() -> None:
        for _ in range(10):
            stream = await TlsStream.connect("127.0.0.1", sender.port, trusting(certificates))
            found = bytearray()
            while part := await stream.read(1 << 20):
                found += part
                await asyncio.sleep(0)
            assert await stream.read(1) == b""
            assert hashlib.sha256(found).digest() == hashlib.sha256(CONTENT).digest()
            stream.close()
            stream.close()

    run(receive())
    sender.join()


@PAIRS
def test_parts_are_read_as_they_are_asked_for(certificates: Certificates, run: Run) -> None:
    sender = Sender(certificates, 1, politely=False)
    mark = CONTENT[1000:1010]

    async def receive() -> None:
        stream = await TlsStream.connect("127.0.0.1", sender.port, trusting(certificates))
        assert await stream.readuntil(mark, 1 << 20) == CONTENT[:1010]
        assert await stream.readexactly(200_000) == CONTENT[1010:201_010]
        assert CONTENT[201_010:].startswith(await stream.read(100))
        with pytest.raises(asyncio.LimitOverrunError):
            await stream.readuntil(b"nowhere in it, or so we trust", 1 << 18)
        with pytest.raises(asyncio.IncompleteReadError):
            await stream.readexactly(len(CONTENT))
        stream.close()

    run(receive())
    sender.join()


@PAIRS
def test_a_stranger_is_not_talked_to(certificates: Certificates, run: Run) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server.certificate, certificates.server.key)

    def refuse() -> None:
        plain, _ = listener.accept()
        plain.settimeout(20)
        sock = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        with sock, pytest.raises(OSError):  # noqa: PT011 - whatever the alert is called
            sock.do_handshake()

    thread = threading.Thread(target=refuse)
    thread.start()

    async def connect() -> None:
        port = listener.getsockname()[1]
        with pytest.raises(ssl.SSLCertVerificationError):
            await TlsStream.connect("127.0.0.1", port, ssl.create_default_context())
        with pytest.raises(ConnectionRefusedError):
            await TlsStream.connect("127.0.0.1", 1, ssl.create_default_context())

    run(connect())
    thread.join(20)
    listener.close()
