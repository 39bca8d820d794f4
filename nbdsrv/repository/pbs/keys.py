"""Keys of encrypted backups: from proxmox-backup-client's key files to what chunks take.

::

    NBDSRV_PBS_KEYFILE=/root/vm.key:/root/old.key
      {"kdf": null | Scrypt | PBKDF2, "data": ..., "fingerprint": ...}
          │ passphrase: NBDSRV_PASSPHRASE[_FILE], else PBS_ENCRYPTION_PASSWORD[_FILE]
          ▼
      enc_key ─── AES-256-GCM with an IV of 16 bytes ──> blobs
          └ PBKDF2("_id_key", 10) ─> id_key ─┬─ SHA-256(plain + id_key)   a chunk's digest
                                             ├─ HMAC-SHA-256              a manifest's signature
                                             └─ SHA-256 with a constant   the fingerprint

A manifest names the fingerprint of its key, so that several keys may be given at once.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.repository.passphrase import VARIABLE, passphrase_of

__all__ = ["KEYFILE", "CryptKey", "WrongKey", "load_keys", "plain_fingerprint"]

KEYFILE = "NBDSRV_PBS_KEYFILE"
"""Key files, divided by colons."""
PBS_PASSWORD = "PBS_ENCRYPTION_PASSWORD"  # noqa: S105 - a variable's name
MAX_KEYFILE = 64 << 10
MAX_KEYFILES = 64
KEY_SIZE = 32
WRAPPED = 16 + 16 + KEY_SIZE
"""Bytes: iv, tag, the encrypted key."""
MAX_SCRYPT_MEMORY = 512 << 20
"""Bytes a key file may ask for; Proxmox's ask for 64 MiB."""
MAX_SCRYPT_P = 16
MAX_ROUNDS = 20_000_000
"""Of PBKDF2; Proxmox's have 65 535."""

_FINGERPRINT_INPUT = hashlib.sha256(b"Proxmox Backup Encryption Key Fingerprint").digest()


class WrongKey(Exception):
    """It does not decrypt what it was tried on."""


class CryptKey:
    """A key, and what is derived from it. Immutable; any thread.

    Attributes:
        fingerprint: 64 hexadecimal digits.
    """

    __slots__ = ("_aes", "_id_key", "fingerprint")

    def __init__(self, key: bytes) -> None:
        """Args: key: 32 bytes."""
        self._aes = AESGCM(key)
        self._id_key = hashlib.pbkdf2_hmac("sha256", key, b"_id_key", 10, KEY_SIZE)
        self.fingerprint = self.digest(_FINGERPRINT_INPUT).hex()

    def __repr__(self) -> str:
        return f"CryptKey({self.short})"

    @property
    def short(self) -> str:
        """The first eight bytes of the fingerprint as Proxmox shows them."""
        return _colons(self.fingerprint[:16])

    def digest(self, data: bytes) -> bytes:
        """Of an encrypted chunk's content."""
        found = hashlib.sha256(data)
        found.update(self._id_key)
        return found.digest()

    def sign(self, data: bytes) -> str:
        """A manifest's signature."""
        return hmac.new(self._id_key, data, "sha256").hexdigest()

    def decrypt(self, iv: bytes, tag: bytes, data: bytes | memoryview) -> bytes:
        """Plain text, proven by ``tag``.

        Raises:
            WrongKey: this key, or these bytes, are others.
        """
        try:
            return self._aes.decrypt(iv, b"".join((data, tag)), None)
        except InvalidTag as error:
            raise WrongKey from error


def plain_fingerprint(text: str) -> str:
    """``aa:bb:...`` without colons, in lower case: as ``CryptKey.fingerprint``."""
    return text.replace(":", "").lower()


