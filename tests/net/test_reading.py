"""READ in all dialects: bytes, holes, limits, flags.

proto.md NBD_CMD_READ, "Structured reply chunk", "Size constraints"; reference rows "READ errors
structured after SR" to "READ 33 MiB".
"""

import random
import shutil
import socket
from pathlib import Path

import pytest
from served_images import DISK_SIZE, HUGE_FAR, HUGE_SIZE, MIB, Images, Serve
from serving import ServerProcess, eventually
from wire import Wire

from protocol.constants import Command, CommandFlag, Dialect, Errno, ReplyType
from tests.disk.evicting import evict

DF = CommandFlag.DF
TOO_MUCH = {
    Dialect.SIMPLE: Errno.EINVAL,
    Dialect.STRUCTURED: Errno.EOVERFLOW,
    Dialect.EXTENDED: Errno.EOVERFLOW,
}


def test_reads_of_all_shapes(readonly: ServerProcess, images: Images, dialect: Dialect) -> None:
    """Aligned and not, small and beyond sendfile's threshold, across holes, to the last byte."""
    wire = readonly.connect().enter("disk", dialect)
    shapes = [(0, 1), (0, 4096), (511, 1026), (MIB - 1, 2), (MIB - 100, MIB + 200)]
    shapes += [(2 * MIB - 1, 65537), (DISK_SIZE - 1, 1), (DISK_SIZE - 70_000, 70_000)]
    shapes += [(MIB, MIB), (MIB + 5, 10), (0, DISK_SIZE)]
    for offset, length in shapes:
        assert images.golden[offset : offset + length] == wire.read(offset, length)


def test_pipelined_reads_each_answered_once(
    readonly: ServerProcess, images: Images, dialect: Dialect
) -> None:
    """More than one turn's worth, in one send; ``Wire`` refuses a second reply to a cookie."""
    rng = random.Random(3)
    wire = readonly.connect().enter("disk", dialect)
    batch = b""
    for _ in range(1000):
        offset = rng.randrange(DISK_SIZE - 8192)
        batch += wire.prepare(Command.READ, offset, rng.choice([1, 512, 4096, 8192]))
    wire.send(batch)
    for _ in range(1000):
        answer = wire.answer()
        asked = answer.asked
        assert images.golden[asked.offset : asked.offset + asked.length] == answer.data()
    assert not wire.pending


def test_replies_keep_their_order_when_the_socket_fills_within_a_batch(
    readonly: ServerProcess, images: Images, dialect: Dialect
) -> None:
    """Small replies are built in memory, large ones sent from the file: none overtakes another."""
    wire = readonly.connect().enter("disk", dialect)
    wire.read(0, 1)
    asked = [(0, 65536 * (1 + n % 4)) if n % 2 else (n, 700) for n in range(120)]
    for _ in range(5):
        wire.send(b"".join(wire.prepare(Command.READ, *each) for each in asked))
        for _ in asked:
            answer = wire.answer()
            begin = answer.asked.offset
            assert images.golden[begin : begin + answer.asked.length] == answer.data()


def test_cookies_are_opaque_and_reusable(readonly: ServerProcess, dialect: Dialect) -> None:
    wire = readonly.connect().enter("disk", dialect)
    for cookie in (0, 1, 2**64 - 1, 2**63, 1):
        wire._cookie = cookie - 1
        assert wire.call(Command.READ, 0, 16).cookie == cookie


