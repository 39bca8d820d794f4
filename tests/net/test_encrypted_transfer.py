"""Transmission over TLS: the same bytes, the same refusals, a proper end.

Reference rows "rejected WRITE over TLS, next request", "DISC with 64 reads in flight"; proto.md:
the TLS session is shut down on DISC.
"""

import random
from pathlib import Path

import pytest
from authority import Certificates
from encrypted import plain, secure
from served_images import DISK_SIZE, MIB, Images
from serving import ServerProcess
from wire import Wire

from protocol.constants import Command, CommandFlag, Dialect, Errno, Option, Reply, ReplyType


def entered(server: ServerProcess, certificates: Certificates, dialect: Dialect) -> Wire:
    """In transmission over TLS."""
    wire = secure(server, certificates.client_context())
    wire.use(dialect)
    if dialect is Dialect.SIMPLE:
        wire.export_name("disk" if len(server.uris) > 1 else "")
    else:
        wire.go("disk" if len(server.uris) > 1 else "")
    return wire


def test_reads_over_tls(
    forced: ServerProcess, certificates: Certificates, images: Images, dialect: Dialect
) -> None:
    wire = entered(forced, certificates, dialect)
    shapes = [(0, 1), (0, DISK_SIZE), (511, 70_000), (MIB - 1, 2), (DISK_SIZE - 1, 1)]
    for offset, length in shapes:
        assert images.golden[offset : offset + length] == wire.read(offset, length)
    batch = b"".join(wire.prepare(Command.READ, n * 1000, 20_000) for n in range(64))
    wire.send(batch + wire.prepare(Command.DISC))
    for _ in range(64):
        answer = wire.answer()
        start = answer.asked.offset
        assert images.golden[start : start + 20_000] == answer.data()
    assert wire.is_closed()


def test_32_mib_over_tls(forced: ServerProcess, certificates: Certificates, images: Images) -> None:
    wire = secure(forced, certificates.client_context())
    wire.use(Dialect.STRUCTURED)
    wire.go("big")
    assert images.golden_big[7 : 7 + 32 * MIB] == wire.read(7, 32 * MIB)


@pytest.mark.parametrize("length", [1, 4096, 100_000, 131_072, 3 * MIB])
def test_rejected_write_over_tls_stays_in_sync(
    forced: ServerProcess, certificates: Certificates, dialect: Dialect, length: int
) -> None:
    """nbdkit skips the payload on the raw socket, beneath TLS, and hangs."""
    wire = entered(forced, certificates, dialect)
    assert wire.call(Command.WRITE, 0, payload=bytes(length)).error == Errno.EPERM
    assert len(wire.read(0, 4096)) == 4096


def test_writes_over_tls(
    encrypted_scratch: tuple[ServerProcess, Path], certificates: Certificates, dialect: Dialect
) -> None:
    server, image = encrypted_scratch
    wire = entered(server, certificates, dialect)
    model = bytearray(image.read_bytes())
    rng = random.Random(2)
    for offset, length in ((0, 1), (100, 5000), (9999, 131_072), (MIB, 4 * MIB + 1)):
        data = rng.randbytes(length)
        wire.write(offset, data, CommandFlag.FUA)
        model[offset : offset + length] = data
        assert data == wire.read(offset, length)
    data = rng.randbytes(300_000)
    stream = wire.prepare(Command.WRITE, 0, payload=data) + data
    for at in range(0, len(stream), 7001):
        wire.send(stream[at : at + 7001])
    assert wire.answer().error == Errno.OK
    model[: len(data)] = data
    assert bytes(model) == image.read_bytes()


def test_hole_is_a_hole_over_tls(forced: ServerProcess, certificates: Certificates) -> None:
    wire = entered(forced, certificates, Dialect.EXTENDED)
    assert wire.call(Command.READ, MIB, MIB).kinds == [ReplyType.OFFSET_HOLE]


def test_disc_ends_with_close_notify(forced: ServerProcess, certificates: Certificates) -> None:
    wire = plain(forced)
    assert wire.verdict(Option.STARTTLS) == Reply.ACK
    sock = certificates.client_context().wrap_socket(
        wire.sock, server_hostname="localhost", suppress_ragged_eofs=False
    )
    wire.sock = sock
    wire.go("disk")
    wire.request(Command.DISC)
    assert sock.recv(1) == b""  # without close_notify: SSLEOFError
