"""Deciphering an encrypted file that is too large for memory, a piece at a time.

::

    | nonce, 12 | ciphertext ....................... | tag, 16 |
                  update() ──> plain, not proven yet   finish(): now it is, or CorruptImage

ChaCha20-Poly1305 is RFC 8439, section 2.8: block 0 of the key stream gives the Poly1305 key, the
text begins with block 1; the tag covers the ciphertext, padded to 16 bytes, and the lengths.
"""

import struct
from typing import Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.poly1305 import Poly1305

from nbdsrv.errors import CorruptImage

__all__ = ["AesStream", "ChaChaStream", "OpenStream", "SealedStream"]

_NONCE = 12
_TAG = 16
_POLY_KEY = 32
_FIRST_BLOCK = 64


class _Deciphering(Protocol):
    """One cipher, told the file's beginning."""

    def __init__(self, key: bytes, nonce: bytes) -> None: ...

    def update(self, data: bytes) -> bytes: ...

    def prove(self, tag: bytes) -> bool: ...


class AesStream:
    """AES-256-GCM."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._cipher = Cipher(AES256(key), GCM(nonce)).decryptor()

    def update(self, data: bytes) -> bytes:
        """The next bytes, deciphered."""
        return self._cipher.update(data)

    def prove(self, tag: bytes) -> bool:
        """Is that the tag of all that went through?"""
        try:
            self._cipher.finalize_with_tag(tag)
        except InvalidTag:
            return False
        return True


class ChaChaStream:
    """ChaCha20-Poly1305."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._cipher = Cipher(ChaCha20(key, bytes(4) + nonce), None).decryptor()
        self._sum = Poly1305(self._cipher.update(bytes(_FIRST_BLOCK))[:_POLY_KEY])
        self._length = 0

    def update(self, data: bytes) -> bytes:
        """The next bytes, deciphered."""
        self._sum.update(data)
        self._length += len(data)
        return self._cipher.update(data)

    def prove(self, tag: bytes) -> bool:
        """Is that the tag of all that went through?"""
        self._sum.update(bytes(-self._length % 16) + struct.pack("<QQ", 0, self._length))
        try:
            self._sum.verify(tag)
        except InvalidSignature:
            return False
        return True


class OpenStream:
    """No encryption."""

    def update(self, data: bytes) -> bytes:
        """The bytes as they are."""
        return data

    def finish(self) -> None:
        """There is nothing to prove."""


class SealedStream:
    """One file. Not thread-safe."""

    def __init__(self, kind: type[_Deciphering], key: bytes, size: int, where: str) -> None:
        """A stream at its beginning.

        Args:
            kind: the cipher.
            key: of 32 bytes.
            size: of the file, nonce and tag included.
            where: its path, for messages.

        Raises:
            CorruptImage: it is too short to be one.
        """
        self._where = where
        self._left = size - _NONCE - _TAG
        if self._left < 0:
            text = f"corrupt image: {where} at 0: {size} bytes are no encrypted file"
            raise CorruptImage(text)
        self._kind = kind
        self._key = key
        self._head = b""
        self._tail = b""
        self._cipher: _Deciphering | None = None

    def update(self, data: bytes) -> bytes:
        """The next bytes of the file; what could be deciphered of it."""
        if self._cipher is None:
            self._head += data
            if len(self._head) < _NONCE:
                return b""
            self._cipher = self._kind(self._key, self._head[:_NONCE])
            data = self._head[_NONCE:]
        if len(data) > self._left:
            self._tail += data[self._left :]
            data = data[: self._left]
        self._left -= len(data)
        return self._cipher.update(data) if data else b""

    def finish(self) -> None:
        """All of it has gone through.

        Raises:
            CorruptImage: it was changed, or encrypted with another key.
        """
        whole = not self._left and len(self._tail) == _TAG
        if not whole or self._cipher is None or not self._cipher.prove(self._tail):
            text = f"corrupt image: {self._where} at 0: it does not decrypt; it was changed"
            raise CorruptImage(f"{text}, or encrypted with another key")
