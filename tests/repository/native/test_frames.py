import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from nbdsrv.repository.native.frames import (
    FRAME,
    encode_frames,
    expand_frames,
    frame_table,
    open_frame,
    table_size,
)
from nbdsrv.repository.native.sealing import BrokenPayload

ID = bytes(range(32))
NOISE = random.Random(3).randbytes(3 * FRAME)
MIXED = b"text " * (FRAME // 5) + NOISE[: FRAME + 700]


@pytest.mark.parametrize("level", [0, 1, 2, 9])
@pytest.mark.parametrize("length", [1, FRAME - 1, FRAME, FRAME + 1, len(MIXED)])
def test_what_is_put_into_frames_comes_back(length: int, level: int) -> None:
    content = MIXED[:length]
    body = encode_frames(memoryview(content), ID, level)
    assert content == expand_frames(body, ID, length)
    table = frame_table(body[: table_size(length)], ID, length, len(body))
    assert -(-length // FRAME) == len(table)
    for number, frame in enumerate(table):
        stored = body[frame.position : frame.position + frame.clen]
        assert content[number * FRAME : (number + 1) * FRAME] == open_frame(frame, stored)


def test_a_frame_that_does_not_shrink_is_stored_as_it_is() -> None:
    content = b"t" * FRAME + NOISE[:FRAME]
    body = encode_frames(memoryview(content), ID, 2)
    first, second = frame_table(body, ID, len(content), len(body))
    assert first.clen < 100
    assert second.clen == FRAME
    assert body.endswith(NOISE[:FRAME])


def test_the_layout_is_what_the_document_says() -> None:
    content = NOISE[: FRAME + 5]
    body = encode_frames(memoryview(content), ID, 0)
    rows = struct.pack("<I16s", FRAME, xxh3_128_digest(content[:FRAME]))
    rows += struct.pack("<I16s", 5, xxh3_128_digest(content[FRAME:]))
    assert struct.pack("<I", zlib.crc32(ID + rows)) + rows + content == body


def test_frames_of_another_chunk_are_not_taken_for_this_ones() -> None:
    body = encode_frames(memoryview(MIXED), ID, 2)
    with pytest.raises(BrokenPayload, match="table"):
        expand_frames(body, bytes(32), len(MIXED))


@pytest.mark.parametrize("content", [MIXED, NOISE])
def test_a_flipped_bit_anywhere_is_found(content: bytes) -> None:
    body = encode_frames(memoryview(content), ID, 2)
    places = [*range(table_size(len(content))), *range(table_size(len(content)), len(body), 997)]
    for at in places:
        broken = bytearray(body)
        broken[at] ^= 4
        try:
            assert content == expand_frames(broken, ID, len(content))  # a bit that means nothing
        except BrokenPayload:
            pass


def test_damage_to_one_frame_leaves_the_others() -> None:
    body = bytearray(encode_frames(memoryview(NOISE), ID, 2))
    table = frame_table(body, ID, len(NOISE), len(body))
    body[table[1].position + 9] ^= 1
    for number, frame in enumerate(table):
        stored = body[frame.position : frame.position + frame.clen]
        if number == 1:
            with pytest.raises(BrokenPayload, match="check"):
                open_frame(frame, stored)
        else:
            assert NOISE[number * FRAME : (number + 1) * FRAME] == open_frame(frame, stored)


@given(st.binary(max_size=400), st.integers(1, 1 << 26))
def test_any_bytes_are_frames_or_broken(body: bytes, length: int) -> None:
    with pytest.raises(BrokenPayload):
        expand_frames(body, ID, length)


@given(st.lists(st.tuples(st.integers(0, 1 << 32 - 1), st.binary(min_size=16, max_size=16))))
def test_any_table_with_a_good_crc_is_bounded(rows: list[tuple[int, bytes]]) -> None:
    table = b"".join(struct.pack("<I16s", clen & 0xFFFFFFFF, check) for clen, check in rows)
    body = struct.pack("<I", zlib.crc32(ID + table)) + table + bytes(50)
    length = len(rows) * FRAME or 1
    with pytest.raises(BrokenPayload):
        expand_frames(body, ID, length)


def test_a_frame_that_claims_gigabytes_allocates_nothing() -> None:
    claim = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, 8 << 30) + b"\x02\x00\x40\x00"
    row = struct.pack("<I16s", len(claim), bytes(16))
    body = struct.pack("<I", zlib.crc32(ID + row)) + row + claim
    tracemalloc.start()
    with pytest.raises(BrokenPayload, match="another length"):
        expand_frames(body, ID, FRAME)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
