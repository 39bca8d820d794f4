"""Requests that are refused: the exact error, and the stream in sync afterwards.

proto.md "Request types", "Error values", "Terminating the transmission phase"; reference rows
"write OOB" to "WRITE 2 GiB-1".
"""

import socket
import time

import pytest
from served_images import DISK_SIZE, MIB, SCRATCH_SIZE, Scratch
from serving import ServerProcess
from wire import Wire, request

from protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Dialect,
    Errno,
    TransmissionFlag,
)

PAYLOAD = CommandFlag.PAYLOAD_LEN
FUA = CommandFlag.FUA


def in_sync(wire: Wire) -> None:
    """The next request is understood."""
    assert len(wire.read(0, 4096)) == 4096
    assert not wire.pending


@pytest.mark.parametrize("command", [8, 9, 255, 0xFFFF])
def test_unknown_command(readonly: ServerProcess, dialect: Dialect, command: int) -> None:
    """RESIZE is one of them: it was not offered."""
    wire = readonly.connect().enter("disk", dialect)
    assert wire.call(command, 0, 4096).error == Errno.EINVAL
    in_sync(wire)


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("flags", [1 << 6, 1 << 15])
def test_unknown_flag(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, command: int, flags: int
) -> None:
    wire = writable.connect().enter("", dialect)
    length = 0 if command == Command.FLUSH else 512
    assert wire.call(command, 0, length, flags).error == Errno.EINVAL
    in_sync(wire)
    assert scratch.golden == scratch.bytes()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (Command.READ, CommandFlag.NO_HOLE),
        (Command.READ, CommandFlag.REQ_ONE),
        (Command.READ, CommandFlag.FAST_ZERO),
        (Command.TRIM, CommandFlag.DF),
        (Command.TRIM, CommandFlag.NO_HOLE),
        (Command.CACHE, CommandFlag.REQ_ONE),
        (Command.WRITE_ZEROES, CommandFlag.DF),
        (Command.WRITE_ZEROES, CommandFlag.REQ_ONE),
        (Command.BLOCK_STATUS, CommandFlag.DF),
        (Command.BLOCK_STATUS, CommandFlag.FAST_ZERO),
    ],
)
def test_flag_of_another_command(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, command: int, flags: int
) -> None:
    wire = writable.connect().enter("", dialect)
    assert wire.call(command, 0, 512, flags).error == Errno.EINVAL
    in_sync(wire)
    assert scratch.golden == scratch.bytes()


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6])
def test_fua_is_legal_on_every_command_once_offered(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, command: int
) -> None:
    wire = writable.connect().enter("", dialect)
    assert TransmissionFlag.SEND_FUA in wire.flags
    length = 0 if command == Command.FLUSH else 512
    assert wire.call(command, 0, length, FUA).error == Errno.OK
    assert scratch.golden[512:] == scratch.bytes()[512:]


def test_what_a_read_only_export_offers(readonly: ServerProcess, dialect: Dialect) -> None:
    wire = readonly.connect().enter("disk", dialect)
    assert TransmissionFlag.READ_ONLY in wire.flags
    for flag in ("SEND_TRIM", "SEND_WRITE_ZEROES", "SEND_FAST_ZERO", "SEND_RESIZE"):
        assert TransmissionFlag[flag] not in wire.flags


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES])
def test_changing_a_read_only_export(
    readonly: ServerProcess, dialect: Dialect, command: Command
) -> None:
    wire = readonly.connect().enter("disk", dialect)
    assert wire.call(command, 0, 4096).error == Errno.EPERM
    in_sync(wire)


@pytest.mark.parametrize("length", [1, 4096, 100_000, 131_072, 3 * MIB, 32 * MIB])
def test_write_to_a_read_only_export_is_consumed(
    readonly: ServerProcess, dialect: Dialect, length: int
) -> None:
    wire = readonly.connect().enter("disk", dialect)
    assert wire.call(Command.WRITE, 0, payload=bytes(length)).error == Errno.EPERM
    in_sync(wire)


