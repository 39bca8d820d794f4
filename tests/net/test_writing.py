"""Writes and everything else that changes an image, seen through the wire and in the file.

proto.md NBD_CMD_WRITE, FLUSH, TRIM, WRITE_ZEROES, "Ordering of messages and writes".
"""

import os
import random
from pathlib import Path

import pytest
from served_images import MIB, SCRATCH_SIZE, Scratch, Serve
from serving import ServerProcess
from wire import Wire

from protocol.constants import (
    Allocation,
    Command,
    CommandFlag,
    Dialect,
    Errno,
    TransmissionFlag,
)

FUA, NO_HOLE, FAST_ZERO = CommandFlag.FUA, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO
ZEROES = Command.WRITE_ZEROES


def payload(seed: int, length: int) -> bytes:
    """Bytes that compare unequal to anything else here."""
    return random.Random(seed).randbytes(length)


def test_everything_a_file_can_do_is_offered(writable: ServerProcess) -> None:
    offered = writable.connect().enter("", Dialect.STRUCTURED).flags
    for name in ("FLUSH", "FUA", "TRIM", "WRITE_ZEROES", "FAST_ZERO", "CACHE"):
        assert TransmissionFlag[f"SEND_{name}"] in offered
    assert TransmissionFlag.CAN_MULTI_CONN in offered
    assert TransmissionFlag.READ_ONLY not in offered


@pytest.mark.parametrize("flags", [0, FUA])
def test_writes_of_all_shapes(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, flags: int
) -> None:
    wire = writable.connect().enter("", dialect)
    model = bytearray(scratch.golden)
    shapes = [(0, 1), (511, 2), (4096, 4096), (5000, 65536), (70_001, 131_072)]
    shapes += [(MIB - 1, MIB + 3), (3 * MIB, 5 * MIB), (SCRATCH_SIZE - 1, 1)]
    for seed, (offset, length) in enumerate(shapes):
        data = payload(seed, length)
        wire.write(offset, data, flags)
        model[offset : offset + length] = data
        assert data == wire.read(offset, length)
    assert bytes(model) == scratch.bytes()


