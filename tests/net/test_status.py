"""BLOCK_STATUS: extents against the image, 32 and 64 bits, payload filters.

proto.md NBD_CMD_BLOCK_STATUS; CVE-2025-47711 (extents of 4 GiB), CVE-2025-47712 (0xfffff200).
"""

import struct

import pytest
from served_images import DISK_SIZE, HUGE_FAR, HUGE_SIZE, MIB
from serving import ServerProcess
from transcript import Answer
from wire import Wire

from protocol.constants import Allocation, Command, CommandFlag, Dialect, Errno

ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"
DATA, HOLE = 0, int(Allocation.HOLE | Allocation.ZERO)
BLOCK = 1 << 16
STATUS, PAYLOAD, REQ_ONE = Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN, CommandFlag.REQ_ONE
Extents = list[tuple[int, int]]

DISK_MAP = [(MIB, DATA), (MIB, HOLE), (MIB + 777, DATA)]
HUGE_MAP = [
    (BLOCK, DATA),
    (HUGE_FAR - BLOCK, HOLE),
    (BLOCK, DATA),
    (HUGE_SIZE - HUGE_FAR - BLOCK, HOLE),
]


def whole_map(wire: Wire, context: str = ALLOCATION) -> list[tuple[int, int]]:
    """Ask again from where the last answer ended, until the end; equal neighbours merged."""
    merged: list[tuple[int, int]] = []
    offset = 0
    while offset < wire.size:
        length = wire.size - offset
        if wire.dialect is not Dialect.EXTENDED:
            length = min(length, 0xFFFFFFFF)
        for span, flags in status(wire, offset, length)[context]:
            if merged and merged[-1][1] == flags:
                merged[-1] = (merged[-1][0] + span, flags)
            else:
                merged.append((span, flags))
            offset += span
    assert offset == wire.size
    return merged