@pytest.mark.parametrize("command", [Command.FLUSH, Command.READ, Command.CACHE])
def test_fua_that_was_not_offered(readonly: ServerProcess, command: Command) -> None:
    wire = readonly.connect().enter("disk")
    if TransmissionFlag.SEND_FUA not in wire.flags:
        length = 0 if command is Command.FLUSH else 512
        assert wire.call(command, 0, length, FUA).error == Errno.EINVAL
    in_sync(wire)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SCRATCH_SIZE - 1, 2),
        (SCRATCH_SIZE, 1),
        (SCRATCH_SIZE - 4096, 3 * MIB),
        (2**64 - 1, 512),
        (2**63, 512),
    ],
)
def test_write_beyond_the_end_is_enospc(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, offset: int, length: int
) -> None:
    wire = writable.connect().enter("", dialect)
    assert wire.call(Command.WRITE, offset, payload=b"x" * length).error == Errno.ENOSPC
    in_sync(wire)
    assert scratch.golden == scratch.bytes()


@pytest.mark.parametrize(
    ("command", "errno"),
    [
        (Command.WRITE_ZEROES, Errno.ENOSPC),
        (Command.TRIM, Errno.EINVAL),
        (Command.CACHE, Errno.EINVAL),
        (Command.READ, Errno.EINVAL),
    ],
)
@pytest.mark.parametrize(
    ("offset", "length"), [(SCRATCH_SIZE - 1, 2), (SCRATCH_SIZE, 1), (2**64 - 1, 0xFFFFFFFF)]
)
def test_beyond_the_end(
    writable: ServerProcess,
    scratch: Scratch,
    dialect: Dialect,
    command: Command,
    errno: Errno,
    offset: int,
    length: int,
) -> None:
    wire = writable.connect().enter("", dialect)
    assert wire.call(command, offset, length).error == errno
    in_sync(wire)
    assert scratch.golden == scratch.bytes()


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (2**64 - 1, 0xFFFFFFFF)])
def test_flush_with_offset_or_length(
    writable: ServerProcess, dialect: Dialect, offset: int, length: int
) -> None:
    wire = writable.connect().enter("", dialect)
    assert wire.call(Command.FLUSH, offset, length).error == Errno.EINVAL
    in_sync(wire)


@pytest.mark.parametrize(
    "command", [Command.READ, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, Command.WRITE]
)
def test_zero_length_never_disconnects(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, command: Command
) -> None:
    wire = writable.connect().enter("", dialect)
    payload = b"" if command is Command.WRITE else None
    assert wire.call(command, 4096, 0, payload=payload).error in {Errno.OK, Errno.EINVAL}
    in_sync(wire)
    assert scratch.golden == scratch.bytes()


# --- what only closing can answer -------------------------------------------------------------


@pytest.mark.parametrize(
    "magic", [0, 0x25609514, 0x12560953, 0x96744668, 0x67446698, EXTENDED_REQUEST_MAGIC]
)
def test_bad_request_magic_closes(readonly: ServerProcess, magic: int) -> None:
    wire = readonly.connect().enter("disk")
    wire.send(request(Command.READ, 0, 512, magic=magic) + bytes(100))
    assert wire.is_closed()


@pytest.mark.parametrize("magic", [REQUEST_MAGIC, 0])
def test_compact_request_after_extended_headers_closes(readonly: ServerProcess, magic: int) -> None:
    wire = readonly.connect().enter("disk", Dialect.EXTENDED)
    wire.send(request(Command.READ, 0, 512, magic=magic, extended=True))
    assert wire.is_closed()