def test_write_of_32_mib(serve: Serve, dialect: Dialect, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    os.truncate(image, 40 * MIB)
    server = serve(image, "--write", "--listen", f"unix:{tmp_path}/sock")
    data = payload(1, 32 * MIB)
    server.connect().enter("", dialect).write(5, data)
    assert data == server.connect().enter("", dialect).read(5, 32 * MIB)
    assert data == image.read_bytes()[5 : 5 + 32 * MIB]


def test_overlapping_writes_one_after_the_other(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    wire = writable.connect().enter("", dialect)
    model = bytearray(scratch.golden)
    for seed in range(50):
        offset, length = 10_000 - seed * 37, 3000 + seed * 101
        data = payload(seed, length)
        wire.write(offset, data)
        model[offset : offset + length] = data
    assert bytes(model) == scratch.bytes()


def test_pipelined_writes_of_all_sizes(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    """Disjoint ones: what is in flight together has no order."""
    wire = writable.connect().enter("", dialect)
    model = bytearray(scratch.golden)
    rng = random.Random(5)
    offset, stream, count = 0, b"", 0
    while offset < 6 * MIB:
        length = rng.choice([1, 100, 512, 4096, 4096, 4096, 70_000, 300_000])
        data = rng.randbytes(length)
        flags = rng.choice([0, 0, FUA])
        stream += wire.prepare(Command.WRITE, offset, 0, flags, data) + data
        model[offset : offset + length] = data
        offset += length + rng.choice([0, 0, 0, 13])
        count += 1
    wire.send(stream)
    for _ in range(count):
        assert wire.answer().error == Errno.OK
    assert not wire.pending
    assert bytes(model) == scratch.bytes()


def test_payload_arriving_in_dribbles(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    wire = writable.connect().enter("", dialect)
    data = payload(6, 4 * MIB + 321)
    stream = wire.prepare(Command.WRITE, 777, payload=data) + data
    rng = random.Random(7)
    at = 0
    while at < len(stream):
        step = rng.choice([1, 2, 7, 100, 5000, 20_000, 100_000])
        wire.send(stream[at : at + step])
        at += step
    assert wire.answer().error == Errno.OK
    assert data == scratch.bytes()[777 : 777 + len(data)]


def test_requests_interleave_with_a_payload_that_arrives_slowly(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    slow, quick = (writable.connect().enter("", dialect) for _ in range(2))
    data = payload(8, MIB)
    stream = slow.prepare(Command.WRITE, 0, payload=data) + data
    for at in range(0, len(stream), 100_000):
        slow.send(stream[at : at + 100_000])
        assert scratch.golden[2 * MIB : 2 * MIB + 512] == quick.read(2 * MIB, 512)
    assert slow.answer().error == Errno.OK
    assert data == quick.read(0, MIB)


def test_reply_to_a_write_makes_it_visible_everywhere(
    writable: ServerProcess, scratch: Scratch
) -> None:
    """CAN_MULTI_CONN was promised."""
    wires = [writable.connect().enter("", dialect) for dialect in Dialect]
    for seed in range(30):
        writer = wires[seed % 3]
        data = payload(seed, 5000)
        writer.write(seed * 777, data)
        for reader in wires:
            assert data == reader.read(seed * 777, 5000)
        assert writer.call(Command.FLUSH).error == Errno.OK


def test_write_into_a_hole_is_read_back(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    """What is known of the layout must not outlive a write."""
    wire = writable.connect().enter("", dialect)
    assert wire.call(Command.TRIM, 0, 4 * MIB).error == Errno.OK
    assert wire.read(0, 4 * MIB) == bytes(4 * MIB)
    assert wire.read(MIB, 4096) == bytes(4096)
    wire.write(MIB + 100, b"data")
    assert wire.read(MIB, 4096) == bytes(100) + b"data" + bytes(3992)
    assert wire.read(MIB - MIB // 2, MIB)[MIB // 2 + 100 :][:4] == b"data"


# --- TRIM, WRITE_ZEROES -----------------------------------------------------------------------


def test_trim_punches_a_hole(writable: ServerProcess, scratch: Scratch, dialect: Dialect) -> None:
    wire = writable.connect().enter("", dialect)
    before = settled(scratch)
    assert wire.call(Command.TRIM, MIB, 4 * MIB).error == Errno.OK
    assert scratch.allocated() <= before - 4 * MIB + 65536
    assert bytes(4 * MIB) == wire.read(MIB, 4 * MIB)
    assert scratch.golden[:MIB] == wire.read(0, MIB)
    assert scratch.golden[5 * MIB :] == wire.read(5 * MIB, 3 * MIB)


def test_trim_may_only_round_inwards(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    wire = writable.connect().enter("", dialect)
    assert wire.call(Command.TRIM, 4097, 20_001).error == Errno.OK
    assert scratch.golden[:4097] == wire.read(0, 4097)
    end = 4097 + 20_001
    assert scratch.golden[end : end + 9000] == wire.read(end, 9000)


@pytest.mark.parametrize("flags", [0, NO_HOLE, FUA, FAST_ZERO, NO_HOLE | FUA])
@pytest.mark.parametrize(("offset", "length"), [(MIB, 4 * MIB), (1, 1), (4095, 8194), (0, 65536)])
def test_write_zeroes(
    writable: ServerProcess,
    scratch: Scratch,
    dialect: Dialect,
    flags: int,
    offset: int,
    length: int,
) -> None:
    wire = writable.connect().enter("", dialect)
    answer = wire.call(ZEROES, offset, length, flags)
    model = bytearray(scratch.golden)
    if answer.error == Errno.ENOTSUP:
        assert flags & FAST_ZERO
    else:
        assert answer.error == Errno.OK
        model[offset : offset + length] = bytes(length)
    assert bytes(model) == scratch.bytes()
    assert bytes(model) == wire.read(0, SCRATCH_SIZE)


def test_no_hole_keeps_the_space(
    writable: ServerProcess, scratch: Scratch, chunked: Dialect
) -> None:
    wire = writable.connect().enter("", chunked, "base:allocation")
    before = settled(scratch)
    assert wire.call(ZEROES, MIB, 4 * MIB, NO_HOLE).error == Errno.OK
    assert settled(scratch) >= before - 65536
    assert bytes(4 * MIB) == wire.read(MIB, 4 * MIB)


def test_zeroes_without_no_hole_free_the_space(
    writable: ServerProcess, scratch: Scratch, chunked: Dialect
) -> None:
    wire = writable.connect().enter("", chunked, "base:allocation")
    before = settled(scratch)
    assert wire.call(ZEROES, MIB, 4 * MIB).error == Errno.OK
    assert scratch.allocated() <= before - 4 * MIB + 65536
    answer = wire.call(Command.BLOCK_STATUS, MIB, 4 * MIB)
    hole = int(Allocation.HOLE | Allocation.ZERO)
    assert list(answer.statuses.values()) == [[(4 * MIB, hole)]]


def test_zeroes_are_not_limited_by_the_payload(serve: Serve, tmp_path: Path) -> None:
    """A request without payload may be as long as its field allows; never EOVERFLOW."""
    image = tmp_path / "image"
    image.write_bytes(payload(1, MIB))
    os.truncate(image, 6 << 30)
    server = serve(image, "--write", "--listen", f"unix:{tmp_path}/sock")
    for dialect in Dialect:
        wire = server.connect().enter("", dialect)
        for command in (Command.TRIM, ZEROES, Command.CACHE):
            assert wire.call(command, 0, 0xFFFFFFFF).error == Errno.OK
        if dialect is Dialect.EXTENDED:
            assert wire.call(ZEROES, 0, 6 << 30).error == Errno.OK
            assert wire.call(Command.TRIM, 0, 6 << 30).error == Errno.OK
        assert wire.read(0, MIB) == bytes(MIB)


@pytest.mark.parametrize("command", [Command.FLUSH, Command.CACHE])
def test_harmless_commands(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, command: Command
) -> None:
    wire = writable.connect().enter("", dialect)
    length = 0 if command is Command.FLUSH else SCRATCH_SIZE
    assert wire.call(command, 0, length).error == Errno.OK
    assert scratch.golden == scratch.bytes()


def test_fast_zero_is_refused_where_it_was_not_offered(
    readonly: ServerProcess, dialect: Dialect
) -> None:
    """The request that aborts nbdkit 1.32 and 1.42."""
    wire: Wire = readonly.connect().enter("disk", dialect)
    assert TransmissionFlag.SEND_FAST_ZERO not in wire.flags
    assert wire.call(ZEROES, 0, 4096, FAST_ZERO).error in {Errno.EPERM, Errno.EINVAL}
    assert len(wire.read(0, 512)) == 512


def settled(scratch: Scratch) -> int:
    """Allocation once the file system has decided on it."""
    fd = os.open(scratch.path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return scratch.allocated()
