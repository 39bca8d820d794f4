"""``nbdrepo.json``: what it may say."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.sealing import CIPHER

GOOD = RepositoryConfig(cipher=CIPHER)


def said(**fields: object) -> bytes:
    return json.dumps({**json.loads(GOOD.encode()), **fields}).encode()


def test_what_is_stored_is_what_was_meant() -> None:
    data = GOOD.encode()
    assert GOOD == RepositoryConfig.parse(data, "x")
    assert data.endswith(b"\n")
    assert {
        "format": "nbdrepo",
        "version": 1,
        "id": str(GOOD.id),
        "hash": "blake3",
        "cipher": "aes-256-gcm",
        "chunk_size": 262144,
        "page_slots": 512,
        "pack_target": 33554432,
    } == json.loads(data)
    assert RepositoryConfig().id != GOOD.id


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"version": 2}, "use a newer nbdsrv"),
        ({"chunk_size": 65537}, "power of two"),
        ({"chunk_size": 1 << 30}, "damaged"),
        ({"chunk_size": 0}, "damaged"),
        ({"page_slots": 1 << 40}, "damaged"),
        ({"pack_target": 1}, "damaged"),
        ({"hash": "md5"}, "hash 'md5'"),
        ({"cipher": "rot13"}, "cipher 'rot13'"),
        ({"id": "../../x"}, "damaged"),
        ({"new_field": 1}, "damaged"),
    ],
)
def test_what_no_repository_says(fields: dict[str, object], text: str) -> None:
    with pytest.raises(RepositoryError, match=text) as caught:
        RepositoryConfig.parse(said(**fields), "/there/nbdrepo.json")
    assert "/there/nbdrepo.json" in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b'{"x":' + b"[" * 200_000, b'{"format":"nbdrepo"}']
)
def test_what_is_no_configuration(data: bytes) -> None:
    with pytest.raises(RepositoryError, match="no nbdsrv repository"):
        RepositoryConfig.parse(data, "x")


@given(st.data())
def test_mutated_bytes_are_a_configuration_or_our_error(data: st.DataObject) -> None:
    raw = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        RepositoryConfig.parse(bytes(raw), "x").check()
    except RepositoryError:
        pass


@pytest.mark.parametrize(
    "config",
    [
        RepositoryConfig(chunk_size=1 << 15),
        RepositoryConfig(chunk_size=3 << 16),
        RepositoryConfig(page_slots=1),
        RepositoryConfig(pack_target=1 << 30),
        RepositoryConfig(hash="crc"),
        RepositoryConfig(cipher="none"),
    ],
)
def test_what_could_not_be_opened_is_not_made(config: RepositoryConfig) -> None:
    with pytest.raises(ConfigError):
        config.check()
