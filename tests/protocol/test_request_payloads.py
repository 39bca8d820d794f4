"""Which bytes belong to a request, and what a BLOCK_STATUS payload says.

::

    compact    WRITE: length bytes            all others: none, whatever their flags
    extended   PAYLOAD_LEN: length bytes      without it none, also for WRITE
"""

import tracemalloc
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import headers, structs
from protocol.constants import Command, CommandFlag, Dialect, Errno, TransmissionFlag
from protocol.requests import MAX_PAYLOAD, Framing, Request, Rules, parse_status_payload
from protocol.terms import BlockSizes

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
COMPACT = st.sampled_from([Dialect.SIMPLE, Dialect.STRUCTURED])
PAYLOAD_LEN = CommandFlag.PAYLOAD_LEN


# --- framing -----------------------------------------------------------------------------------


@given(COMPACT, U16, U16, U32)
def test_in_compact_requests_only_write_has_a_payload(
    dialect: Dialect, command: int, flags: int, length: int
) -> None:
    expected = length if command == 1 else 0
    assert expected == Framing(dialect).payload_length(Request(command, flags, 0, 0, length))


@given(COMPACT, U16, U32)
def test_in_compact_requests_flags_do_not_change_the_payload_of_write(
    dialect: Dialect, flags: int, length: int
) -> None:
    assert length == Framing(dialect).payload_length(Request(1, flags, 0, 0, length))


@given(U16, U16, U64)
def test_in_extended_requests_the_flag_alone_decides(command: int, flags: int, length: int) -> None:
    expected = length if flags & 0x20 else 0
    framing = Framing(Dialect.EXTENDED)
    assert expected == framing.payload_length(Request(command, flags, 0, 0, length))


@given(st.sampled_from(Dialect), st.sampled_from(Command), st.integers(0, 127), st.integers(0, 60))
def test_a_stream_of_requests_stays_in_sync_whatever_is_refused(
    dialect: Dialect, command: Command, flags: int, length: int
) -> None:
    """The payload of a refused request is consumed: the next header is where it should be."""
    extended = dialect is Dialect.EXTENDED
    twin = structs.ExtendedRequest if extended else structs.Request
    frame = headers.EXTENDED_REQUEST if extended else headers.REQUEST
    first = {"flags": flags, "type": command, "cookie": 1, "offset": 1 << 40, "length": length}
    second = {"flags": 0, "type": Command.READ, "cookie": 2, "offset": 0, "length": 512}
    carries = flags & PAYLOAD_LEN if extended else command is Command.WRITE
    payload = b"\xaa" * length if carries else b""
    stream = twin.build(first) + payload + twin.build(second)

    key, cookie, offset, size = frame.unpack_from(stream, 0)
    decoded = Request(key & 0xFFFF, key >> 16 & 0xFFFF, cookie, offset, size)
    following = frame.size + Framing(dialect).payload_length(decoded)
    assert (command, flags, 1, 1 << 40, length) == (
        decoded.command,
        decoded.flags,
        decoded.cookie,
        decoded.offset,
        decoded.length,
    )
    assert 2 == frame.unpack_from(stream, following)[1]


def test_payloads_up_to_32_mib_are_taken() -> None:
    """proto.md: up to 2^25 bytes SHOULD NOT be considered a denial of service."""
    assert MAX_PAYLOAD >= 1 << 25


# --- the payload of BLOCK_STATUS ---------------------------------------------------------------

KNOWN = {1: "base:allocation", 2: "qemu:dirty-bitmap:monday", 0xFFFFFFFF: "x-own:last"}
IDS = st.lists(st.sampled_from([*KNOWN]), min_size=1, max_size=3, unique=True)


@given(U64, IDS)
def test_effect_length_and_ids_are_taken_in_the_clients_order(length: int, ids: list[int]) -> None:
    payload = structs.StatusPayload.build({"length": length, "contexts": ids})
    assert (length, tuple(ids)) == parse_status_payload(payload, KNOWN)


@given(U64, st.lists(st.integers(0, 3), max_size=5))
def test_unknown_and_repeated_ids_are_malformed(length: int, ids: list[int]) -> None:
    payload = structs.StatusPayload.build({"length": length, "contexts": ids})
    legal = 0 < len(ids) == len(set(ids)) and set(ids) <= set(KNOWN)
    assert ((length, tuple(ids)) if legal else None) == parse_status_payload(payload, KNOWN)


@given(st.binary(max_size=40))
def test_payloads_of_any_kind_are_parsed_or_refused(payload: bytes) -> None:
    parsed = parse_status_payload(payload, KNOWN)
    if parsed is not None:
        built = structs.StatusPayload.build({"length": parsed[0], "contexts": parsed[1]})
        assert payload == built


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0" * 4,
        b"\0" * 7,
        pack(">Q", 512),
        pack(">QI", 512, 1)[:-1],
        pack(">QI", 512, 1) + b"\0",
        pack(">QI", 512, 3),
        pack(">QII", 512, 1, 1),
        pack(">QIII", 512, 1, 2, 1),
        pack(">Q", 512) + pack(">I", 1) * 100_000,
    ],
    ids=lambda payload: f"{len(payload)} bytes ending {payload[-5:].hex()}",
)
def test_malformed_payloads_are_refused(payload: bytes) -> None:
    assert parse_status_payload(payload, KNOWN) is None


def test_ids_beyond_the_known_ones_are_refused_without_being_unpacked() -> None:
    """A payload may have 32 MiB; eight million numbers would take ten times as much."""
    payload = pack(">Q", 512) + bytes(4 << 20)
    tracemalloc.start()
    try:
        assert parse_status_payload(payload, KNOWN) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_without_contexts_no_payload_is_legal() -> None:
    assert parse_status_payload(pack(">QI", 512, 1), {}) is None


# --- a status request with a payload is judged in two steps ------------------------------------


def judge() -> Rules:
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return Rules(
        size=4096,
        flags=flags,
        dialect=Dialect.EXTENDED,
        block_sizes=BlockSizes(),
        has_contexts=True,
    )


def test_the_length_of_a_payload_is_not_taken_for_a_range() -> None:
    """12 bytes of payload about the last sector are not 12 bytes beyond the end."""
    asked = Request(Command.BLOCK_STATUS, PAYLOAD_LEN, 1, 4095, 12)
    assert judge().check(asked) is None


@pytest.mark.parametrize(
    ("offset", "effect", "refused"),
    [
        (0, 4096, False),
        (4095, 1, False),
        (0, 0, True),
        (0, 4097, True),
        (4095, 12, True),
        (1, 2**64 - 1, True),
    ],
)
def test_the_effect_length_is_judged_once_it_is_known(
    offset: int, effect: int, refused: bool
) -> None:
    refusal = judge().check_range(Command.BLOCK_STATUS, offset, effect)
    assert refused == (refusal is not None)
    assert refusal is None or refusal[0] is Errno.EINVAL
