"""SIGTERM at any moment: what was received is answered, then exit code 0.

proto.md "Terminating the transmission phase", ESHUTDOWN; CVE-2024-7409 (stop in negotiation),
CVE-2015-0847 (signals and many connections). The fixture demands exit code 0 of each server.
"""

import asyncio
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from in_process import running
from served_images import MIB, Images, Serve
from serving import ServerProcess, eventually
from wire import Wire, option

from nbdsrv.net.server import Limits
from protocol.constants import Command, Dialect, Errno, Option


@pytest.fixture
def server(serve: Serve, images: Images, tmp_path: Path) -> ServerProcess:
    """All of it on a Unix socket and on TCP."""
    where = ("--listen", f"unix:{tmp_path}/sock", "--listen", "127.0.0.1:0")
    return serve(images.big, *where, uris=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_clients_do_not_delay(server: ServerProcess, number: signal.Signals) -> None:
    clients = [server.connect().enter("") for _ in range(5)]
    server.process.send_signal(number)
    assert all(client.is_closed() for client in clients)
    assert server.wait() == 0


def test_handshakes_do_not_delay(server: ServerProcess) -> None:
    stages = [b"", b"\0\0", b"\0\0\0\3", b"\0\0\0\3" + option(Option.LIST)[:9]]
    clients = [server.connect() for _ in stages]
    for client, said in zip(clients, stages, strict=True):
        client.receive(18)
        client.send(said)
    started = time.monotonic()
    server.terminate()
    assert all(client.is_closed() for client in clients)
    assert server.wait() == 0
    assert time.monotonic() - started < 5


def test_half_a_payload_does_not_delay(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    server = serve(image, "--write", "--listen", f"unix:{tmp_path}/sock")
    for length in (100, 4096, MIB):
        client = server.connect().enter("")
        client.send(client.prepare(Command.WRITE, 0, payload=b"x" * length) + b"x" * (length - 1))
    started = time.monotonic()
    server.terminate()
    assert server.wait() == 0
    assert time.monotonic() - started < 5
    assert image.read_bytes() == bytes(MIB)


@pytest.mark.parametrize("transport", [0, 1], ids=["unix", "tcp"])
def test_replies_that_wait_for_their_reader_arrive(
    server: ServerProcess, images: Images, dialect: Dialect, transport: int
) -> None:
    """16 MiB are due to a client that reads late: all of it comes before the server ends."""
    wire = server.connect(transport).enter("", dialect)
    wire.send(b"".join(wire.prepare(Command.READ, n * 2 * MIB, 2 * MIB) for n in range(8)))
    assert wire.sock.recv(1, socket.MSG_PEEK)
    server.terminate()
    answered = read_until_closed(wire, images)
    assert server.wait() == 0
    assert answered, "not even the reply that had begun"


def read_until_closed(wire: Wire, images: Images) -> int:
    """Whole replies up to a proper end: data, or ESHUTDOWN for what came too late."""
    count = 0
    while wire.pending:
        try:
            head = wire.sock.recv(1, socket.MSG_PEEK)
        except ConnectionResetError:
            break  # between replies
        if not head:
            break
        answer = wire.answer()
        if answer.error != Errno.ESHUTDOWN:
            start, end = answer.asked.offset, answer.asked.offset + answer.asked.length
            assert images.golden_big[start:end] == answer.data()
            count += 1
    return count


@pytest.mark.parametrize("transport", [0, 1], ids=["unix", "tcp"])
def test_no_reply_is_torn_by_requests_nobody_read(
    server: ServerProcess, images: Images, transport: int
) -> None:
    """Closing over unread requests resets TCP, and a reset discards what is on its way."""
    wire = server.connect(transport).enter("", Dialect.SIMPLE)
    batch = b"".join(wire.prepare(Command.READ, n % 40 * MIB, MIB) for n in range(3000))
    wire.send(batch)
    assert wire.sock.recv(1, socket.MSG_PEEK)
    server.terminate()
    assert eventually(lambda: not accepts(server, transport))
    assert read_until_closed(wire, images)
    assert server.wait() == 0


def accepts(server: ServerProcess, transport: int) -> bool:
    """Are newcomers still welcome?"""
    try:
        server.connect(transport)
    except OSError:
        return False
    return True


def test_draining_has_an_end(serve: Serve, images: Images, tmp_path: Path) -> None:
    where = ("--listen", f"unix:{tmp_path}/sock", "--drain-timeout", "0.5")
    server = serve(images.big, *where)
    wire = server.connect().enter("")
    wire.send(b"".join(wire.prepare(Command.READ, n * MIB, MIB) for n in range(32)))
    assert wire.sock.recv(1, socket.MSG_PEEK)
    server.terminate()
    server.terminate()  # an impatient operator changes nothing
    assert server.wait() == 0


def test_writes_that_were_answered_are_stored(
    serve: Serve, dialect: Dialect, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(16 * MIB))
    server = serve(image, "--write", "--listen", f"unix:{tmp_path}/sock")
    wire = server.connect().enter("", dialect)
    data = random.Random(1).randbytes(MIB)
    for n in range(16):
        wire.send(wire.prepare(Command.WRITE, n * MIB, payload=data) + data)
    server.terminate()
    stored = set()
    while wire.pending:
        try:
            answer = wire.answer()
        except (EOFError, ConnectionError):
            break
        assert answer.error in {Errno.OK, Errno.ESHUTDOWN}
        if not answer.error:
            stored.add(answer.asked.offset)
    assert server.wait() == 0
    content = image.read_bytes()
    assert all(content[offset : offset + MIB] == data for offset in stored)


def test_unix_socket_is_removed_and_port_is_free(server: ServerProcess, tmp_path: Path) -> None:
    assert (tmp_path / "sock").is_socket()
    server.terminate()
    assert server.wait() == 0
    assert not (tmp_path / "sock").exists()
    address = server.address(1)
    assert isinstance(address, tuple)
    with socket.create_server(address):
        pass


def test_hang_ups_and_many_short_connections(server: ServerProcess) -> None:
    """SIGHUP ends nothing and breaks nothing (CVE-2015-0847)."""
    for n in range(300):
        server.process.send_signal(signal.SIGHUP)
        wire = server.connect(n % 2)
        if n % 3:
            wire.enter("")
        if n % 5 == 0:
            assert len(wire.read(0, 512)) == 512 if n % 3 else True
        wire.reset()
    assert server.is_alive()
    assert len(server.connect().enter("").read(0, 512)) == 512


# --- from inside -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, 600])
async def test_requests_after_the_signal_get_eshutdown(
    images: Images, dialect: Dialect, tmp_path: Path, count: int
) -> None:
    """They lie in the socket when the server is told to stop: refused, not ignored."""
    async with running(tmp_path / "sock", images.disk, stop=False) as server:
        wire = Wire.connect(str(tmp_path / "sock"))
        try:
            await asyncio.to_thread(wire.enter, "disk", dialect)
            await asyncio.to_thread(wire.read, 0, 512)
            batch = [wire.prepare(Command.READ, 0, 4096) for _ in range(count)]
            batch.append(wire.prepare(Command.WRITE, 0, payload=bytes(4096)) + bytes(4096))
            batch += [wire.prepare(Command.FLUSH), wire.prepare(99)]
            wire.send(b"".join(batch))  # the loop, being busy here, sees none of it
            await server.stop()
            for _ in batch:
                answer = await asyncio.to_thread(wire.answer)
                assert answer.error == Errno.ESHUTDOWN
                assert bool(answer.text) == (dialect is not Dialect.SIMPLE)
            assert wire.is_closed()
        finally:
            wire.close()


async def test_a_client_that_stands_still_is_not_waited_for(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been stopped in the middle of its answers; the drain timeout is longer."""
    monkeypatch.setattr("nbdsrv.net.server.UNHEARD_S", 0.2)
    limits = Limits(drain_s=600)
    async with running(tmp_path / "sock", images.big, limits=limits, stop=False) as server:

        def ask() -> Wire:
            wire = Wire.connect(str(tmp_path / "sock")).enter("disk")
            wire.send(b"".join(wire.prepare(Command.READ, n * MIB, MIB) for n in range(32)))
            assert wire.sock.recv(1, socket.MSG_PEEK)
            return wire

        wire = await asyncio.to_thread(ask)
        async with asyncio.timeout(60):
            await server.stop()
        wire.close()
