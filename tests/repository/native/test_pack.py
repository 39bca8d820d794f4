"""Packs: their parts stand where the document says, and hostile ones are refused."""

import hashlib
import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.native.entry import ENTRY_SIZE, MAX_CONTENT, Kind, open_entry
from nbdsrv.repository.native.frames import encode_frames, expand_frames
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.pack import (
    HEADER_SIZE,
    MAX_PACK,
    TRAILER_SIZE,
    Listed,
    Pack,
    PackKind,
    parse_directory,
    parse_header,
    parse_trailer,
    scan,
)
from nbdsrv.repository.native.sealing import BrokenPayload, Codec, Sealing

OWNER = b"sixteen bytes id"
HASHING = Hashing("sha256")
CONTENTS = [b"first" * 20, b"second" * 30, b""]


def filled(sealing: Sealing | None = None, contents: list[bytes] = CONTENTS) -> tuple[Pack, bytes]:
    sealing = sealing or Sealing()
    hashing = Hashing("sha256", sealing.id_key)
    pack = Pack(PackKind.CHUNKS, OWNER, sealing, hashing)
    for content in contents:
        pack.add(Kind.CHUNK, Codec.RAW, len(content), hashing.id_of(content), content)
    return pack, bytes(pack.finish())


def directory_of(data: bytes, size: int | None = None) -> list[Listed]:
    offset, length = parse_trailer(data[-TRAILER_SIZE:], size or len(data))
    return parse_directory(data[offset : offset + length + TRAILER_SIZE], offset)


def ending(rows: list[tuple[int, int, int]], size: int = 1000) -> tuple[bytes, int]:
    """Directory and trailer that list (offset, clen, ulen)."""
    table = b"".join(struct.pack("<32sIIIBBH", bytes(32), *row, 0, 0, 0) for row in rows)
    tail = struct.pack("<IIII8s", len(rows), len(table), zlib.crc32(table), 48, b"NBDPEND1")
    return table + tail, size


@pytest.mark.parametrize("sealing", [Sealing(), Sealing(bytes(32))])
def test_what_is_packed_is_listed_and_opens(sealing: Sealing) -> None:
    pack, data = filled(sealing)
    hashing = Hashing("sha256", sealing.id_key)
    assert hashlib.sha256(data).digest() == pack.name
    header = parse_header(data, OWNER)
    assert (header.kind, header.encrypted) == (PackKind.CHUNKS, sealing.id_key is not None)
    assert b"NBDPACK1" == data[:8]
    assert (OWNER, header.salt) == (data[16:32], data[32:64])
    assert b"NBDPEND1" == data[-8:]
    rows = directory_of(data)
    assert sorted(pack.listed) == rows
    seal = sealing.seal(header.salt)
    for row, content in zip(pack.listed, CONTENTS, strict=True):
        entry = data[row.offset : row.offset + ENTRY_SIZE + row.clen]
        assert content == open_entry(seal, hashing, row.offset, row.id, Kind.CHUNK, entry)
    assert sorted(scan(data)) == rows


@pytest.mark.parametrize("sealing", [Sealing(), Sealing(bytes(32))])
def test_lengths_of_frames_are_listed(sealing: Sealing) -> None:
    """In the directory, and where that is lost, from the entries."""
    pack = Pack(PackKind.CHUNKS, OWNER, sealing, HASHING)
    contents = [b"text" * 30_000, random.Random(1).randbytes(70_000), b"short"]
    for content in contents:
        body = encode_frames(memoryview(content), HASHING.id_of(content), 1)
        pack.add(Kind.CHUNK, Codec.FRAMES, len(content), HASHING.id_of(content), body)
    data = bytes(pack.finish())
    assert struct.unpack("<I", data[-12:-8])[0] == 48 + 2 * 4
    rows = directory_of(data)
    assert sorted(pack.listed) == rows == sorted(scan(data))
    by_id = {row.id: row for row in rows}
    text, noise, short = (by_id[HASHING.id_of(content)] for content in contents)
    # Without the zero bytes at the end: four lengths below 256, and none at all.
    assert (7, b"", b"") == (len(text.frames), noise.frames, short.frames)
    seal = sealing.seal(parse_header(data, OWNER).salt)
    for row in (text, noise, short):
        start = row.offset + ENTRY_SIZE
        payload = data[start : start + row.clen]
        content = expand_frames(row.frames, payload, seal, row.offset, row.id, row.ulen)
        assert HASHING.id_of(content) == row.id


