"""An image that turns out shorter than it was: the good part, then EIO, and life goes on.

proto.md NBD_REPLY_TYPE_ERROR_OFFSET; reference row "I/O error in the middle of a structured
READ", where qemu-nbd drops the connection.
"""

import os
import random
import socket
from pathlib import Path

import pytest
from served_images import MIB, Serve
from serving import ServerProcess, eventually
from wire import Wire

from protocol.constants import Command, CommandFlag, Dialect, Errno, ReplyType

SIZE = 24 * MIB
CUT = 300_001
DF = CommandFlag.DF


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(9).randbytes(SIZE))
    return path


@pytest.fixture
def server(serve: Serve, image: Path, tmp_path: Path) -> ServerProcess:
    return serve(image, "--listen", f"unix:{tmp_path}/sock")


RANGES = [
    (CUT - 100, 4096),  # small
    (CUT - 100_000, 200_000),  # sendfile
    (0, 2 * MIB),
    (0, 8 * MIB),  # more than one probe
]


@pytest.mark.parametrize("known", [True, False], ids=["read-before", "never-read"])
@pytest.mark.parametrize("flags", [0, DF])
def test_good_part_then_error_with_its_offset(
    server: ServerProcess, image: Path, chunked: Dialect, flags: int, known: bool
) -> None:
    golden = image.read_bytes()
    wire = server.connect().enter("", chunked)
    if known:
        wire.read(0, 8 * MIB)  # the layout, as it was
    os.truncate(image, CUT)
    for offset, length in RANGES:
        answer = wire.call(Command.READ, offset, length, flags)
        assert answer.error == Errno.EIO
        assert answer.text
        assert answer.error_offset == CUT
        assert golden[offset:CUT] == answer.good()
        assert answer.kinds[-1] is ReplyType.ERROR_OFFSET
    assert golden[: CUT - 1] == wire.read(0, CUT - 1)


def test_wholly_missing_range(server: ServerProcess, image: Path, dialect: Dialect) -> None:
    wire = server.connect().enter("", dialect)
    wire.read(0, 8 * MIB)
    os.truncate(image, CUT)
    for offset, length in ((CUT, 1), (MIB, 4096), (2 * MIB, 100_000), (SIZE - 1, 1)):
        answer = wire.call(Command.READ, offset, length)
        assert answer.error == Errno.EIO
        assert answer.good() == b""
    assert len(wire.read(0, 4096)) == 4096


def test_simple_reply_is_eio(server: ServerProcess, image: Path) -> None:
    golden = image.read_bytes()
    wire = server.connect().enter("", Dialect.SIMPLE)
    wire.read(0, 8 * MIB)
    os.truncate(image, CUT)
    for offset, length in RANGES:
        assert wire.call(Command.READ, offset, length).error == Errno.EIO
    assert golden[:CUT] == wire.read(0, CUT)


def test_pipelined_reads_around_the_cut(
    server: ServerProcess, image: Path, dialect: Dialect
) -> None:
    golden = image.read_bytes()
    wire = server.connect().enter("", dialect)
    wire.read(0, 8 * MIB)
    os.truncate(image, CUT)
    batch = [(n * 10_000, 4096) for n in range(64)] + [(n * 70_000, 70_000) for n in range(10)]
    wire.send(b"".join(wire.prepare(Command.READ, *place) for place in batch))
    for _ in batch:
        answer = wire.answer()
        start, end = answer.asked.offset, answer.asked.offset + answer.asked.length
        if end <= CUT:
            assert golden[start:end] == answer.data()
        else:
            assert answer.error == Errno.EIO


def test_image_that_grows_back_is_read_again(server: ServerProcess, image: Path) -> None:
    golden = image.read_bytes()
    wire = server.connect().enter("")
    os.truncate(image, CUT)
    assert wire.call(Command.READ, MIB, 4096).error == Errno.EIO
    image.write_bytes(golden)
    assert golden[:MIB] == wire.read(0, MIB)


def test_truncated_under_a_reply_that_waits_for_its_reader(
    server: ServerProcess, image: Path, chunked: Dialect
) -> None:
    """The length was promised; what is missing is padded, and called an error afterwards."""
    golden = image.read_bytes()
    wire = _reader_that_waits(server, chunked)
    os.truncate(image, 0)
    errors = 0
    for _ in range(8):
        answer = wire.answer()
        start = answer.asked.offset
        if answer.error:
            assert answer.error == Errno.EIO
            errors += 1
        else:
            assert golden[start : start + 2 * MIB] == answer.data()
    assert errors
    assert wire.call(Command.READ, 0, 512).error == Errno.EIO
    os.truncate(image, MIB)
    assert wire.read(0, 512) == bytes(512)


def test_truncated_under_a_simple_reply_disconnects(server: ServerProcess, image: Path) -> None:
    """There is no way to take a simple reply back, and padding would be wrong content."""
    golden = image.read_bytes()
    wire = _reader_that_waits(server, Dialect.SIMPLE)
    os.truncate(image, 0)
    good = 0
    while True:
        try:
            answer = wire.answer()
        except (EOFError, ConnectionError):
            break
        if answer.error:
            assert answer.error == Errno.EIO
        else:
            start = answer.asked.offset
            assert golden[start : start + 2 * MIB] == answer.data()
            good += 1
        if not wire.pending:
            break
    assert good < 8
    other = server.connect().enter("", Dialect.SIMPLE)
    assert other.size == 0


def _reader_that_waits(server: ServerProcess, dialect: Dialect) -> Wire:
    """Eight replies of 2 MiB are due, the first has begun, the rest is not in the socket."""
    wire = server.connect().enter("", dialect)
    wire.read(0, 16 * MIB)
    before = server.resident()
    wire.send(b"".join(wire.prepare(Command.READ, n * 2 * MIB, 2 * MIB) for n in range(8)))
    # Bytes are waiting: the first reply has begun, and 16 MiB do not fit any socket.
    assert eventually(lambda: _peek(wire) > 0)
    assert server.resident() - before < 64 * MIB
    return wire


def _peek(wire: Wire) -> int:
    return len(wire.sock.recv(16, socket.MSG_PEEK))
