"""Replies as the encoders build them, taken apart with construct: every kind, every dialect.

::

    simple      | header:16 |                       one per request
    structured  | header:20 | payload | ...         DONE on the last
    extended    | header:32 | payload | ...         and the request's offset echoed
"""

import errno as os_errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import structs
from protocol.constants import MAX_STATUS_EXTENTS, MAX_STRING, Dialect, Errno, ReplyFlag, ReplyType
from protocol.extents import DATA, HOLE, ZERO, ExtentList
from protocol.replies import ChunkEncoder, SimpleEncoder, encoder, wire_errno

U32 = st.integers(1, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
ERRNOS = st.sampled_from([errno for errno in Errno if errno])
EXTENDED = st.booleans()
DONE = int(ReplyFlag.DONE)
EURO = "\N{EURO SIGN}"
chunked = pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])


def chunk(data: bytes, *, extended: bool, follows: int = 0) -> tuple[Any, bytes]:
    """Header and payload of exactly one chunk, of which ``follows`` bytes are not sent yet."""
    twin = structs.ExtendedChunk if extended else structs.StructuredChunk
    header = twin.parse(data)
    payload = data[twin.sizeof() :]
    assert header.length == len(payload) + follows
    return header, payload


def check_header(
    header: Any, kind: ReplyType, flags: int, cookie: int, at: int, *, extended: bool
) -> None:
    assert (kind, flags, cookie) == (header.type, header.flags, header.cookie)
    if extended:
        assert at == header.offset


# --- simple ------------------------------------------------------------------------------------


@given(U64, U64)
def test_simple_success_is_sixteen_bytes(cookie: int, at: int) -> None:
    built = structs.SimpleReply.build({"error": 0, "cookie": cookie})
    assert built == SimpleEncoder().done(cookie, at)
    assert built == SimpleEncoder().data_header(cookie, at, at, 512, done=True)


@given(U64, U64, ERRNOS, st.text(), st.none() | U64)
def test_a_simple_error_is_its_number_and_nothing_else(
    cookie: int, at: int, errno: Errno, text: str, offset: int | None
) -> None:
    reply = SimpleEncoder().error(cookie, at, errno, text, offset=offset)
    assert structs.SimpleReply.build({"error": errno, "cookie": cookie}) == reply


def test_simple_replies_have_neither_holes_nor_status() -> None:
    assert not hasattr(SimpleEncoder(), "hole")
    assert not hasattr(SimpleEncoder(), "status")


# --- chunks ------------------------------------------------------------------------------------


@given(EXTENDED, U64, U64)
def test_done_is_an_empty_chunk(extended: bool, cookie: int, at: int) -> None:
    header, payload = chunk(ChunkEncoder(extended=extended).done(cookie, at), extended=extended)
    check_header(header, ReplyType.NONE, DONE, cookie, at, extended=extended)
    assert b"" == payload


@given(EXTENDED, U64, U64, U64, st.integers(1, 2**32 - 9), st.booleans())
def test_a_data_header_promises_its_length_and_the_offset_before_it(
    extended: bool, cookie: int, at: int, offset: int, length: int, done: bool
) -> None:
    built = ChunkEncoder(extended=extended).data_header(cookie, at, offset, length, done=done)
    header, payload = chunk(built, extended=extended, follows=length)
    check_header(header, ReplyType.OFFSET_DATA, DONE * done, cookie, at, extended=extended)
    parsed = structs.OffsetData.parse(payload)
    assert (offset, b"") == (parsed.offset, parsed.data)


@given(EXTENDED, U64, U64, U64, U32, st.booleans())
def test_a_hole_is_twelve_bytes(
    extended: bool, cookie: int, at: int, offset: int, length: int, done: bool
) -> None:
    built = ChunkEncoder(extended=extended).hole(cookie, at, offset, length, done=done)
    header, payload = chunk(built, extended=extended)
    check_header(header, ReplyType.OFFSET_HOLE, DONE * done, cookie, at, extended=extended)
    assert structs.OffsetHole.build({"offset": offset, "length": length}) == payload


