"""Encryption of a Xen Orchestra repository: every file by itself, names in plain sight.

::

    encryption.json  {"algorithm": "chacha20-poly1305"}     never encrypted itself
    metadata.json    {"random": "<uuid>"}, encrypted        opens with the right key only

    file     | nonce, 12 bytes | ciphertext | tag, 16 bytes |        no associated data

The key is the 32 characters of the remote's setting as they are: no derivation, no salt. Nothing
binds a file to its name: two blocks that were exchanged decrypt without complaint.
"""

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from nbdsrv.errors import CorruptImage, RepositoryError, UnsupportedImage
from nbdsrv.repository.xo.layout import ENCRYPTION, METADATA
from nbdsrv.repository.xo.sealed_stream import (
    AesStream,
    ChaChaStream,
    OpenStream,
    SealedStream,
)
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Tree

__all__ = [
    "AES",
    "CHACHA",
    "CIPHERS",
    "KEY_LENGTH",
    "OPEN",
    "OVERHEAD",
    "Sealing",
    "read_sealing",
]

OPEN = "none"
CHACHA = "chacha20-poly1305"
AES = "aes-256-gcm"
CIPHERS = (CHACHA, AES)
"""The first is what Xen Orchestra takes today, the other what it once took."""
KEY_LENGTH = 32
"""Characters, and bytes: others than ASCII make the key too long, and Xen Orchestra refuses it."""

_NONCE = 12
_TAG = 16
OVERHEAD = _NONCE + _TAG
"""Bytes an encrypted file is longer than its content."""
MAX_NOTE = 1 << 16
"""Bytes of encryption.json and metadata.json; they have some dozens."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """How files are encrypted. Thread-safe.

    Attributes:
        algorithm: one of ``CIPHERS``, or ``OPEN``.
    """

    algorithm: str
    _cipher: AESGCM | ChaCha20Poly1305 | None
    _key: bytes = field(default=b"", repr=False)

    @classmethod
    def none(cls) -> "Sealing":
        """No encryption."""
        return cls(OPEN, None)

    @classmethod
    def with_key(cls, algorithm: str, key: str, name: str) -> "Sealing":
        """Encryption by a key.

        Args:
            algorithm: one of ``CIPHERS``.
            key: as the remote's setting has it.
            name: the repository's, for messages.

        Raises:
            RepositoryError: that is no key.
        """
        raw = key.encode("utf-8", "surrogateescape")
        if len(raw) != KEY_LENGTH:
            text = f"{name}: the key of a Xen Orchestra remote has {KEY_LENGTH} characters"
            raise RepositoryError(f"{text}, this one {len(key)}")
        cipher = AESGCM(raw) if algorithm == AES else ChaCha20Poly1305(raw)
        return cls(algorithm, cipher, raw)

    @property
    def overhead(self) -> int:
        """Bytes a file is longer than its content."""
        return OVERHEAD if self._cipher is not None else 0

    def seal(self, data: bytes) -> bytes:
        """A file's content, encrypted under a new nonce."""
        if self._cipher is None:
            return data
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, data, None)

    def open(self, sealed: bytes, where: str) -> bytes:
        """A file's content.

        Raises:
            CorruptImage: it is damaged, or was encrypted by another key. ``where``: its path.
        """
        if self._cipher is None:
            return sealed
        if len(sealed) < OVERHEAD:
            text = f"corrupt image: {where} at 0: {len(sealed)} bytes are no encrypted file"
            raise CorruptImage(text)
        view = memoryview(sealed)
        try:
            return self._cipher.decrypt(bytes(view[:_NONCE]), view[_NONCE:], None)
        except InvalidTag as error:
            text = f"corrupt image: {where} at 0: it does not decrypt; it was changed"
            raise CorruptImage(f"{text}, or encrypted with another key") from error

    def stream(self, size: int, where: str) -> SealedStream | OpenStream:
        """The content of a file of ``size`` bytes, a piece at a time.

        Raises:
            CorruptImage: it is too short to be encrypted. ``where``: its path.
        """
        if self._cipher is None:
            return OpenStream()
        kind = AesStream if self.algorithm == AES else ChaChaStream
        return SealedStream(kind, self._key, size, where)

    def peek(self, beginning: bytes) -> bytes:
        """The beginning of a file's content by that of the file. It is not proven."""
        if self._cipher is None or len(beginning) < OVERHEAD:
            return beginning
        # As of a file that goes on: what is its tag is not known.
        return self.stream(len(beginning) + OVERHEAD, "").update(beginning)


def read_sealing(tree: Tree, passphrase: Callable[[], str]) -> Sealing:
    """How a repository is encrypted, its key proven. Blocking.

    Args:
        tree: the repository.
        passphrase: the key; called only if one is needed.

    Raises:
        ConfigError: there is no key.
        RepositoryError: it is wrong.
        UnsupportedImage: the repository names a cipher nobody here knows.
        DiskError: the repository cannot be read.
    """
    algorithm = _algorithm(tree)
    check = _note(tree, METADATA)
    if algorithm == OPEN or (algorithm is None and _is_check(check)):
        return Sealing.none()
    key = passphrase()
    candidates = CIPHERS if algorithm is None else (algorithm,)
    for candidate in candidates:
        sealing = Sealing.with_key(candidate, key, tree.name)
        if check is None or _opens(sealing, check):
            return sealing
    text = f"{tree.name}: the key does not open the repository's {METADATA}"
    raise RepositoryError(f"{text}: it is another remote's, or {METADATA} was changed")


def read_identity(tree: Tree, sealing: Sealing) -> str:
    """The random id in ``metadata.json``, or "": remotes that never were encrypted may have none.

    Blocking.

    Raises:
        StoreError: the repository cannot be read.
    """
    raw = _note(tree, METADATA)
    if raw is None:
        return ""
    try:
        said = msgspec.json.decode(sealing.open(raw, METADATA), type=dict[str, object])
        return str(uuid.UUID(str(said.get("random"))))
    except (CorruptImage, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return ""


def _algorithm(tree: Tree) -> str | None:
    """What ``encryption.json`` says; None: an old repository, which has none."""
    raw = _note(tree, ENCRYPTION)
    if raw is None:
        return None
    where = tree.full(ENCRYPTION)
    try:
        found = msgspec.json.decode(raw, type=dict[str, object]).get("algorithm")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptImage(f"corrupt repository: {where}: {error}") from error
    if found not in {OPEN, *CIPHERS}:
        raise UnsupportedImage(f"{where}: the cipher {str(found)[:40]!r} is not known")
    return str(found)


def _note(tree: Tree, path: str) -> bytes | None:
    try:
        return tree.read(path, MAX_NOTE)
    except ObjectMissing:
        return None


def _is_check(raw: bytes | None) -> bool:
    """Is this ``metadata.json`` plain? An old repository is encrypted if it is not."""
    return raw is None or raw.lstrip().startswith(b"{")


def _opens(sealing: Sealing, check: bytes) -> bool:
    try:
        sealing.open(check, METADATA)
    except CorruptImage:
        return False
    return True
