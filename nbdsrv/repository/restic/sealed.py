"""What restic seals: AES-256 in counter mode, authenticated by Poly1305-AES, perhaps compressed.

::

    file or blob   | iv 16 | ciphertext ... | mac 16 |
    mac            Poly1305(r || AES_k(iv)) over the ciphertext
    key            encrypt 32, mac.k 16, mac.r 16         64 bytes, also what scrypt derives

    plaintext of a file (snapshots, index) of version 2    "{" or "[": JSON;  2: zstd of JSON

Source: restic's design document, "Keys, Encryption and MAC" and "Repository Format".
"""

from dataclasses import dataclass, field

import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.poly1305 import Poly1305

from nbdsrv.repository.native.zstd import decompressor

__all__ = ["OVERHEAD", "Broken", "SealKey", "expanded", "expanded_to", "plain_json"]

IV_SIZE = 16
MAC_SIZE = 16
OVERHEAD = IV_SIZE + MAC_SIZE
"""Bytes that sealing adds."""
COMPRESSED = 2
"""First byte of a compressed file."""


class Broken(Exception):
    """It is not what was stored. Whoever knows where it lies makes it an error that says so."""


@dataclass(frozen=True, slots=True)
class SealKey:
    """Encrypts and authenticates. Thread-safe.

    Attributes:
        encrypt: AES-256 key.
        mac_k: AES-128 key that masks the nonce.
        mac_r: the polynomial's point.
    """

    encrypt: bytes = field(repr=False)
    mac_k: bytes = field(repr=False)
    mac_r: bytes = field(repr=False)

    @classmethod
    def derived(cls, secret: bytes) -> "SealKey":
        """From the 64 bytes scrypt gives."""
        return cls(secret[:32], secret[32:48], secret[48:64])

    def opened(self, sealed: bytes) -> bytes:
        """The plaintext.

        Raises:
            Broken: it was changed, or is another key's.
        """
        if len(sealed) < OVERHEAD:
            raise Broken(f"{len(sealed)} bytes, fewer than a seal takes")
        view = memoryview(sealed)
        iv, ciphertext, mac = view[:IV_SIZE], view[IV_SIZE:-MAC_SIZE], view[-MAC_SIZE:]
        masked = Cipher(AES(self.mac_k), ECB()).encryptor().update(iv)  # noqa: S305 - Poly1305-AES
        try:
            Poly1305.verify_tag(self.mac_r + masked, ciphertext, bytes(mac))
        except InvalidSignature:
            raise Broken("its authentication code does not fit: it was changed") from None
        return Cipher(AES(self.encrypt), CTR(bytes(iv))).decryptor().update(ciphertext)


def plain_json(data: bytes, limit: int) -> bytes:
    """The JSON in the plaintext of a file.

    Raises:
        Broken: it is none, or longer than ``limit``.
    """
    if data[:1] in {b"{", b"["}:
        return data
    if data[:1] != bytes([COMPRESSED]):
        raise Broken("neither JSON nor compressed JSON")
    return expanded(data[1:], limit)


def expanded_to(data: bytes, size: int) -> bytes:
    """What zstd made of exactly ``size`` bytes.

    Raises:
        Broken: it did not.
    """
    found = expanded(data, size)
    if len(found) != size:
        raise Broken(f"it expands to {len(found)} bytes, not to {size}")
    return found


def expanded(data: bytes, limit: int) -> bytes:
    """What zstd made smaller; at most ``limit`` bytes are ever made of it.

    Raises:
        Broken: it is no zstd frame, or holds more.
    """
    try:
        size = zstandard.frame_content_size(data)
        if size > limit:
            raise Broken(f"it expands to {size} bytes, more than {limit}")
        if size >= 0:
            return decompressor().decompress(data)
        with decompressor().stream_reader(data) as reader:
            found = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise Broken(f"zstd: {error}") from error
    if len(found) > limit:
        raise Broken(f"it expands to more than {limit} bytes")
    return found