@given(EXTENDED, U64, U64, ERRNOS, st.text(max_size=50))
def test_an_error_carries_its_text_and_ends_the_reply(
    extended: bool, cookie: int, at: int, errno: Errno, text: str
) -> None:
    built = ChunkEncoder(extended=extended).error(cookie, at, errno, text)
    header, payload = chunk(built, extended=extended)
    check_header(header, ReplyType.ERROR, DONE, cookie, at, extended=extended)
    words = text.encode()
    fields = {"error": errno, "text_length": len(words), "text": words}
    assert structs.ErrorChunk.build(fields) == payload


@given(EXTENDED, U64, U64, ERRNOS, st.text(max_size=50), U64)
def test_an_error_at_a_known_place_names_it(
    extended: bool, cookie: int, at: int, errno: Errno, text: str, offset: int
) -> None:
    built = ChunkEncoder(extended=extended).error(cookie, at, errno, text, offset=offset)
    header, payload = chunk(built, extended=extended)
    check_header(header, ReplyType.ERROR_OFFSET, DONE, cookie, at, extended=extended)
    words = text.encode()
    fields = {"error": errno, "text_length": len(words), "text": words, "offset": offset}
    assert structs.ErrorOffsetChunk.build(fields) == payload


@chunked
def test_an_error_at_the_first_byte_of_the_export_has_a_place(extended: bool) -> None:
    built = ChunkEncoder(extended=extended).error(1, 0, Errno.EIO, offset=0)
    assert ReplyType.ERROR_OFFSET == chunk(built, extended=extended)[0].type


@chunked
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * MAX_STRING, b"x" * MAX_STRING),
        ("x" * (MAX_STRING + 1), b"x" * MAX_STRING),
        ("x" * 70_000, b"x" * MAX_STRING),
        (EURO * MAX_STRING, EURO.encode() * 1365),
        ("x" + EURO * MAX_STRING, b"x" + EURO.encode() * 1365),
        ("xx" + EURO * MAX_STRING, b"xx" + EURO.encode() * 1364),
        ("\N{GRINNING FACE}" * MAX_STRING, "\N{GRINNING FACE}".encode() * 1024),
        ("caf\udce9", b"caf?"),
    ],
    ids=["full", "one more", "beyond 16 bits", "euro", "x euro", "xx euro", "face", "surrogate"],
)
@pytest.mark.parametrize("offset", [None, 77], ids=["nowhere", "somewhere"])
def test_a_long_text_is_cut_between_characters(
    extended: bool, text: str, expected: bytes, offset: int | None
) -> None:
    """CVE-2020-10761: what quotes a client's words does not outgrow its field."""
    built = ChunkEncoder(extended=extended).error(1, 2, Errno.EIO, text, offset=offset)
    payload = chunk(built, extended=extended)[1]
    parsed = structs.ErrorChunk.parse(payload)
    assert expected == parsed.text
    assert 6 + len(expected) + (0 if offset is None else 8) == len(payload)


# --- status ------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(U32, st.sampled_from([DATA, ZERO, HOLE])), min_size=1, max_size=9)


def statuses(chunks: list[bytes], *, extended: bool) -> list[tuple[int, list[tuple[int, int]]]]:
    """(context, extents) of every chunk; DONE must be on the last and nowhere else."""
    twin = structs.BlockStatusExt if extended else structs.BlockStatus
    kind = ReplyType.BLOCK_STATUS_EXT if extended else ReplyType.BLOCK_STATUS
    found = []
    for index, data in enumerate(chunks, start=1):
        header, payload = chunk(data, extended=extended)
        check_header(header, kind, DONE * (index == len(chunks)), 5, 6, extended=extended)
        parsed = twin.parse(payload)
        assert twin.build(parsed) == payload
        if extended:
            assert len(parsed.extents) == parsed.count
        found.append((parsed.context, [(e.length, e.flags) for e in parsed.extents]))
    return found


