"""Frames: exact bytes, each to be had by itself, and no damage goes unnoticed."""

import random
import struct
import tracemalloc

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from nbdsrv.repository.native.frames import (
    FRAME,
    Framed,
    enclose_frames,
    encode_frames,
    expand_frames,
    frame_count,
    frame_span,
    is_raw,
    lengths_size,
    open_frame,
    open_frames,
    table_of,
)
from nbdsrv.repository.native.sealing import BrokenPayload, Seal

ID = bytes(range(200, 232))
AT = 4711
KEY = bytes(range(32))
PLAIN, SECRET = Seal(None), Seal(KEY)
NOISE = random.Random(3).randbytes(3 * FRAME)
MIXED = b"text " * (FRAME // 5) + NOISE[: FRAME + 700]

seals = pytest.mark.parametrize("seal", [PLAIN, SECRET], ids=["plain", "encrypted"])


def made(content: bytes, seal: Seal, level: int = 2) -> tuple[bytes, bytes]:
    """Lengths and payload."""
    framed = encode_frames(memoryview(content), ID, level)
    return framed.lengths, enclose_frames(framed, seal, AT, ID, len(content))


def one(seal: Seal, lengths: bytes, payload: bytes, ulen: int, number: int) -> bytes:
    position, size = frame_span(lengths, ulen, number)
    piece = payload[position : position + size]
    return open_frame(seal, AT, ID, ulen, number, piece, raw=is_raw(lengths, number))


@seals
@pytest.mark.parametrize("level", [0, 1, 2, 9])
@pytest.mark.parametrize("length", [1, FRAME - 1, FRAME, FRAME + 1, len(MIXED)])
def test_what_is_put_into_frames_comes_back(length: int, level: int, seal: Seal) -> None:
    content = MIXED[:length]
    lengths, payload = made(content, seal, level)
    assert content == expand_frames(lengths, payload, seal, AT, ID, length)
    assert lengths == table_of(payload, length)
    for number in range(frame_count(length)):
        expected = content[number * FRAME : (number + 1) * FRAME]
        assert expected == one(seal, lengths, payload, length, number)


@seals
def test_what_is_opened_can_be_enclosed_elsewhere(seal: Seal) -> None:
    """A chunk is moved to another pack as it is, without being packed again."""
    _, payload = made(MIXED, seal)
    content, framed = open_frames(payload, seal, AT, ID, len(MIXED))
    assert content == MIXED
    assert payload == enclose_frames(framed, seal, AT, ID, len(MIXED))
    other = Seal(KEY[::-1]) if seal.encrypts else seal
    moved = enclose_frames(framed, other, 99, ID, len(MIXED))
    assert content == expand_frames(framed.lengths, moved, other, 99, ID, len(MIXED))


@seals
def test_behind_noise_only_noise_is_left_as_it_is(seal: Seal) -> None:
    """After a frame that cannot be packed a sample decides, and text is packed again."""
    text = (b"a line of text, %d\n" % 7 * FRAME)[:FRAME]
    content = NOISE[:FRAME] + text + NOISE[FRAME : 2 * FRAME] + NOISE[2 * FRAME :] + text[:5000]
    lengths, payload = made(content, seal)
    assert [is_raw(lengths, number) for number in range(5)] == [True, False, True, True, False]
    assert content == expand_frames(lengths, payload, seal, AT, ID, len(content))


def test_the_layout_is_what_the_document_says() -> None:
    content = b"t" * FRAME + NOISE[:5]
    lengths, payload = made(content, PLAIN, 1)
    packed = int.from_bytes(lengths, "little")
    assert payload[:4] == struct.pack("<HH", packed, 0)
    assert packed < 100
    seed = int.from_bytes(ID[:8], "little")
    first = payload[4 + packed : 4 + packed + 16]
    assert first == xxh3_128_digest(content[:FRAME], seed)
    assert payload[4 + packed + 16 :] == NOISE[:5] + xxh3_128_digest(NOISE[:5], seed + 1)
    frame = payload[4 : 4 + packed]
    _, secret = made(content, SECRET, 1)
    nonce = struct.pack("<III", AT, 0, 0)
    assert secret[4 : 4 + packed + 16] == AESGCM(KEY).encrypt(nonce, frame, ID + bytes(4))
    nonce, number = struct.pack("<III", AT, 1, 0), struct.pack("<I", 1)
    assert secret[4 + packed + 16 :] == AESGCM(KEY).encrypt(nonce, NOISE[:5], ID + number)


def test_the_seed_wraps() -> None:
    id_ = b"\xff" * 32
    framed = encode_frames(memoryview(NOISE), id_, 0)
    assert framed.checks[1] == xxh3_128_digest(NOISE[FRAME : 2 * FRAME], 0)
    payload = enclose_frames(framed, PLAIN, AT, id_, len(NOISE))
    assert expand_frames(b"", payload, PLAIN, AT, id_, len(NOISE)) == NOISE


@seals
def test_frames_of_another_chunk_or_place_are_not_taken_for_this_ones(seal: Seal) -> None:
    content = NOISE[:FRAME] * 2  # two frames that are alike
    lengths, payload = made(content, seal, 0)
    with pytest.raises(BrokenPayload):
        expand_frames(lengths, payload, seal, AT, ID[::-1], len(content))
    position, size = frame_span(lengths, len(content), 1)
    piece = payload[position : position + size]
    with pytest.raises(BrokenPayload):
        open_frame(seal, AT, ID, len(content), 0, piece, raw=True)
    if seal.encrypts:
        with pytest.raises(BrokenPayload):
            expand_frames(lengths, payload, seal, AT + 1, ID, len(content))


@seals
@pytest.mark.parametrize("content", [MIXED, NOISE], ids=["mixed", "noise"])
def test_a_flipped_bit_anywhere_is_found(content: bytes, seal: Seal) -> None:
    _, payload = made(content, seal)
    table = lengths_size(len(content))
    for at in [*range(table), *range(table, len(payload), 797), len(payload) - 1]:
        broken = bytearray(payload)
        broken[at] ^= 4
        try:
            opened = open_frames(bytes(broken), seal, AT, ID, len(content))[0]
        except BrokenPayload:
            continue
        assert content == opened  # a bit that zstd does not look at
        assert not seal.encrypts


@seals
def test_damage_to_one_frame_leaves_the_others(seal: Seal) -> None:
    lengths, payload = made(NOISE, seal)
    broken = bytearray(payload)
    broken[:6] = b"\xff" * 6  # nobody who has the lengths looks at these
    broken[frame_span(lengths, len(NOISE), 1)[0] + 9] ^= 1
    for number in range(3):
        if number == 1:
            with pytest.raises(BrokenPayload):
                one(seal, lengths, bytes(broken), len(NOISE), number)
        else:
            expected = NOISE[number * FRAME : (number + 1) * FRAME]
            assert expected == one(seal, lengths, bytes(broken), len(NOISE), number)


@seals
@given(st.binary(max_size=400), st.binary(max_size=20), st.integers(1, 1 << 26))
def test_any_bytes_are_frames_or_broken(
    seal: Seal, payload: bytes, lengths: bytes, ulen: int
) -> None:
    with pytest.raises(BrokenPayload):
        expand_frames(lengths, payload, seal, AT, ID, ulen)
    with pytest.raises(BrokenPayload):
        open_frames(payload, seal, AT, ID, ulen)


@given(st.lists(st.integers(0, (1 << 16) - 1), max_size=300), st.integers(1, 1 << 23), st.data())
def test_lengths_lead_to_spans_within_bounds_or_are_broken(
    lengths: list[int], ulen: int, data: st.DataObject
) -> None:
    table = struct.pack(f"<{len(lengths)}H", *lengths)
    number = data.draw(st.integers(0, frame_count(ulen) - 1))
    try:
        position, size = frame_span(table, ulen, number)
    except BrokenPayload:
        return
    assert 16 < size <= FRAME + 16
    assert lengths_size(ulen) <= position <= lengths_size(ulen) + number * (FRAME + 16)


def test_a_frame_that_claims_gigabytes_allocates_nothing() -> None:
    claim = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, 8 << 30) + b"\x02\x00\x40\x00"
    framed = Framed(struct.pack("<H", len(claim)), [claim], [bytes(16)])
    payload = enclose_frames(framed, PLAIN, AT, ID, FRAME)
    tracemalloc.start()
    with pytest.raises(BrokenPayload, match="another length"):
        expand_frames(framed.lengths, payload, PLAIN, AT, ID, FRAME)
    with pytest.raises(BrokenPayload, match="too short"):
        open_frames(payload, PLAIN, AT, ID, 1 << 40)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
