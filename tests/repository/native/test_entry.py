"""Entries: exact bytes, and any damage found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.native.entry import (
    ENTRY_SIZE,
    MAX_CONTENT,
    Kind,
    enclose,
    open_entry,
    parse_entry,
)
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Sealing, compress
from tests.repository.native.test_sealing import CONTENT, HEADER, MASTER, PAYLOAD, SALT

SEALING = Sealing(MASTER)
HASHING = Hashing("blake3", SEALING.id_key)
SEAL = SEALING.seal(SALT)
ID = HASHING.id_of(CONTENT)
ENTRY = HEADER + bytes.fromhex("ff2d1d59") + PAYLOAD  # zlib's CRC-32 of HEADER


def test_an_entry_is_these_bytes() -> None:
    header, payload = enclose(SEAL, 258, Kind.CHUNK, Codec.RAW, len(CONTENT), ID, CONTENT)
    assert header + bytes(payload) == ENTRY
    assert len(header) == ENTRY_SIZE == 52
    assert CONTENT == open_entry(SEAL, HASHING, 258, ID, Kind.CHUNK, ENTRY)


@given(st.integers(0, len(ENTRY) - 1), st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(at: int, bit: int) -> None:
    damaged = bytearray(ENTRY)
    damaged[at] ^= 1 << bit
    with pytest.raises(BrokenPayload):
        open_entry(SEAL, HASHING, 258, ID, Kind.CHUNK, damaged)


@given(st.integers(0, 400), st.integers(0, 7), st.sampled_from([Codec.RAW, Codec.ZSTD]))
def test_nor_does_one_in_a_plain_repository(at: int, bit: int, codec: Codec) -> None:
    hashing, seal = Hashing("sha256"), Sealing().seal(b"")
    content = b"0123456789" * 30
    body = compress(content)[1] if codec else content
    id_ = hashing.id_of(content)
    entry = bytearray(b"".join(enclose(seal, 0, Kind.PAGE, codec, len(content), id_, body)))
    entry[at % len(entry)] ^= 1 << bit
    try:
        # A bit that zstd does not look at may be another; content cannot.
        assert content == bytes(open_entry(seal, hashing, 0, id_, Kind.PAGE, entry))
    except BrokenPayload:
        pass


@given(st.integers(0, len(ENTRY)))
def test_a_short_entry(length: int) -> None:
    if length < len(ENTRY):
        with pytest.raises(BrokenPayload):
            open_entry(SEAL, HASHING, 258, ID, Kind.CHUNK, ENTRY[:length])
    with pytest.raises(BrokenPayload):
        open_entry(SEAL, HASHING, 258, ID, Kind.CHUNK, ENTRY + b"x" * (length + 1))


def test_an_entry_at_another_place_of_its_pack_does_not_open() -> None:
    with pytest.raises(BrokenPayload, match="changed"):
        open_entry(SEAL, HASHING, 259, ID, Kind.CHUNK, ENTRY)


def test_an_entry_for_another_id_or_of_another_kind() -> None:
    with pytest.raises(BrokenPayload, match="another entry"):
        open_entry(SEAL, HASHING, 258, bytes(32), Kind.CHUNK, ENTRY)
    with pytest.raises(BrokenPayload, match="another entry"):
        open_entry(SEAL, HASHING, 258, ID, Kind.PAGE, ENTRY)


def test_an_id_that_is_not_the_contents() -> None:
    seal = Sealing().seal(b"")
    lie = b"".join(enclose(seal, 0, Kind.CHUNK, Codec.RAW, 4, bytes(32), b"data"))
    with pytest.raises(BrokenPayload, match="not what its id says"):
        open_entry(seal, Hashing("blake3"), 0, bytes(32), Kind.CHUNK, lie)


@given(st.binary(max_size=200), st.integers(0, 250))
def test_any_bytes_are_no_entry(data: bytes, at: int) -> None:
    assert parse_entry(data, at) is None


def test_lengths_beyond_all_bounds_are_no_entry() -> None:
    for ulen, body in ((MAX_CONTENT + 1, b""), ((1 << 32) - 1, b"x")):
        head, _ = enclose(Sealing().seal(b""), 0, Kind.CHUNK, Codec.RAW, ulen, ID, body)
        assert parse_entry(head) is None
