"""Compression and encryption: known answers, and frames that lie."""

import struct
import threading
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.native.sealing import (
    TAG_SIZE,
    BrokenPayload,
    Codec,
    Seal,
    Sealing,
    compress,
    expand,
)

MASTER = bytes(range(32))
SALT = bytes(range(32, 64))
CONTENT = b"a stranger reads this, and it is right"

# HKDF: `openssl kdf ... HKDF`. AES-GCM: counter mode and GHASH done by hand on `openssl enc
# -aes-256-ecb`. Header of the entry at 258 of a pack with SALT, and its payload.
K_ID = "32c081c313f827a3f40b54d557d8300a0df21f39487421a6ee50c9a0093baf7e"
HEADER = bytes.fromhex(
    "43484e4b000000002600000036000000"
    "90bd7bdeeee060062dce89fdb80bd2f028a3384ea1203cd16f864b07b176db13"
)
PAYLOAD = bytes.fromhex(
    "3629546f73330d1e137cbcaafe4dacd05f1ecd462da06f6e024238649f5be6f3"
    "735a5f69c8a87efa7100ba4a76938b9d1a89df9c769c"
)
# The same as frame 3 of a chunk there, with the id of that header.
FRAME_3 = bytes.fromhex(
    "3e27a9e4115f232da22162f96f7230a57cec939acb5dcd96fcf7f229e6806e01"
    "7bbee52a1bd882179dd06b2fedb4d89d522fe8502168"
)


def test_keys_and_ciphertext_as_openssl_has_them() -> None:
    sealing = Sealing(MASTER)
    assert sealing.id_key is not None
    assert sealing.id_key.hex() == K_ID
    assert sealing.seal(SALT).close(258, 0, HEADER, CONTENT) == PAYLOAD
    assert sealing.seal(SALT).open(258, 0, HEADER, PAYLOAD) == CONTENT
    with_ = HEADER[16:] + struct.pack("<I", 3)
    assert sealing.seal(SALT).close(258, 3, with_, CONTENT) == FRAME_3
    assert sealing.seal(SALT).overhead == TAG_SIZE


def test_another_salt_place_header_or_key_opens_nothing() -> None:
    seal = Sealing(MASTER).seal(SALT)
    tries = [
        (seal, 257, HEADER, PAYLOAD),
        (seal, 258, HEADER, FRAME_3),
        (seal, 258, HEADER[:-1] + b"\1", PAYLOAD),
        (seal, 258, HEADER, PAYLOAD[:-1]),
        (seal, 258, HEADER, b""),
        (seal, 258, HEADER, bytes([PAYLOAD[0] ^ 1]) + PAYLOAD[1:]),
        (Sealing(MASTER).seal(SALT[::-1]), 258, HEADER, PAYLOAD),
        (Sealing(MASTER[::-1]).seal(SALT), 258, HEADER, PAYLOAD),
    ]
    for other, offset, header, payload in tries:
        with pytest.raises(BrokenPayload):
            other.open(offset, 0, header, payload)
    with pytest.raises(BrokenPayload):
        seal.open(258, 1, HEADER, PAYLOAD)


def test_secrets_are_not_shown() -> None:
    assert MASTER.hex() not in repr(Sealing(MASTER)) == "Sealing(***)"
    assert Sealing().id_key is None


def test_without_a_key_nothing_is_sealed() -> None:
    seal = Sealing().seal(SALT)
    assert seal.close(0, 0, b"", CONTENT) is CONTENT
    assert seal.open(7, 1, b"x", CONTENT) is CONTENT
    assert seal.overhead == 0


@given(st.binary(max_size=2000), st.integers(1, 40), st.sampled_from([0, 1, 3, 19]))
def test_what_is_compressed_comes_back(data: bytes, times: int, level: int) -> None:
    data *= times
    codec, body = compress(data, level)
    assert data == bytes(expand(codec, body, len(data)))
    if codec == Codec.ZSTD:
        assert level
        assert len(body) < len(data) * 0.95 + 1
    else:
        assert body is data


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    import random

    noise = random.Random(1).randbytes(1 << 18)
    assert compress(noise) == (Codec.RAW, noise)
    assert compress(bytes(1 << 18))[0] == Codec.ZSTD
    assert compress(bytes(1 << 18), 0)[0] == Codec.RAW
    assert compress(b"") == (Codec.RAW, b"")


@given(st.binary(max_size=300), st.integers(0, 1 << 32), st.integers(0, 5))
def test_any_bytes_are_content_or_broken(body: bytes, length: int, codec: int) -> None:
    try:
        assert length == len(expand(codec, body, length))
    except BrokenPayload:
        pass


def test_a_frame_that_claims_gigabytes_allocates_nothing() -> None:
    # Magic, a descriptor with 8 bytes of content size and one segment, then RLE blocks.
    claim = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, 8 << 30) + b"\x02\x00\x40\x00"
    claim += b"\x03\x00\x40\x00"
    tracemalloc.start()
    for length in (100, 64 << 20):
        with pytest.raises(BrokenPayload, match="another length"):
            expand(Codec.ZSTD, claim, length)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_frame_without_its_size_or_with_more_than_it_says() -> None:
    data = b"abc" * 1000
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    with pytest.raises(BrokenPayload):
        expand(Codec.ZSTD, unsized, len(data))
    good = zstandard.compress(data)
    for damaged in (good[:-3], good[: len(good) // 2], b"", good[4:]):
        with pytest.raises(BrokenPayload):
            expand(Codec.ZSTD, damaged, len(data))
    with pytest.raises(BrokenPayload):
        expand(Codec.ZSTD, good, len(data) - 1)
    with pytest.raises(BrokenPayload, match="in place of"):
        expand(Codec.RAW, data, len(data) + 1)
    with pytest.raises(BrokenPayload, match="codec 9"):
        expand(9, data, len(data))


def test_threads_compress_side_by_side() -> None:
    pieces = [bytes([n]) * 300_000 + bytes(range(256)) for n in range(8)]
    wrong = []

    def work(data: bytes) -> None:
        for _ in range(10):
            codec, body = compress(data)
            if bytes(expand(codec, body, len(data))) != data:
                wrong.append(data[0])

    threads = [threading.Thread(target=work, args=(piece,)) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_buffer_can_be_sealed() -> None:
    seal = Seal(MASTER)
    expected = seal.close(3, 0, HEADER, CONTENT)
    for body in (bytearray(CONTENT), memoryview(CONTENT)):
        assert expected == seal.close(3, 0, HEADER, body)
    assert seal.open(3, 0, HEADER, memoryview(expected)) == CONTENT
