"""How content becomes a payload: compressed, then encrypted; and back, verified.

::

    chunk ──── frames, each ───────────> piece ── AES-256-GCM ──> piece, tag[16]
    page .. ── zstd, if it saves 5 % ──>  "
                                                  key    HKDF-SHA256(master, salt of the pack)
                                                  nonce  offset of the entry in its pack, number of
                                                         the frame, 32 bits each
                                                  data   the entry's header; of a frame its chunk's
                                                         id and its number
    K_id = HKDF-SHA256(master, "nbdrepo v1 ids")        keys the ids (``hashing``)

A fresh 256-bit salt in each pack means a fresh key in each pack: a place in it is nonce enough, and
nothing repeats however much is written. Whoever knows the place of a frame can open it.
"""

import struct
from enum import IntEnum

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nbdsrv.repository.native.zstd import (
    DEFAULT_LEVEL,
    BrokenPayload,
    compressor,
    decompressor,
    is_worth_it,
)
from nbdsrv.store.store import Data

__all__ = [
    "CIPHER",
    "DEFAULT_LEVEL",
    "KEY_SIZE",
    "TAG_SIZE",
    "BrokenPayload",
    "Codec",
    "Seal",
    "Sealing",
    "compress",
    "expand",
]

CIPHER = "aes-256-gcm"
KEY_SIZE = 32
TAG_SIZE = 16
_NONCE = struct.Struct("<II4x")


class Codec(IntEnum):
    """How a body is encoded."""

    RAW = 0
    ZSTD = 1
    FRAMES = 2


def compress(content: Data, level: int = DEFAULT_LEVEL) -> tuple[Codec, Data]:
    """The shorter way to store ``content``; level 0 is not to try."""
    if level:
        body = compressor(level).compress(content)
        if is_worth_it(body, content):
            return Codec.ZSTD, body
    return Codec.RAW, content


def expand(codec: int, body: Data, length: int) -> Data:
    """The content, of exactly ``length`` bytes; ``frames`` has the way for chunks.

    Raises:
        BrokenPayload: it is none, or longer or shorter.
    """
    if codec == Codec.RAW:
        content: Data = body
    elif codec == Codec.ZSTD:
        try:
            # The frame's own word for its size is what would be allocated: ask before.
            if zstandard.frame_content_size(body) != length:
                raise BrokenPayload("a zstd frame of another length")
            content = decompressor().decompress(body)
        except zstandard.ZstdError as error:
            raise BrokenPayload(f"zstd: {error}") from error
    else:
        raise BrokenPayload(f"codec {codec} is unknown")
    if len(content) != length:
        raise BrokenPayload(f"{len(content)} bytes in place of {length}")
    return content


class Seal:
    """Encrypts and decrypts the entries of one pack; without a key it does nothing.

    Attributes:
        encrypts: does it?
        overhead: bytes a payload is longer than its body.
    """

    __slots__ = ("_cipher", "encrypts", "overhead")

    def __init__(self, key: bytes | None) -> None:
        self._cipher = AESGCM(key) if key is not None else None
        self.encrypts = key is not None
        self.overhead = TAG_SIZE if key is not None else 0

    def close(self, offset: int, number: int, with_: bytes, body: Data) -> Data:
        """Encrypt ``body``, piece ``number`` of the entry at ``offset`` of the pack.

        ``with_`` is authenticated with it.
        """
        if self._cipher is None:
            return body
        return self._cipher.encrypt(_NONCE.pack(offset, number), body, with_)

    def open(self, offset: int, number: int, with_: bytes, payload: Data) -> Data:
        """What ``close`` was given.

        Raises:
            BrokenPayload: any of it was changed, or the key is another.
        """
        if self._cipher is None:
            return payload
        try:
            return self._cipher.decrypt(_NONCE.pack(offset, number), payload, with_)
        except (InvalidTag, ValueError) as error:
            raise BrokenPayload("it was changed, or encrypted with another key") from error


_PLAIN = Seal(None)


class Sealing:
    """The keys of one repository.

    Attributes:
        id_key: keys the ids; None in a plain repository.
    """

    def __init__(self, master: bytes | None = None) -> None:
        self._master = master
        self.id_key = self._derive(b"nbdrepo v1 ids", None) if master is not None else None

    def __repr__(self) -> str:
        return "Sealing(***)" if self._master is not None else "Sealing()"

    def seal(self, salt: bytes) -> Seal:
        """For the pack that has this salt."""
        if self._master is None:
            return _PLAIN
        return Seal(self._derive(b"nbdrepo v1 pack", salt))

    def _derive(self, purpose: bytes, salt: bytes | None) -> bytes:
        assert self._master is not None
        return HKDF(SHA256(), KEY_SIZE, salt, purpose).derive(self._master)