@given(EXTENDED, st.dictionaries(U32, PAIRS, min_size=1, max_size=4))
def test_one_chunk_per_context_and_done_on_the_last(
    extended: bool, contexts: dict[int, list[tuple[int, int]]]
) -> None:
    lists = {
        number: ExtentList(6, [(length % 2**28 + 1, flags) for length, flags in pairs])
        for number, pairs in contexts.items()
    }
    chunks = ChunkEncoder(extended=extended).status(5, 6, lists.items())
    expected = [(n, [(e.length, e.flags) for e in found]) for n, found in lists.items()]
    assert expected == statuses(chunks, extended=extended)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFE00, 0x80000000])
def test_extents_of_nearly_four_gigabytes_fit_structured_replies(length: int) -> None:
    """CVE-2025-47711, CVE-2025-47712: the last length of 32 bits is one."""
    chunks = ChunkEncoder(extended=False).status(5, 6, [(1, ExtentList(6, [(length, HOLE)]))])
    assert [(1, [(length, HOLE)])] == statuses(chunks, extended=False)


@given(st.integers(1, 2**63), U64)
def test_extended_status_has_64_bits_for_length_and_flags(length: int, flags: int) -> None:
    chunks = ChunkEncoder(extended=True).status(5, 6, [(1, ExtentList(6, [(length, flags)]))])
    assert [(1, [(length, flags)])] == statuses(chunks, extended=True)


@chunked
@pytest.mark.parametrize("more", [0, 1])
def test_a_chunk_has_at_most_two_to_the_twenty_extents(extended: bool, more: int) -> None:
    count = MAX_STATUS_EXTENTS + more
    extents = ExtentList(0, ((512, n % 2) for n in range(count)))
    (built,) = ChunkEncoder(extended=extended).status(5, 6, [(1, extents)])
    header = (structs.ExtendedChunk if extended else structs.StructuredChunk).parse(built)
    sent = min(count, MAX_STATUS_EXTENTS)
    overhead, each = (8, 16) if extended else (4, 8)
    assert overhead + each * sent == header.length
    if extended:
        assert sent == int.from_bytes(built[36:40], "big")
    last_length, last_flags = built[-each : -each // 2], built[-each // 2 :]
    assert (512, (sent - 1) % 2) == (
        int.from_bytes(last_length, "big"),
        int.from_bytes(last_flags, "big"),
    )


# --- errno -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (os_errno.EPERM, Errno.EPERM),
        (os_errno.EACCES, Errno.EPERM),
        (os_errno.EROFS, Errno.EPERM),
        (os_errno.EIO, Errno.EIO),
        (os_errno.ENOMEM, Errno.ENOMEM),
        (os_errno.EINVAL, Errno.EINVAL),
        (os_errno.ENOSPC, Errno.ENOSPC),
        (os_errno.EDQUOT, Errno.ENOSPC),
        (os_errno.EFBIG, Errno.ENOSPC),
        (os_errno.EOVERFLOW, Errno.EOVERFLOW),
        (os_errno.EOPNOTSUPP, Errno.ENOTSUP),
        (os_errno.ESHUTDOWN, Errno.ESHUTDOWN),
        (os_errno.ENOENT, Errno.EINVAL),
        (os_errno.EBADF, Errno.EINVAL),
        (os_errno.ESTALE, Errno.EIO),
        (os_errno.ECONNREFUSED, Errno.EIO),
        (0, Errno.EINVAL),
        (-1, Errno.EINVAL),
        (99999, Errno.EINVAL),
        (None, Errno.EIO),
    ],
)
def test_system_errors_as_the_wire_knows_them(number: int | None, expected: Errno) -> None:
    assert expected is wire_errno(number)


@given(st.integers() | st.sampled_from([*os_errno.errorcode]))
def test_no_system_error_becomes_success(number: int) -> None:
    assert wire_errno(number) in set(Errno) - {Errno.OK}


@pytest.mark.parametrize(
    ("dialect", "length"),
    [(Dialect.SIMPLE, 16), (Dialect.STRUCTURED, 20), (Dialect.EXTENDED, 32)],
    ids=str,
)
def test_each_dialect_has_its_encoder(dialect: Dialect, length: int) -> None:
    assert length == len(encoder(dialect).done(1, 2))