def test_the_same_content_twice_makes_two_names() -> None:
    assert filled()[0].name != filled()[0].name


def test_an_empty_pack() -> None:
    _, data = filled(contents=[])
    assert [] == directory_of(data)
    assert HEADER_SIZE + TRAILER_SIZE == len(data)


def test_more_than_a_reader_takes_is_not_packed() -> None:
    pack = Pack(PackKind.METAS, OWNER, Sealing(), HASHING)
    with pytest.raises(ValueError, match="the most"):
        pack.add(Kind.ROOT, Codec.ZSTD, MAX_CONTENT + 1, bytes(32), b"")


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(0, b"X", "begin like a pack"), (9, b"\2", "cipher 2"), (16, b"X", "another repository")],
)
def test_a_header_that_is_not_ours(at: int, value: bytes, text: str) -> None:
    data = bytearray(filled()[1])
    data[at : at + 1] = value
    with pytest.raises(BrokenPayload, match=text):
        parse_header(data, OWNER)
    with pytest.raises(BrokenPayload, match="shorter"):
        parse_header(data[:63], OWNER)


@given(st.data())
def test_a_mutated_pack_lists_entries_within_it_or_is_broken(data: st.DataObject) -> None:
    raw = bytearray(filled()[1])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    rows: list[Listed] = []
    try:
        rows += directory_of(bytes(raw))
    except BrokenPayload:
        pass
    rows += scan(raw)
    for row in rows:
        assert HEADER_SIZE <= row.offset
        assert row.offset + ENTRY_SIZE + row.clen <= len(raw)


@pytest.mark.parametrize(
    ("count", "length", "row", "size"),
    [
        ((1 << 32) - 1, (1 << 32) - 48, 48, 1 << 20),  # four billion entries
        (1, 47, 47, 1000),
        (1, 47, 48, 1000),
        (0, 48, 48, 1000),
        (1, 0, 0, 1000),
        (1, 4146, 4146, 1 << 20),  # more frames than there can be
        (10, 480, 48, 500),  # reaches in front of the pack
        (10, 480, 48, 64 + 24 + 480),  # ten entries, and no room for one
        (0, 0, 48, MAX_PACK + 1),
        (0, 0, 48, 87),
    ],
)
def test_a_trailer_that_lies(count: int, length: int, row: int, size: int) -> None:
    tail = struct.pack("<IIII8s", count, length, 0, row, b"NBDPEND1")
    with pytest.raises(BrokenPayload):
        parse_trailer(tail, size)


def test_a_trailer_that_is_none() -> None:
    with pytest.raises(BrokenPayload, match="shorter"):
        parse_trailer(b"NBDPEND1", 100)


@pytest.mark.parametrize(
    "rows",
    [
        [(63, 10, 10)],
        [(64, 1000, 10)],
        [(64, (1 << 32) - 1, 10)],
        [((1 << 32) - 1, 0, 0)],
        [(64, 10, 10), (100, 10, 10)],  # the second begins within the first
        [(64, 10, 10), (64, 10, 10)],
        [(64, 10, MAX_CONTENT + 1)],
    ],
)
def test_a_directory_of_what_cannot_be(rows: list[tuple[int, int, int]]) -> None:
    tail, offset = ending(rows)
    with pytest.raises(BrokenPayload, match="directory names"):
        parse_directory(tail, offset)


def test_a_directory_with_a_flipped_bit() -> None:
    tail, offset = ending([(64, 10, 10)])
    parse_directory(tail, offset)
    with pytest.raises(BrokenPayload, match="damaged"):
        parse_directory(bytes([1]) + tail[1:], offset)


def test_what_is_left_is_found_where_the_directory_is_lost() -> None:
    pack, data = filled()
    first, second, third = pack.listed
    torn = bytearray(data[: third.offset + ENTRY_SIZE])
    assert [first, second, third] == list(scan(torn))
    torn[first.offset + 12] ^= 1  # its length
    assert [second, third] == list(scan(torn))
    assert [] == list(scan(b""))
    assert [second] == list(scan(memoryview(torn)[: third.offset]))