def test_two_requests_with_one_cookie_get_two_replies(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("disk", Dialect.SIMPLE)
    first = wire.prepare(Command.READ, 0, 16)
    wire.send(first + first)
    reply = wire.receive(32)
    assert wire.receive(32) == reply


@pytest.mark.parametrize("flags", [0, DF])
def test_hole_is_sent_as_a_hole_unless_df(
    readonly: ServerProcess, chunked: Dialect, flags: int
) -> None:
    wire = readonly.connect().enter("disk", chunked)
    answer = wire.call(Command.READ, MIB, 65536, flags)
    assert answer.data() == bytes(65536)
    assert (ReplyType.OFFSET_HOLE in answer.kinds) == (not flags)


def test_mixed_read_has_data_and_hole_chunks(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("disk", chunked)
    answer = wire.call(Command.READ, MIB - 4096, MIB + 8192)
    assert {ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE} <= set(answer.kinds)
    assert sum(length for _, length, data in answer.pieces if data is None) == MIB


@pytest.mark.parametrize("offset", [0, MIB - 32768, MIB, 2 * MIB - 1])
def test_df_within_64_kib_always_works(
    readonly: ServerProcess, images: Images, chunked: Dialect, offset: int
) -> None:
    wire = readonly.connect().enter("disk", chunked)
    for length in (1, 512, 65535, 65536):
        expected = images.golden[offset : offset + length]
        assert expected == wire.read(offset, length, DF)


def test_df_beyond_64_kib_is_whole_or_eoverflow(
    readonly: ServerProcess, images: Images, chunked: Dialect
) -> None:
    wire = readonly.connect().enter("disk", chunked)
    for offset, length in ((0, 65537), (MIB - 1, MIB + 2), (0, DISK_SIZE)):
        answer = wire.call(Command.READ, offset, length, DF)
        if answer.error != Errno.EOVERFLOW:
            assert images.golden[offset : offset + length] == answer.data()
            assert len(answer.pieces) == 1


def test_df_is_refused_in_simple_replies(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("disk", Dialect.SIMPLE)
    assert wire.call(Command.READ, 0, 512, DF).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


def test_zero_length_read(readonly: ServerProcess, dialect: Dialect) -> None:
    wire = readonly.connect().enter("disk", dialect)
    for offset in (0, 4096, DISK_SIZE):
        answer = wire.call(Command.READ, offset, 0)
        assert answer.error in {Errno.OK, Errno.EINVAL}
        assert answer.pieces == []
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (DISK_SIZE - 1, 2),
        (DISK_SIZE, 1),
        (DISK_SIZE + 1, 0),
        (2**63 - 1, 1),
        (2**64 - 1, 1),
        (2**64 - 512, 512),
        (0, DISK_SIZE + 1),
    ],
)
def test_read_beyond_the_end(
    readonly: ServerProcess, dialect: Dialect, offset: int, length: int
) -> None:
    """EINVAL, in a chunk with a text when chunks were agreed on (never a simple reply)."""
    wire = readonly.connect().enter("disk", dialect)
    answer = wire.call(Command.READ, offset, length)
    assert answer.error == Errno.EINVAL
    assert bool(answer.text) == (dialect is not Dialect.SIMPLE)
    assert len(wire.read(0, 512)) == 512


def test_read_of_32_mib(readonly: ServerProcess, images: Images, dialect: Dialect) -> None:
    wire = readonly.connect().enter("big", dialect)
    assert images.golden_big[5 : 5 + 32 * MIB] == wire.read(5, 32 * MIB)


@pytest.mark.parametrize("length", [32 * MIB + 1, 33 * MIB, 0xFFFFFFFF])
def test_read_beyond_the_maximum_payload_is_refused(
    readonly: ServerProcess, dialect: Dialect, length: int
) -> None:
    wire = readonly.connect().enter("huge", dialect)
    answer = wire.call(Command.READ, 0, length)
    assert answer.error == TOO_MUCH[dialect]
    assert answer.pieces == []
    assert len(wire.read(0, 512)) == 512


def test_reads_beyond_4_gib(readonly: ServerProcess, images: Images, dialect: Dialect) -> None:
    wire = readonly.connect().enter("huge", dialect)
    assert wire.size == HUGE_SIZE
    expected = bytes(512) + images.huge_block + bytes(512)
    assert expected == wire.read(HUGE_FAR - 512, 65536 + 1024)
    assert wire.read(HUGE_SIZE - 1, 1) == b"\0"
    assert wire.read((4 << 30) - 4096, 8192) == bytes(8192)


def test_cold_file_is_read_correctly(
    serve: Serve, images: Images, dialect: Dialect, tmp_path: Path
) -> None:
    """Nothing of it is in the page cache: all goes through the threads."""
    image = tmp_path / "cold"
    shutil.copy(images.big, image)
    server = serve(image, "--listen", f"unix:{tmp_path}/sock")
    wire = server.connect().enter("", dialect)
    rng = random.Random(4)
    for length in (512, 4096, 65536, MIB, 5 * MIB):
        evict(image)
        count = 8 if length <= MIB else 3
        batch = b""
        for _ in range(count):
            batch += wire.prepare(Command.READ, rng.randrange(40 * MIB - length), length)
        wire.send(batch)
        for _ in range(count):
            answer = wire.answer()
            start = answer.asked.offset
            assert images.golden_big[start : start + length] == answer.data()


@pytest.mark.parametrize("count", [16, 20, 40, 100])
def test_more_slow_reads_than_may_be_in_flight(
    serve: Serve, images: Images, tmp_path: Path, count: int
) -> None:
    """What had to wait for its turn, and then for its reader, is not forgotten."""
    server = serve(images.big, "--listen", f"unix:{tmp_path}/sock")
    wire = server.connect().enter("")
    wire.send(b"".join(wire.prepare(Command.READ, n % 40 * MIB, MIB) for n in range(count)))
    assert eventually(lambda: _queued(wire) > 100_000)  # the socket is full: a late reader
    for _ in range(count):
        answer = wire.answer()
        start = answer.asked.offset
        assert images.golden_big[start : start + MIB] == answer.data()


def _queued(wire: Wire) -> int:
    return len(wire.sock.recv(MIB, socket.MSG_PEEK))


@pytest.mark.parametrize(("size", "offset"), [(1, 0), (511, 510), (513, 512), (4097, 4096), (0, 0)])
def test_odd_sizes(serve: Serve, dialect: Dialect, tmp_path: Path, size: int, offset: int) -> None:
    image = tmp_path / "odd"
    golden = random.Random(size).randbytes(size)
    image.write_bytes(golden)
    wire = serve(image, "--listen", f"unix:{tmp_path}/sock").connect().enter("", dialect)
    assert wire.size == size
    assert golden == wire.read(0, size)
    assert golden[offset:] == wire.read(offset, size - offset)
    assert wire.call(Command.READ, offset, size - offset + 1).error == Errno.EINVAL


def test_half_close_is_answered_in_full(readonly: ServerProcess, images: Images) -> None:
    """A client that shuts its sending side has said all it has to say, not left."""
    wire = readonly.connect().enter("disk")
    wire.send(b"".join(wire.prepare(Command.READ, n * 4096, 65536) for n in range(64)))
    wire.sock.shutdown(socket.SHUT_WR)
    for _ in range(64):
        answer = wire.answer()
        start = answer.asked.offset
        assert images.golden[start : start + 65536] == answer.data()
    assert wire.is_closed()


def test_requests_arriving_byte_by_byte(
    readonly: ServerProcess, images: Images, dialect: Dialect
) -> None:
    wire = readonly.connect().enter("disk", dialect)
    batch = b"".join(wire.prepare(Command.READ, n * 512, 512) for n in range(4))
    for byte in batch:
        wire.send(bytes([byte]))
    for _ in range(4):
        answer = wire.answer()
        start = answer.asked.offset
        assert images.golden[start : start + 512] == answer.data()


def test_requests_pipelined_behind_the_handshake(readonly: ServerProcess, images: Images) -> None:
    """Requests may come in the same packet as EXPORT_NAME."""
    wire = readonly.connect()
    wire.receive(18)
    name = b"IHAVEOPT\0\0\0\1\0\0\0\4disk"
    wire.send(b"\0\0\0\3" + name + wire.prepare(Command.READ, 3, 100_000))
    wire.receive(10)
    assert images.golden[3:100_003] == wire.answer().data()