def load_keys(
    passphrase: Callable[[], str], environment: Mapping[str, str] = os.environ
) -> Sequence[CryptKey]:
    """The keys the environment names; none if it names none. Blocking: scrypt takes its time.

    Raises:
        ConfigError: a key file cannot be read, or wants a passphrase and there is none.
        RepositoryError: it is no key file, or the passphrase does not open it.
    """
    paths = [path for path in environment.get(KEYFILE, "").split(":") if path]
    if len(paths) > MAX_KEYFILES:
        raise ConfigError(f"{KEYFILE}: {len(paths)} files, at most {MAX_KEYFILES} are read")
    keys: list[CryptKey] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_KEYFILE + 1)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{KEYFILE} {path}: {error}") from error
        keys.append(_open(path, raw, lambda: _passphrase(passphrase, environment)))
    return keys


def _passphrase(ours: Callable[[], str], environment: Mapping[str, str]) -> str:
    """Ours; where it is not set, that of Proxmox's own client."""
    if not any(environment.get(name) for name in (VARIABLE, f"{VARIABLE}_FILE")) and any(
        environment.get(name) for name in (PBS_PASSWORD, f"{PBS_PASSWORD}_FILE")
    ):
        return passphrase_of(environment, PBS_PASSWORD)
    return ours()


class _KeyFile(msgspec.Struct):
    """As it lies on disk."""

    data: str
    kdf: dict[str, Any] | None = None
    fingerprint: str | None = None


def _open(path: str, raw: bytes, passphrase: Callable[[], str]) -> CryptKey:
    broken = f"{KEYFILE} {path}: is no key file of proxmox-backup-client"
    if len(raw) > MAX_KEYFILE:
        raise RepositoryError(f"{broken}: longer than {MAX_KEYFILE} bytes")
    try:
        file = msgspec.json.decode(raw, type=_KeyFile)
        data = base64.b64decode(file.data, validate=True)
    except (msgspec.MsgspecError, RecursionError, binascii.Error, ValueError) as error:
        raise RepositoryError(f"{broken}: {error}") from error
    if len(data) != (KEY_SIZE if file.kdf is None else WRAPPED):
        raise RepositoryError(f"{broken}: its key has {len(data)} bytes")
    if file.kdf is not None:
        wrapping = AESGCM(_derive(broken, file.kdf, passphrase().encode()))
        try:
            data = wrapping.decrypt(data[:16], data[32:] + data[16:32], None)
        except InvalidTag as error:
            text = f"{KEYFILE} {path}: the passphrase does not open it"
            raise RepositoryError(text) from error
    key = CryptKey(data)
    told = plain_fingerprint(file.fingerprint or "")
    if told and told != key.fingerprint:
        text = f"{KEYFILE} {path}: its key is {key.short} ..., the file says {_colons(told[:16])}"
        raise RepositoryError(f"{text} ...; take a copy that is intact")
    return key


def _derive(broken: str, kdf: Mapping[str, Any], passphrase: bytes) -> bytes:
    """The key that wraps the key."""
    try:
        ((name, given),) = kdf.items()
        salt = base64.b64decode(given["salt"], validate=True)
        if name == "Scrypt":
            n, r, p = (int(given[each]) for each in "nrp")
            if n < 2 or n & (n - 1) or r < 1 or not 1 <= p <= MAX_SCRYPT_P:
                raise RepositoryError(f"{broken}: scrypt with n {n}, r {r}, p {p}")
            if 128 * n * r > MAX_SCRYPT_MEMORY:
                raise RepositoryError(f"{broken}: scrypt would take {128 * n * r} bytes of memory")
            memory = 128 * r * (n + p + 2) + (1 << 20)
            return hashlib.scrypt(
                passphrase, salt=salt, n=n, r=r, p=p, maxmem=memory, dklen=KEY_SIZE
            )
        if name == "PBKDF2":
            rounds = int(given["iter"])
            if not 1 <= rounds <= MAX_ROUNDS:
                raise RepositoryError(f"{broken}: PBKDF2 with {rounds} rounds")
            return hashlib.pbkdf2_hmac("sha256", passphrase, salt, rounds, KEY_SIZE)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RepositoryError(f"{broken}: its kdf is broken: {error!r}") from error
    raise RepositoryError(f"{broken}: its kdf is {str(name)[:40]!r}; Scrypt and PBKDF2 are known")


def _colons(digits: str) -> str:
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))
