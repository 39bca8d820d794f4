"""The index: finds what was put in, and survives any damage."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native import index as index_module
from nbdsrv.repository.native.entry import Place
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.index import Index, Segment, encode_segment
from nbdsrv.repository.native.pack import Listed

OWNER = b"sixteen bytes id"
HASHING = Hashing("blake3")
Row = tuple[bytes, Place, int]

ids = st.binary(min_size=32, max_size=32) | st.integers(0, 3).map(lambda n: bytes([n]) * 32)
rows = st.builds(
    lambda id_, *place, kind: (id_, Place(*place), kind),
    ids,
    st.sampled_from([b"p" * 32, b"q" * 32, b"r" * 32]),
    st.integers(64, 1 << 28),
    st.integers(0, 1 << 26),
    st.sampled_from([0, 1]),
    st.binary(max_size=8).map(lambda lengths: lengths.rstrip(b"\0")),
    kind=st.integers(0, 4),
)


def parsed(given_rows: list[Row]) -> Segment:
    data = encode_segment(given_rows, OWNER, HASHING)
    return Segment.parse("index/x.ix", data, OWNER, HASHING)


@given(st.lists(rows, max_size=60), ids)
def test_a_segment_finds_all_places_of_an_id(given_rows: list[Row], other: bytes) -> None:
    segment = parsed(given_rows)
    assert len(given_rows) == len(segment)
    assert sorted(given_rows) == sorted(segment)
    for id_ in {row[0] for row in given_rows} | {other, bytes(32), b"\xff" * 32}:
        expected = sorted((place, kind) for found, place, kind in given_rows if found == id_)
        assert expected == sorted(segment.find(id_))


@given(st.lists(rows, max_size=40), st.lists(rows, max_size=40), st.booleans())
def test_an_index_of_segments_and_packs(one: list[Row], other: list[Row], small: bool) -> None:
    index = Index({b"p" * 32, b"q" * 32})
    limit = index_module.SMALL
    index_module.SMALL = limit if small else 0
    try:
        index.add_segment(parsed(one))
    finally:
        index_module.SMALL = limit
    for id_, place, kind in other:
        listed = Listed(id_, place.offset, place.length, 1, place.codec, kind, place.frames)
        index.add_pack(place.pack, [listed])
    usable = [row for row in one + other if row[1].pack != b"r" * 32]
    assert sorted(usable) == sorted(index)
    assert {row[1].pack for row in one + other} == index.packs()
    for id_ in {row[0] for row in one + other}:
        places = sorted(place for found, place, _ in usable if found == id_)
        assert places == sorted(index.find_all(id_))
        for kind in range(3):
            mine = [place for found, place, k in usable if (found, k) == (id_, kind)]
            assert (index.find(id_, kind) in mine) == bool(mine)
    assert index.find(b"never seen".ljust(32), 0) is None


def test_an_index_is_these_bytes() -> None:
    row = (b"\x02" + bytes(31), Place(b"p" * 32, 64, 10, 2, b"\x10\0\x09"), 0)
    data = encode_segment([row], OWNER, HASHING)
    assert data[:64] == b"NBDINDX1" + OWNER + struct.pack("<III", 1, 1, 52) + bytes(28)
    assert data[64:96] == b"p" * 32
    assert data[96:1120] == struct.pack("<256I", 0, 0, *([1] * 254))
    record = struct.pack("<IIIBBxxHH", 0, 64, 10, 2, 0, 16, 9)
    assert data[1120:1172] == row[0] + record
    assert data[1172:] == HASHING.name_of(data[:1172])


@given(st.data())
def test_a_mutated_segment_is_refused(data: st.DataObject) -> None:
    raw = bytearray(encode_segment([(b"1" * 32, Place(b"p" * 32, 64, 1, 0), 0)], OWNER, HASHING))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptImage, match=r"corrupt repository: index/x\.ix"):
        Segment.parse("index/x.ix", bytes(raw), OWNER, HASHING)


@pytest.mark.parametrize("length", [0, 8, 63, 1000, 1119])
def test_a_short_segment_is_refused(length: int) -> None:
    data = encode_segment([], OWNER, HASHING)[:length]
    with pytest.raises(CorruptImage):
        Segment.parse("index/x.ix", data, OWNER, HASHING)


def test_counts_of_billions_are_refused_without_memory() -> None:
    for row in (0, 47, 48, 64, (1 << 32) - 1):
        many = (1 << 32) - 1
        head = struct.pack("<8s16sIII28x", b"NBDINDX1", OWNER, many, many, row)
        with pytest.raises(CorruptImage):
            Segment.parse("index/x.ix", head + bytes(2000), OWNER, HASHING)


@pytest.mark.parametrize("row", [0, 47, 4145, 4146, (1 << 32) - 1])
def test_records_of_a_size_that_cannot_be(row: int) -> None:
    """Its hash is right: somebody made it so."""
    body = struct.pack("<8s16sIII28x", b"NBDINDX1", OWNER, 0, 0, row) + bytes(1024)
    with pytest.raises(CorruptImage, match="no index"):
        Segment.parse("x", body + HASHING.name_of(body), OWNER, HASHING)


def test_of_another_repository() -> None:
    data = encode_segment([], b"x" * 16, HASHING)
    with pytest.raises(CorruptImage, match="of this repository"):
        Segment.parse("index/x.ix", data, OWNER, HASHING)


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=256, max_size=256), ids)
def test_a_fan_out_that_lies_leads_nowhere_else(fan: list[int], id_: bytes) -> None:
    """Its hash is right: somebody made it so."""
    body = struct.pack("<8s16sIII28x", b"NBDINDX1", OWNER, 2, 1, 48) + b"p" * 32
    body += struct.pack("<256I", *fan)
    record = struct.pack("<32sIIIBBxx", b"\1" * 32, 0, 64, 1, 0, 0)
    body += record + struct.pack("<32sIIIBBxx", b"\1" * 32, 99, 64, 1, 0, 0)  # no such pack
    segment = Segment.parse("x", body + HASHING.name_of(body), OWNER, HASHING)
    found = list(segment.find(id_))
    assert found in ([], [(Place(b"p" * 32, 64, 1, 0), 0)])
    assert 1 == len(list(segment))
