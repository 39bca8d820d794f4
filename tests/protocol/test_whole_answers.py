"""A READ answered in one piece takes a shorter way through the client: it must end alike."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.answers import Answer, Data, Done
from protocol.connection import ClientConnection
from protocol.constants import Dialect, TransmissionFlag
from protocol.errors import RemoteProtocolError
from protocol.headers import (
    DATA_DONE_KEY,
    EXTENDED_DATA,
    EXTENDED_DATA_DONE_KEY,
    SIMPLE_OK,
    SIMPLE_WORDS,
    STRUCTURED_DATA,
)
from protocol.terms import BlockSizes, Negotiated

SIZE = 1 << 20


def connection(dialect: Dialect) -> ClientConnection:
    return ClientConnection(
        Negotiated(
            export="",
            size=SIZE,
            flags=TransmissionFlag.HAS_FLAGS,
            dialect=dialect,
            contexts={},
            blocks=BlockSizes(),
        )
    )


def header(dialect: Dialect, cookie: int, asked: int, offset: int, length: int) -> bytes:
    if dialect is Dialect.SIMPLE:
        return SIMPLE_WORDS.pack(SIMPLE_OK, cookie)
    if dialect is Dialect.STRUCTURED:
        return STRUCTURED_DATA.pack(DATA_DONE_KEY, cookie, length + 8, offset)
    return EXTENDED_DATA.pack(EXTENDED_DATA_DONE_KEY, cookie, asked, length + 8, offset)


def told(answers: Sequence[Answer]) -> tuple[dict[int, bytes], list[int]]:
    """The bytes by cookie, put together, and who is done in which order."""
    data: dict[int, bytes] = {}
    done = []
    for answer in answers:
        if isinstance(answer, Data):
            data[answer.cookie] = data.get(answer.cookie, b"") + bytes(answer.data)
        elif isinstance(answer, Done):
            assert answer.failure is None
            done.append(answer.cookie)
    return data, done


@given(
    dialect=st.sampled_from(list(Dialect)),
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=8),
)
def test_however_the_stream_is_cut(dialect: Dialect, lengths: list[int], cuts: list[int]) -> None:
    client = connection(dialect)
    stream, expected, order = b"", {}, []
    for number, length in enumerate(lengths):
        offset = number * 8192
        cookie, _ = client.read(offset, length)
        content = bytes([number + 1]) * length
        stream += header(dialect, cookie, offset, offset, length) + content
        expected[cookie] = content
        order.append(cookie)
    answers: list[Answer] = []
    at = turn = 0
    held = []
    while at < len(stream):
        count = cuts[turn % len(cuts)] * (1 if turn % 3 else 40)
        piece = stream[at : at + count]
        held.append(piece)  # Data are views of it
        answers += client.receive_data(piece)
        at += count
        turn += 1
    assert told(answers) == (expected, order)
    assert not client.inflight


@pytest.mark.parametrize("dialect", [Dialect.STRUCTURED, Dialect.EXTENDED])
@pytest.mark.parametrize(
    ("offset", "length"), [(4095, 512), (4096, 513), (4097, 511 + 2), (0, 4096), (SIZE, 1)]
)
def test_what_was_not_asked_for_is_refused(dialect: Dialect, offset: int, length: int) -> None:
    client = connection(dialect)
    cookie, _ = client.read(4096, 512)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(header(dialect, cookie, 4096, offset, length) + bytes(length))


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_second_answer_is_refused(dialect: Dialect) -> None:
    client = connection(dialect)
    cookie, _ = client.read(0, 512)
    answer = header(dialect, cookie, 0, 0, 512) + bytes(512)
    assert told(client.receive_data(answer))[1] == [cookie]
    with pytest.raises(RemoteProtocolError):
        client.receive_data(answer)


def test_after_a_part_of_it_the_whole_is_refused() -> None:
    client = connection(Dialect.STRUCTURED)
    cookie, _ = client.read(0, 512)
    part = struct.pack(">IHHQIQ", 0x668E33EF, 0, 1, cookie, 8 + 100, 0) + bytes(100)
    client.receive_data(part)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(header(Dialect.STRUCTURED, cookie, 0, 0, 512) + bytes(512))
