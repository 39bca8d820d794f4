"""The server's handshake against clients that cannot or will not speak it.

::

    valid options --mutate--> bytes --split--> Haggle

Whatever comes, the machine raises nothing, holds no more than one option and what one receive
brings, sends well-formed replies only, and without TLS asks for nothing where TLS is required.
NBDSRV_FUZZ multiplies the work: 10 is ten times as much.
"""

import os
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from haggling import (
    FIXED,
    NO_ZEROES,
    NOBODY_KNOWS,
    Haggle,
    answers,
    client_flags,
    info_data,
    meta_data,
    naming,
    option,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from protocol.constants import MAX_OPTION_LENGTH, MAX_STRING, Dialect, Option
from protocol.handshake.events import Close, Event, OpenExport, StartTls, State, TlsMode, Transmit

TIMES = int(os.environ.get("NBDSRV_FUZZ", "1"))
SEEDS = range(10 * TIMES)
PER_SEED = 1000
PIECE = 4096
"""Bytes one receive brings at most, as in nbdsrv."""
MOST_HELD = 16 + MAX_OPTION_LENGTH + PIECE

NAMES = ["", "disk", "sectors", "elsewhere", "n" * MAX_STRING]
QUERIES = ["", "base:", "base:allocation", "qemu:dirty-bitmap:monday", "x-:", "q" * 300]


def check_replies(haggle: Haggle) -> None:
    """Everything that was sent is a well-formed option reply, but for EXPORT_NAME's."""
    sent = haggle.sent
    if isinstance(haggle.last, Transmit):
        asked = [event for event in haggle.events if isinstance(event, OpenExport)][-1]
        if asked.option is Option.EXPORT_NAME:
            length = 10 if NO_ZEROES in haggle.machine._client else 134
            sent = sent[:-length]
    for answer in answers(sent):
        assert answer.reply in {1, 2, 3, 4, *range(2**31 + 1, 2**31 + 11)}
        if answer.reply & 1 << 31:
            assert len(answer.data) <= MAX_STRING
            answer.data.decode()


def check_secrecy(haggle: Haggle) -> None:
    """Where TLS is required nothing is asked of the shell before it."""
    for event in haggle.events:
        if isinstance(event, StartTls):
            return
        assert isinstance(event, Close), event


def check(haggle: Haggle, mode: TlsMode) -> None:
    assert haggle.peak <= MOST_HELD
    assert haggle.state not in {State.ASKING, State.UPGRADING}
    check_replies(haggle)
    if mode is TlsMode.REQUIRED:
        check_secrecy(haggle)
    if isinstance(haggle.last, Transmit):
        assert haggle.last.agreement.tls == (StartTls() in haggle.events)


def deliver(haggle: Haggle, data: bytes, cuts: list[int]) -> bytes:
    """Feed data in pieces until the handshake is over; returns what nobody read."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in pairwise(edges):
        for at in range(start, end, PIECE):
            if haggle.over:
                return data[at:]
            haggle.feed(data[at : min(end, at + PIECE)])
    return b""


# --- random and mutated handshakes -------------------------------------------------------------


def random_option(rng: random.Random) -> bytes:
    number = rng.choice([*Option, NOBODY_KNOWS, 0, 0xFFFFFFFF])
    name = rng.choice(NAMES)
    kind = rng.random()
    if kind < 0.2:
        return option(number, rng.randbytes(rng.choice([0, 1, 6, 8, 100])))
    if number in {Option.INFO, Option.GO}:
        return option(number, info_data(name, [rng.randrange(6) for _ in range(rng.randrange(5))]))
    if number in {Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}:
        return option(number, meta_data(name, rng.choices(QUERIES, k=rng.randrange(5))))
    return option(number, naming(number, name))


def flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray) -> None:
    word = rng.choice(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0", b"\0\0\x10\1"]
    )
    at = rng.randrange(len(data))
    data[at : at + 4] = word


def insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randrange(20))


def delete(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(20)]


def repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(64)]


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [
    flip,
    overwrite,
    insert,
    delete,
    repeat,
]


def random_handshake(rng: random.Random) -> bytes:
    data = bytearray(client_flags(rng.choice([FIXED | NO_ZEROES] * 6 + [FIXED, 0])))
    for _ in range(rng.randrange(1, 8)):
        data += random_option(rng)
    if rng.random() < 0.7:
        for _ in range(rng.randrange(1, 4)):
            rng.choice(MUTATIONS)(rng, data)
            if not data:
                break
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_ten_thousand_mutated_handshakes_do_no_harm(seed: int) -> None:
    """CVE-2017-9524, CVE-2017-7539, CVE-2013-7441: at whatever byte a client goes wrong or goes."""
    rng = random.Random(seed)
    ends: set[State] = set()
    for _ in range(PER_SEED):
        mode = rng.choice(list(TlsMode))
        data = random_handshake(rng)
        haggle = Haggle(mode, None)
        cuts = [rng.randrange(len(data) + 1) for _ in range(rng.randrange(4))]
        try:
            deliver(haggle, data, cuts)
            check(haggle, mode)
        except BaseException:
            print(f"{mode} cuts={cuts} data={data!r}")
            raise
        ends.add(haggle.state)
    assert {State.OPEN, State.FORCED, State.SECURED, State.CLOSED, State.TRANSMISSION} <= ends


@settings(max_examples=200 * TIMES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300), st.sampled_from(TlsMode), st.booleans())
@example(b"", TlsMode.OFF, True)
@example(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", TlsMode.OFF, False)
@example(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", TlsMode.REQUIRED, False)
def test_bytes_of_any_kind_do_no_harm(data: bytes, mode: TlsMode, greeted: bool) -> None:
    haggle = Haggle(mode, FIXED if greeted else None)
    deliver(haggle, data, [])
    check(haggle, mode)


@settings(max_examples=200 * TIMES, deadline=None)
@given(st.sampled_from(Option), st.binary(max_size=200))
def test_option_data_of_any_kind_leaves_the_stream_in_sync(number: Option, data: bytes) -> None:
    haggle = Haggle()
    haggle.send_all(Option.STRUCTURED_REPLY)
    haggle.feed(option(number, data))
    check(haggle, TlsMode.OFF)
    if not haggle.over:
        assert [NOBODY_KNOWS] == [answer.option for answer in haggle.send(NOBODY_KNOWS)]


def test_a_client_that_sends_options_without_end_is_not_held_in_memory() -> None:
    haggle = Haggle()
    flood = option(NOBODY_KNOWS, bytes(MAX_OPTION_LENGTH)) * 20
    assert deliver(haggle, flood, [])
    assert "too many options" == haggle.closed().reason
    assert haggle.peak <= MOST_HELD


# --- splits ------------------------------------------------------------------------------------

VALID = st.sampled_from(
    [
        option(Option.LIST),
        option(Option.PEEK_EXPORT),
        option(Option.STRUCTURED_REPLY),
        option(Option.EXTENDED_HEADERS),
        option(Option.INFO, info_data("disk", [3])),
        option(Option.INFO, info_data("elsewhere")),
        option(Option.INFO, b"malformed"),
        option(Option.LIST_META_CONTEXT, meta_data("disk")),
        option(Option.SET_META_CONTEXT, meta_data("disk", ["base:allocation"])),
        option(NOBODY_KNOWS, bytes(50)),
    ]
)
LAST = st.sampled_from(
    [
        option(Option.GO, info_data("disk", [3])) + b"requests",
        option(Option.EXPORT_NAME, b"disk") + b"requests",
        option(Option.EXPORT_NAME, b"elsewhere"),
        option(Option.ABORT) + b"more",
        option(Option.LIST)[:10],
        b"NO OPTION",
    ]
)
CUTS = st.lists(st.integers(0, 500), max_size=12)


def outcome(haggle: Haggle, rest: bytes) -> tuple[bytes, list[Event], bytes]:
    """What was sent, asked for, and left over for the transmission phase."""
    events = list(haggle.events)
    if not isinstance(haggle.last, Transmit):
        return haggle.sent, events, b""
    transmit = haggle.last
    return haggle.sent, [*events[:-1], Transmit(transmit.agreement, b"")], transmit.remainder + rest


@settings(max_examples=150 * TIMES, deadline=None)
@given(st.lists(VALID, max_size=6), st.none() | st.lists(VALID, max_size=4), LAST, CUTS)
def test_how_bytes_are_split_changes_nothing(
    first: list[bytes], secured: list[bytes] | None, last: bytes, cuts: list[int]
) -> None:
    script = [client_flags() + b"".join(first)]
    if secured is not None:
        script[0] += option(Option.STARTTLS)
        script.append(b"".join(secured))
    script[-1] += last
    outcomes = []
    for where in ([], cuts, list(range(max(map(len, script))))):
        haggle = Haggle(TlsMode.PER_EXPORT, None)
        rest = b"".join([deliver(haggle, segment, where) for segment in script])
        outcomes.append(outcome(haggle, rest))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_whole_handshake_in_one_piece_and_byte_by_byte() -> None:
    data = (
        client_flags()
        + option(Option.EXTENDED_HEADERS)
        + option(Option.SET_META_CONTEXT, meta_data("disk", ["base:allocation"]))
        + option(Option.GO, info_data("disk", [3]))
    )
    for cuts in ([], list(range(len(data)))):
        haggle = Haggle(TlsMode.OFF, None)
        assert b"" == deliver(haggle, data, cuts)
        agreement = haggle.transmit().agreement
        assert (Dialect.EXTENDED, {1: "base:allocation"}) == (
            agreement.dialect,
            agreement.contexts,
        )