def status(
    wire: Wire, offset: int, length: int, flags: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Extents by context name; the last one within the image."""
    answer = wire.call(STATUS, offset, length, flags)
    assert answer.error == Errno.OK, answer.text
    by_id = {number: name for name, number in wire.contexts.items()}
    found = {by_id[number]: extents for number, extents in answer.statuses.items()}
    assert set(found) == set(wire.contexts)
    for extents in found.values():
        assert offset + sum(span for span, _ in extents) <= wire.size
    return found


def filtered(wire: Wire, offset: int, length: int, *contexts: int) -> Answer:
    """BLOCK_STATUS with a payload."""
    payload = struct.pack(f">Q{len(contexts)}I", length, *contexts)
    return wire.call(STATUS, offset, payload=payload)


def test_map_of_the_image(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("disk", chunked, ALLOCATION)
    assert whole_map(wire) == DISK_MAP


def test_map_beyond_4_gib(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("huge", chunked, ALLOCATION)
    assert whole_map(wire) == HUGE_MAP


def test_two_contexts_at_once(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("disk", chunked, ALLOCATION, DEPTH)
    found = status(wire, 0, DISK_SIZE)
    assert found[ALLOCATION] == DISK_MAP
    assert found[DEPTH] == [(MIB, 1), (MIB, 0), (MIB + 777, 1)]


@pytest.mark.parametrize("flags", [0, REQ_ONE])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFF200, 0xFFFF0000, 1 << 31, 0x80000001])
@pytest.mark.parametrize("offset", [0, BLOCK, 512, HUGE_FAR])
def test_status_of_lengths_about_4_gib(
    readonly: ServerProcess, chunked: Dialect, offset: int, length: int, flags: int
) -> None:
    wire = readonly.connect().enter("huge", chunked, ALLOCATION)
    if offset + length > HUGE_SIZE:
        length = HUGE_SIZE - offset
    extents = status(wire, offset, length, flags)[ALLOCATION]
    at = offset
    for span, state in extents:
        assert state == state_at(at)
        at += span


def state_at(offset: int) -> int:
    """What HUGE_MAP says."""
    at = 0
    for span, flags in HUGE_MAP:
        at += span
        if offset < at:
            return flags
    raise AssertionError(offset)


def test_64_bit_extent_in_one_reply(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("huge", Dialect.EXTENDED, ALLOCATION)
    extents = status(wire, BLOCK, HUGE_FAR - BLOCK)[ALLOCATION]
    assert extents == [(HUGE_FAR - BLOCK, HOLE)]  # more than 4 GiB


@pytest.mark.parametrize("offset", [0, 1, MIB - 1, MIB, 2 * MIB - 512, DISK_SIZE - 1])
def test_req_one(readonly: ServerProcess, chunked: Dialect, offset: int) -> None:
    """``Answer`` checks: exactly one extent, not longer than asked for."""
    wire = readonly.connect().enter("disk", chunked, ALLOCATION)
    for length in (1, 512, DISK_SIZE - offset):
        if offset + length <= DISK_SIZE:
            assert len(status(wire, offset, length, REQ_ONE)[ALLOCATION]) == 1


def test_status_without_a_context(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("disk", chunked)
    assert wire.call(STATUS, 0, 512).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


def test_status_in_simple_replies(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("disk", Dialect.SIMPLE)
    assert wire.call(STATUS, 0, 512).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


def test_contexts_of_another_export_are_void(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect()
    wire.greet()
    wire.use(chunked)
    wire.select("huge", ALLOCATION)
    wire.go("disk")
    assert wire.call(STATUS, 0, 512).error == Errno.EINVAL


@pytest.mark.parametrize("queries", [[], ["base:"], ["x-other:thing"]])
def test_second_set_replaces_the_first(
    readonly: ServerProcess, chunked: Dialect, queries: list[str]
) -> None:
    wire = readonly.connect()
    wire.greet()
    wire.use(chunked)
    wire.select("disk", ALLOCATION)
    wire.select("disk", *queries)
    wire.go("disk")
    assert wire.call(STATUS, 0, 512).error == Errno.EINVAL


@pytest.mark.parametrize("data", [b"", b"\0\0\0\7nothing\0\0\0\0", b"\0\0\0\4disk\0\0\0\1"])
def test_set_replaces_even_when_it_fails(
    readonly: ServerProcess, chunked: Dialect, data: bytes
) -> None:
    wire = readonly.connect()
    wire.greet()
    wire.use(chunked)
    wire.select("disk", ALLOCATION)
    assert wire.verdict(10, data) >= 1 << 31
    wire.go("disk")
    assert wire.call(STATUS, 0, 512).error == Errno.EINVAL


@pytest.mark.parametrize(
    ("offset", "length"),
    [(DISK_SIZE, 1), (0, DISK_SIZE + 1), (2**64 - 1, 1), (2**63, 0xFFFFFFFF), (DISK_SIZE - 1, 2)],
)
def test_status_beyond_the_end(
    readonly: ServerProcess, chunked: Dialect, offset: int, length: int
) -> None:
    wire = readonly.connect().enter("disk", chunked, ALLOCATION)
    assert wire.call(STATUS, offset, length).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


def test_status_of_nothing_keeps_the_connection(readonly: ServerProcess, chunked: Dialect) -> None:
    wire = readonly.connect().enter("disk", chunked, ALLOCATION)
    assert wire.call(STATUS, 0, 0).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


# --- payload filter, extended headers only ----------------------------------------------------


def both(server: ServerProcess) -> Wire:
    """Two contexts selected."""
    return server.connect().enter("disk", Dialect.EXTENDED, ALLOCATION, DEPTH)


def test_payload_filters_contexts(readonly: ServerProcess) -> None:
    wire = both(readonly)
    for name, number in wire.contexts.items():
        answer = filtered(wire, 0, DISK_SIZE, number)
        assert set(answer.statuses) == {number}, name
    answer = filtered(wire, MIB, 2 * MIB, *wire.contexts.values())
    assert set(answer.statuses) == set(wire.contexts.values())
    assert answer.statuses[wire.contexts[ALLOCATION]] == [(MIB, HOLE), (MIB, DATA)]


@pytest.mark.parametrize("contexts", [(), (99,), (1, 1), (1, 2, 1), (1, 99), (0,), (0xFFFFFFFF,)])
def test_payload_with_wrong_contexts(readonly: ServerProcess, contexts: tuple[int, ...]) -> None:
    wire = both(readonly)
    assert filtered(wire, 0, 512, *contexts).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("size", [1, 4, 7, 9, 10, 13, 100_000, 200_000, MIB])
def test_payload_of_a_wrong_size(readonly: ServerProcess, size: int) -> None:
    wire = both(readonly)
    payload = struct.pack(">QI", 512, 1).ljust(size, b"\0")[:size]
    answer = wire.call(STATUS, payload=payload)
    assert answer.error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("length", [0, DISK_SIZE + 1, 2**64 - 1])
def test_payload_with_a_wrong_effect(readonly: ServerProcess, length: int) -> None:
    wire = both(readonly)
    assert filtered(wire, 0, length, wire.contexts[DEPTH]).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("offset", [0, MIB, DISK_SIZE + 1, 2**64 - 1])
def test_status_announcing_an_empty_payload(readonly: ServerProcess, offset: int) -> None:
    wire = both(readonly)
    assert wire.call(STATUS, offset, 0, PAYLOAD).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6, 8, 99])
@pytest.mark.parametrize("size", [1, 4096, 150_000])
def test_unexpected_payload_is_consumed(readonly: ServerProcess, command: int, size: int) -> None:
    """Otherwise its bytes would be taken for requests."""
    wire = both(readonly)
    answer = wire.call(command, payload=b"\x21\xe4\x1c\x71" * (size // 4) + b"x" * (size % 4))
    assert answer.error in {Errno.EINVAL, Errno.EPERM}
    assert len(wire.read(0, 512)) == 512


def test_status_payload_without_contexts(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("disk", Dialect.EXTENDED)
    assert filtered(wire, 0, 512, 1).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512


def test_write_without_payload_length(readonly: ServerProcess) -> None:
    """Then there is no payload, and the length is an effect."""
    wire = both(readonly)
    assert wire.call(Command.WRITE, 0, 512).error in {Errno.EINVAL, Errno.EPERM}
    assert len(wire.read(0, 512)) == 512


def test_payload_flag_in_compact_requests(readonly: ServerProcess) -> None:
    wire = readonly.connect().enter("disk", Dialect.STRUCTURED, ALLOCATION)
    assert wire.call(STATUS, 0, 512, PAYLOAD).error == Errno.EINVAL
    assert wire.call(Command.READ, 0, 512, PAYLOAD).error == Errno.EINVAL
    assert len(wire.read(0, 512)) == 512
