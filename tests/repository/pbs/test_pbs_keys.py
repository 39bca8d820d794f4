"""Keys: the known answers of Proxmox's own tests, key files of every kind, and broken ones."""

import base64
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import ConfigError, NbdsrvError, RepositoryError
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.pbs.keys import KEYFILE, CryptKey, load_keys
from nbdsrv.repository.pbs.manifest import read_manifest
from tests.repository.pbs.encoder import Key, blob, key_file

SALT = base64.b64encode(bytes(range(32))).decode()
SCRYPT = {"Scrypt": {"n": 1024, "r": 8, "p": 1, "salt": SALT}}
PBKDF2 = {"PBKDF2": {"iter": 1000, "salt": SALT}}


def test_the_fingerprint_of_a_known_key() -> None:
    """Key 00 01 .. 1f."""
    found = CryptKey(bytes(range(32))).fingerprint
    assert found[:16] == "0eabd4460b6eb9ca"
    assert found == Key(bytes(range(32))).fingerprint().replace(":", "")


def test_the_signature_of_a_known_manifest() -> None:
    """Scrypt of "test" with an empty salt signs the manifest of two files."""
    raw = hashlib.scrypt(b"test", salt=b"", n=65536, r=8, p=1, maxmem=1 << 30, dklen=32)
    document = {
        "backup-type": "host",
        "backup-id": "elsa",
        "backup-time": 1593179765,
        "files": [
            {"filename": name, "crypt-mode": mode, "size": 200, "csum": csum * 32}
            for name, mode, csum in (
                ("test1.img.fidx", "encrypt", "01"),
                ("abc.blob", "none", "02"),
            )
        ],
        "unprotected": {"note": "This is not protected by the signature."},
        "signature": "d7b446fb7db081662081d4b40fedd858a1d6307a5aff4ecff7d5bf4fd35679e9",
    }
    manifest = read_manifest("it", blob(json.dumps(document).encode()))
    assert manifest.is_signed_by(CryptKey(raw))
    assert Key(raw).signature(document) == document["signature"]
    document["files"][0]["size"] = 201  # type: ignore[index]
    assert not read_manifest("it", blob(json.dumps(document).encode())).is_signed_by(CryptKey(raw))


def test_the_digest_of_zeroes() -> None:
    from nbdsrv.repository.pbs.chunks import zero_digest

    known = "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
    assert zero_digest(4 << 20).hex() == known


@pytest.mark.parametrize("kdf", [None, SCRYPT, PBKDF2])
def test_a_key_file(tmp_path: Path, kdf: Any) -> None:
    key = Key(b"k" * 32)
    path = tmp_path / "key"
    path.write_text(key_file(key, kdf, b"open sesame"))
    (found,) = load_keys(lambda: "open sesame", {KEYFILE: str(path)})
    assert found.fingerprint == CryptKey(key.key).fingerprint
    if kdf is None:
        return
    with pytest.raises(RepositoryError, match="the passphrase does not open it"):
        load_keys(lambda: "wrong", {KEYFILE: str(path)})


def test_where_the_passphrase_comes_from(tmp_path: Path) -> None:
    path, word = tmp_path / "key", tmp_path / "word"
    path.write_text(key_file(Key(b"k" * 32), PBKDF2, b"theirs"))
    word.write_text("theirs\n")
    for more in (
        {"PBS_ENCRYPTION_PASSWORD": "theirs"},
        {"PBS_ENCRYPTION_PASSWORD_FILE": str(word)},
        {"NBDSRV_PASSPHRASE": "theirs", "PBS_ENCRYPTION_PASSWORD": "wrong"},
    ):
        environment = {KEYFILE: str(path), **more}
        assert len(load_keys(partial(passphrase_of, environment), environment)) == 1
    with pytest.raises(ConfigError, match="NBDSRV_PASSPHRASE"):
        load_keys(lambda: passphrase_of({}), {KEYFILE: str(path)})
    assert load_keys(lambda: passphrase_of({}), {}) == []


def test_several_key_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(key_file(Key(name.encode() * 32)))
    keys = load_keys(str, {KEYFILE: f"{tmp_path}/a:{tmp_path}/b"})
    assert [key.fingerprint for key in keys] == [
        CryptKey(n.encode() * 32).fingerprint for n in "ab"
    ]
    with pytest.raises(ConfigError, match="No such file"):
        load_keys(str, {KEYFILE: f"{tmp_path}/a:{tmp_path}/c"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kdf": {"Scrypt": {"n": 1 << 30, "r": 8, "p": 1, "salt": SALT}}}, "bytes of memory"),
        ({"kdf": {"Scrypt": {"n": 1023, "r": 8, "p": 1, "salt": SALT}}}, "scrypt with n 1023"),
        ({"kdf": {"Scrypt": {"n": -4, "r": 8, "p": 1, "salt": SALT}}}, "scrypt with n -4"),
        ({"kdf": {"Scrypt": {"n": 1024, "r": 8, "p": 1 << 40, "salt": SALT}}}, "scrypt with"),
        ({"kdf": {"Scrypt": {"n": 1024}}}, "its kdf is broken"),
        ({"kdf": {"PBKDF2": {"iter": 1 << 60, "salt": SALT}}}, "rounds"),
        ({"kdf": {"Argon2": {"salt": SALT}}}, "Scrypt and PBKDF2 are known"),
        ({"kdf": {}}, "its kdf is broken"),
        ({"kdf": None}, "its key has 64 bytes"),
        ({"data": "!"}, "is no key file"),
        ({"data": 5}, "is no key file"),
        ({"fingerprint": "00:11"}, "take a copy that is intact"),
    ],
)
def test_a_broken_key_file(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "key"
    document = json.loads(key_file(Key(b"k" * 32), SCRYPT, b"x"))
    path.write_text(json.dumps(document | change))
    with pytest.raises(RepositoryError, match=said):
        load_keys(lambda: "x", {KEYFILE: str(path)})


@given(st.binary(max_size=300) | st.integers(0, 400).map(lambda depth: b"[" * depth * 100))
def test_anything_for_a_key_file(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "anykey"
    path.write_bytes(raw)
    with pytest.raises(NbdsrvError) as caught:
        load_keys(lambda: "x", {KEYFILE: str(path)})
    assert "\n" not in str(caught.value)
