"""Thousands of random and mutated clients against one server process.

After them it must be alive, hold as many descriptors and about as much memory as before, have
logged no fault of its own, and serve. A client that said all it had to say must be let go:
a hang shows as a deadline missed. 1 500 cases, or 10 000 with NBDSRV_FUZZ=full.
"""

import errno
import os
import random
import select
import socket
import ssl
import time
from pathlib import Path

import mutations
import pytest
from authority import Certificates
from choke import Throat, greeting, starttls
from served_images import MIB, Images, Serve
from serving import ServerProcess, eventually
from wire import Address, Wire, option

from protocol.constants import Option

CASES = 10_000 if os.environ.get("NBDSRV_FUZZ") == "full" else 1500
SEED = int(os.environ.get("NBDSRV_FUZZ_SEED", "20240601"))
HANG_S = 20.0
MAX_GROWTH = 30 * MIB
SIZE = MIB


def exchange(address: Address, data: bytes, rng: random.Random) -> None:
    """Say ``data`` in pieces, read what comes; then wait for the end, leave, or slam the door."""
    ending = rng.choice(["wait", "wait", "wait", "leave", "reset"])
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.connect(address)
        sock.setblocking(False)
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            _converse(sock, data, rng, wait=ending == "wait")
        except ConnectionError:
            return
        if ending == "reset":
            wire = Wire(sock)
            wire.reset()


def _converse(sock: socket.socket, data: bytes, rng: random.Random, *, wait: bool) -> None:
    view = memoryview(data)
    talking = True
    deadline = time.monotonic() + HANG_S
    while True:
        writers = [sock] if talking else []
        readable, writable, _ = select.select([sock], writers, [], HANG_S)
        assert time.monotonic() < deadline, "the server neither answers nor closes"
        if readable and not sock.recv(1 << 18):
            return
        if writable:
            count = sock.send(view[: rng.choice([1, 28, 100, 1 << 16, 1 << 16])]) if view else 0
            view = view[count:]
            talking = bool(view)
            if talking:
                continue
            if not wait:
                return
            _finish(sock)


def _finish(sock: socket.socket) -> None:
    """Nothing more to say; the server may have left in this very moment."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        raise ConnectionResetError from error


def check(server: ServerProcess, descriptors: int, memory: int) -> None:
    """As good as new."""
    server.hang_up()
    assert server.is_alive()
    server.check_log()
    assert eventually(lambda: server.descriptors() <= descriptors)
    assert server.resident() - memory < MAX_GROWTH
    assert len(server.connect().enter("").read(0, 4096)) == 4096


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", [0, 1], ids=["unix", "tcp"])
def test_mutated_clients(serve: Serve, tmp_path: Path, transport: int) -> None:
    image = tmp_path / "image"
    rng = random.Random(SEED + transport)
    image.write_bytes(rng.randbytes(SIZE // 2))
    os.truncate(image, SIZE)
    where = ("--listen", f"unix:{tmp_path}/sock", "--listen", "127.0.0.1:0")
    server = serve(image, "--write", *where, uris=2)
    address = server.address(transport)
    for _ in range(100):  # what grows once grows here
        exchange(address, mutations.stream(rng, "image", SIZE), rng)
    assert eventually(lambda: not server.opened(image))
    descriptors, memory = server.descriptors(), server.resident()
    for case in range(CASES // 2):
        data = mutations.stream(random.Random(f"{SEED}{transport}{case}"), "image", SIZE)
        try:
            exchange(address, data, rng)
        except AssertionError as error:
            raise AssertionError(f"case {case}: {data[:2000].hex()}") from error
    assert eventually(lambda: not server.opened(image))
    check(server, descriptors, memory)
    assert image.stat().st_size == SIZE


@pytest.mark.timeout(600)
def test_mutated_tls_clients(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> None:
    """Broken records before, in and behind the TLS handshake."""
    pair = certificates.server
    tls = ("--tls-cert", pair.certificate, "--tls-key", pair.key)
    server = serve(images.disk, "--listen", f"unix:{tmp_path}/sock", *tls)
    rng = random.Random(SEED)
    context = certificates.client_context()
    address = server.address()
    for _ in range(20):
        tls_client(address, context, rng)
    descriptors, memory = server.descriptors(), server.resident()
    for _ in range(CASES // 5):
        tls_client(address, context, rng)
    assert server.is_alive()
    server.check_log()
    assert eventually(lambda: server.descriptors() <= descriptors)
    assert server.resident() - memory < MAX_GROWTH
    wire = server.connect()
    wire.greet()
    wire.starttls(context)
    wire.go("")
    assert len(wire.read(0, 512)) == 512


def tls_client(address: Address, context: ssl.SSLContext, rng: random.Random) -> None:
    """STARTTLS, then flights until the one that is mutated; then the server must close."""
    received, due = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(received, due, server_hostname="localhost")
    assert isinstance(address, str)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(HANG_S)
        sock.connect(address)
        throat = Throat(sock, 1000)
        throat.play(greeting())
        throat.play(starttls())
        for _ in range(rng.randrange(4)):
            _advance(tls)
            sock.sendall(due.read())
            received.write(sock.recv(1 << 16))
        _advance(tls)
        try:
            sock.sendall(rng.choice(mutations.MUTATIONS)(rng, due.read()))
            _finish(sock)
            while sock.recv(1 << 16):
                pass
        except ConnectionError:
            return


def _advance(tls: ssl.SSLObject) -> None:
    """Hello first, then the end of the handshake with an option, then more options."""
    try:
        tls.do_handshake()
        tls.write(option(Option.LIST))
    except ssl.SSLWantReadError:
        pass
