"""Clients that leave without a word, at the worst moments; nothing stays behind.

CVE-2017-10664 (reply to a peer that is gone), CVE-2017-9524 (leaving before negotiation);
reference row "client resets with reads in flight". The fixtures compare descriptors.
"""

import random
import shutil
import socket
from pathlib import Path

import pytest
from served_images import MIB, Images, Serve
from serving import ServerProcess, eventually
from wire import Wire

from protocol.constants import Command, Dialect, Errno
from tests.disk.evicting import evict


@pytest.fixture
def server(serve: Serve, images: Images, tmp_path: Path) -> ServerProcess:
    """A copy of ``big``, for resets want TCP and cold files want their own."""
    image = tmp_path / "image"
    shutil.copy(images.big, image)
    return serve(image, "--write", "--listen", "127.0.0.1:0")


def baseline(server: ServerProcess) -> int:
    """Descriptors once whatever stays has been opened."""
    server.connect().enter("").disconnect()
    assert eventually(lambda: not server.opened(_image(server)))
    return server.descriptors()


def _image(server: ServerProcess) -> Path:
    arguments = server.process.args
    assert isinstance(arguments, list)
    return next(Path(word) for word in arguments if word.endswith("/image"))


def as_before(server: ServerProcess, before: int) -> None:
    """Nothing left open, and somebody else is served."""
    server.hang_up()
    assert eventually(lambda: server.descriptors() <= before)
    wire = server.connect().enter("")
    assert len(wire.read(0, 4096)) == 4096
    wire.disconnect()
    assert eventually(lambda: not server.opened(_image(server)))
    server.check_log()


@pytest.mark.parametrize("length", [512, 4096, 65536, MIB])
def test_reset_with_64_replies_queued(server: ServerProcess, dialect: Dialect, length: int) -> None:
    before = baseline(server)
    for _ in range(5):
        wire = server.connect(receive_buffer=4096).enter("", dialect)
        wire.send(b"".join(wire.prepare(Command.READ, n * 4096, length) for n in range(64)))
        wire.sock.recv(1, socket.MSG_PEEK)
        wire.reset()
    as_before(server, before)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_reset_at_once_after_64_reads(server: ServerProcess, dialect: Dialect, warm: bool) -> None:
    before = baseline(server)
    for _ in range(10):
        wire = server.connect().enter("", dialect)
        if not warm:
            evict(_image(server))
        wire.send(b"".join(wire.prepare(Command.READ, n * 500_000, 70_000) for n in range(64)))
        wire.reset()
    as_before(server, before)


def test_reset_with_writes_in_flight(server: ServerProcess, dialect: Dialect) -> None:
    before = baseline(server)
    data = random.Random(1).randbytes(70_000)
    for _ in range(10):
        wire = server.connect().enter("", dialect)
        for n in range(20):
            wire.send(wire.prepare(Command.WRITE, n * 70_000, payload=data) + data)
        wire.send(wire.prepare(Command.FLUSH))
        wire.reset()
    as_before(server, before)


def test_reset_with_everything_in_flight(server: ServerProcess, chunked: Dialect) -> None:
    before = baseline(server)
    rng = random.Random(2)
    commands = [Command.READ, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE]
    for _ in range(20):
        wire = server.connect().enter("", chunked, "base:allocation")
        batch = b""
        for _ in range(50):
            batch += wire.prepare(rng.choice(commands), 30 * MIB + rng.randrange(MIB), 4096)
            batch += wire.prepare(Command.BLOCK_STATUS, 0, 40 * MIB)
            batch += wire.prepare(Command.WRITE, 39 * MIB, payload=bytes(512)) + bytes(512)
        wire.send(batch[: rng.randrange(len(batch))])
        wire.reset()
    as_before(server, before)


def test_gone_before_the_greeting(server: ServerProcess) -> None:
    before = baseline(server)
    for n in range(200):
        wire = server.connect()
        if n % 2:
            wire.reset()
        else:
            wire.close()
    as_before(server, before)


def test_close_in_the_middle_of_a_large_payload(server: ServerProcess, dialect: Dialect) -> None:
    before = baseline(server)
    memory = server.resident()
    for _ in range(10):
        wire = server.connect().enter("", dialect)
        wire.send(wire.prepare(Command.WRITE, 0, payload=bytes(32 * MIB)) + bytes(MIB))
        wire.reset()
    as_before(server, before)
    assert server.resident() - memory < 100 * MIB


def test_others_go_on_while_clients_come_and_go(server: ServerProcess, images: Images) -> None:
    steady = server.connect().enter("")
    rng = random.Random(3)
    for n in range(100):
        guest: Wire = server.connect().enter("", Dialect(n % 3))
        guest.send(b"".join(guest.prepare(Command.READ, k * 4096, 65536) for k in range(20)))
        guest.reset()
        offset = rng.randrange(39 * MIB)
        assert images.golden_big[offset : offset + 8192] == steady.read(offset, 8192)
    assert steady.call(Command.FLUSH).error == Errno.OK
