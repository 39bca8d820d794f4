"""Ids and names: published vectors, and what hashlib says."""

import hashlib
import hmac
import subprocess

import pytest

from nbdsrv.repository.native.hashing import HASHES, ID_SIZE, ZERO_ID, Hashing

KEY = b"whats the Elvish word for friend"

# From BLAKE3's own test_vectors.json: input of 0 and 1 bytes; plain and keyed.
VECTORS = [
    (
        b"",
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26",
    ),
    (
        b"\x00",
        "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
        "6d7878dfff2f485635d39013278ae14f1454b8c0a3a2d34bc1ab38228a80c95b",
    ),
]


@pytest.mark.parametrize(("data", "plain", "keyed"), VECTORS)
def test_blake3_as_published(data: bytes, plain: str, keyed: str) -> None:
    assert plain == Hashing("blake3").id_of(data).hex()
    assert plain == Hashing("blake3", KEY).name_of(data).hex()
    assert keyed == Hashing("blake3", KEY).id_of(data).hex()


def test_sha256_and_hmac_as_openssl_says() -> None:
    data = b"x" * 100_000
    said = subprocess.run(
        ["openssl", "dgst", "-sha256", "-hmac", KEY.decode(), "-r"],
        input=data,
        capture_output=True,
        check=True,
    ).stdout
    assert said.split()[0].decode() == Hashing("sha256", KEY).id_of(data).hex()
    assert hashlib.sha256(data).digest() == Hashing("sha256", KEY).name_of(data)
    assert hashlib.sha256(data).digest() == Hashing("sha256").id_of(data)
    assert hmac.digest(KEY, data, "sha256") == Hashing("sha256", KEY).id_of(data)


@pytest.mark.parametrize("name", HASHES)
@pytest.mark.parametrize("key", [None, KEY])
def test_any_buffer_has_the_same_id(name: str, key: bytes | None) -> None:
    hashing = Hashing(name, key)
    data = bytes(range(256)) * 500
    for other in (bytearray(data), memoryview(data), memoryview(b"x" + data)[1:]):
        assert hashing.id_of(data) == hashing.id_of(other)
        assert hashing.name_of(data) == hashing.name_of(other)
    assert ID_SIZE == len(hashing.id_of(data)) == len(ZERO_ID)
    assert (key is None) == (hashing.id_of(data) == hashing.name_of(data))


def test_an_unknown_hash() -> None:
    with pytest.raises(ValueError, match="md5"):
        Hashing("md5")
