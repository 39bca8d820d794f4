"""Ciphers, filters and names, against what they are made of elsewhere."""

import gzip
import os
import random

import brotli
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.repository.xo import filters, layout
from nbdsrv.repository.xo.sealing import AES, CHACHA, CIPHERS, Sealing
from nbdsrv.repository.xo.vhd_directory import bat_file
from tests.repository.xo.made import KEY

LIBRARY = {CHACHA: ChaCha20Poly1305, AES: AESGCM}


@pytest.mark.parametrize("algorithm", CIPHERS)
def test_sealed_is_nonce_ciphertext_tag(algorithm: str) -> None:
    sealing = Sealing.with_key(algorithm, KEY, "test")
    data = os.urandom(5000)
    sealed = sealing.seal(data)
    assert len(sealed) == len(data) + 28
    assert LIBRARY[algorithm](KEY.encode()).decrypt(sealed[:12], sealed[12:], None) == data
    assert sealing.open(sealed, "x") == data
    assert sealed != sealing.seal(data)  # another nonce
    for at in (0, 11, 12, 2000, len(sealed) - 1):
        spoilt = bytearray(sealed)
        spoilt[at] ^= 1
        with pytest.raises(CorruptImage, match="x at 0: it does not decrypt"):
            sealing.open(bytes(spoilt), "x")
    with pytest.raises(CorruptImage, match="27 bytes"):
        sealing.open(sealed[:27], "x")
    assert KEY not in repr(sealing)


@pytest.mark.parametrize("algorithm", CIPHERS)
@given(size=st.integers(0, 300), seed=st.integers(0, 1000), spoilt=st.none() | st.integers(0, 400))
def test_a_stream_gives_the_same_as_all_at_once(
    algorithm: str, size: int, seed: int, spoilt: int | None
) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(size)
    nonce = chance.randbytes(12)
    sealed = bytearray(nonce + LIBRARY[algorithm](KEY.encode()).encrypt(nonce, data, None))
    if spoilt is not None:
        sealed[spoilt % len(sealed)] ^= 0x10
    stream = Sealing.with_key(algorithm, KEY, "test").stream(len(sealed), "x")
    found, at = b"", 0
    while at < len(sealed):
        step = chance.choice((1, 5, 12, 16, 64, 1000))
        found += stream.update(bytes(sealed[at : at + step]))
        at += step
    if spoilt is None:
        stream.finish()
        assert found == data
        return
    with pytest.raises(CorruptImage, match="does not decrypt"):
        stream.finish()


@pytest.mark.parametrize("algorithm", CIPHERS)
def test_a_stream_that_ends_early_proves_nothing(algorithm: str) -> None:
    sealing = Sealing.with_key(algorithm, KEY, "test")
    sealed = sealing.seal(b"x" * 100)
    stream = sealing.stream(len(sealed), "x")
    stream.update(sealed[:-1])
    with pytest.raises(CorruptImage):
        stream.finish()
    assert sealing.peek(sealed)[:100] == b"x" * 100


@given(
    data=st.binary(max_size=3000), limit=st.integers(0, 4000), name=st.sampled_from(filters.FILTERS)
)
def test_filters_there_and_back(data: bytes, limit: int, name: str) -> None:
    packed = filters.pack(name, data)
    if name == filters.GZIP:
        assert gzip.decompress(packed) == data
    elif name == filters.BROTLI:
        assert brotli.decompress(packed) == data
    assert filters.unpack(name, packed, limit, "x", beginning=True) == data[:limit]
    if len(data) <= limit:
        assert filters.unpack(name, packed, limit, "x") == data
    else:
        with pytest.raises(CorruptImage, match=f"more than {limit} bytes"):
            filters.unpack(name, packed, limit, "x")


@pytest.mark.parametrize("name", [filters.GZIP, filters.BROTLI])
def test_what_is_cut_short_is_seen_wherever_it_is_cut(name: str) -> None:
    packed = filters.pack(name, bytes(range(256)) * 20)
    for end in range(len(packed)):
        with pytest.raises(CorruptImage):
            filters.unpack(name, packed[:end], 1 << 20, "x")


@given(packed=st.binary(max_size=200), name=st.sampled_from(filters.FILTERS))
def test_any_bytes_unpack_within_the_limit_or_not_at_all(packed: bytes, name: str) -> None:
    try:
        assert len(filters.unpack(name, packed, 1000, "x")) <= 1000
    except CorruptImage:
        pass


def test_names_of_filters() -> None:
    assert filters.filter_of(None, "x") == filters.NONE
    for name in filters.FILTERS:
        assert filters.filter_of(filters.filter_file(name), "x") == name
    for raw in (b"[]", b'["none"]'):
        assert filters.filter_of(raw, "x") == filters.NONE
    for raw, kind in (
        (b"{}", CorruptImage),
        (b"[5]", CorruptImage),
        (b'"gzip"', CorruptImage),
        (b"\xff", CorruptImage),
        (b"[" * 10_000, CorruptImage),
        (b'["gzip","brotli"]', UnsupportedImage),
        (b'["xz"]', UnsupportedImage),
    ):
        with pytest.raises(kind):
            filters.filter_of(raw, "x")


def test_stamps_and_paths() -> None:
    assert layout.time_of("20260101T020304Z") == 1767232984
    assert layout.stamp_of(1767232984.9) == "20260101T020304Z"
    for bad in ("", "20260101T020304", "20261301T020304Z", "2026-01-01T02:03", "20260101T020304Z0"):
        assert layout.time_of(bad) is None
    assert layout.point_stamp("20260101T020304Z.json") == "20260101T020304Z"
    for bad in ("cache.json.gz", "20260101T020304Z.xva", ".20260101T020304Z.json", "x.json"):
        assert layout.point_stamp(bad) is None
    assert layout.block_path("d", 1017) == "d/blocks/1/17"
    assert layout.merge_state_path("a/b.vhd") == "a/.b.vhd.merge.json"
    assert layout.merging_parent(".b.vhd.merge.json") == "b.vhd"
    assert layout.merging_parent(".merge.json") is None
    assert bat_file([0, 9], 16) == b"\x80\x40" + bytes(14)