def test_replies_before_a_bad_magic_are_delivered(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("disk")
    wire.read(0, 4096)  # from here on these reads need no waiting
    good = b"".join(wire.prepare(Command.READ, 0, 4096) for _ in range(10))
    wire.send(good + bytes(28))
    for _ in range(10):
        assert len(wire.answer().data()) == 4096
    assert wire.is_closed()


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFFFFFFFF, 64 * MIB + 1])
def test_write_header_of_2_gib_allocates_nothing(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect, length: int
) -> None:
    """Refused by the header alone, be it with an error or by closing (CVE-2005-3534)."""
    wire = writable.connect().enter("", dialect)
    before = writable.resident()
    started = time.monotonic()
    flags = PAYLOAD if dialect is Dialect.EXTENDED else 0
    wire.send(wire.prepare(Command.WRITE, 0, length, flags))
    try:
        assert wire.answer().error != Errno.OK
    except (EOFError, ConnectionError):
        pass
    assert time.monotonic() - started < 5
    assert writable.resident() - before < 16 * MIB
    assert len(writable.connect().enter("", dialect).read(0, 4096)) == 4096
    assert scratch.golden == scratch.bytes()


def test_payload_of_2_to_the_63_closes(writable: ServerProcess, scratch: Scratch) -> None:
    for command in (Command.WRITE, Command.READ, Command.BLOCK_STATUS, Command.FLUSH, 99):
        for length in (2**63, 2**64 - 1, 1 << 32):
            wire = writable.connect().enter("", Dialect.EXTENDED)
            wire.send(wire.prepare(command, 0, length, PAYLOAD))
            try:
                assert wire.answer().error == Errno.EINVAL
            except (EOFError, ConnectionError):
                continue
            assert wire.is_closed()
    assert scratch.golden == scratch.bytes()


# --- disconnecting ----------------------------------------------------------------------------


def test_disc_with_64_reads_in_flight_gets_64_replies(
    readonly: ServerProcess, dialect: Dialect
) -> None:
    wire = readonly.connect().enter("disk", dialect)
    batch = b"".join(wire.prepare(Command.READ, n * 1000, 20_000) for n in range(64))
    wire.send(batch + wire.prepare(Command.DISC))
    for _ in range(64):
        assert len(wire.answer().data()) == 20_000
    assert not wire.pending
    assert wire.is_closed()


def test_disc_with_slow_requests_in_flight_gets_all_replies(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    """Writes, flushes and zeroes are done by threads while DISC is already known."""
    wire = writable.connect().enter("", dialect)
    batch = b""
    for n in range(16):
        header = wire.prepare(Command.WRITE, n * 4096, payload=b"w" * 4096)
        batch += header + b"w" * 4096
        batch += wire.prepare(Command.FLUSH)
        batch += wire.prepare(Command.WRITE_ZEROES, MIB + n * 4096, 4096)
    wire.send(batch + wire.prepare(Command.DISC))
    for _ in range(48):
        assert wire.answer().error == Errno.OK
    assert wire.is_closed()
    expected = b"w" * 65536 + scratch.golden[65536:MIB] + bytes(65536)
    assert expected == scratch.bytes()[: MIB + 65536]


def test_client_that_leaves_in_the_middle_of_a_payload(
    writable: ServerProcess, scratch: Scratch, dialect: Dialect
) -> None:
    """Nothing of a write that never came whole is stored."""
    for length in (100, 4096, 200_000, 4 * MIB):
        wire = writable.connect().enter("", dialect)
        header = wire.prepare(Command.WRITE, 0, payload=b"x" * length)
        wire.send(header + b"x" * (length - 1))
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.is_closed()
    assert scratch.golden == scratch.bytes()


def test_header_cut_in_half(readonly: ServerProcess, dialect: Dialect) -> None:
    wire = readonly.connect().enter("disk", dialect)
    wire.send(wire.prepare(Command.READ, 0, 512)[:-1])
    wire.sock.shutdown(socket.SHUT_WR)
    assert wire.is_closed()


def test_every_refusal_has_a_text(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("disk", chunked)
    asked = [(99, 0, 0), (Command.READ, DISK_SIZE, 1), (Command.TRIM, 0, 1), (Command.FLUSH, 1, 1)]
    for command, offset, length in asked:
        answer = wire.call(command, offset, length)
        assert answer.error
        assert 0 < len(answer.text.encode()) <= 4096
