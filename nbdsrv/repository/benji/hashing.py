"""The hash Benji's blocks are known by.

``hashFunction: BLAKE2b,digest_bits=256`` of its configuration; without one the usual functions of
that length are tried at the first block, and the one that fits is kept: of a block that is broken
none fits.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence

from nbdsrv.errors import ConfigError

__all__ = ["BlockHash"]

Hash = Callable[[bytes], bytes]

_FIXED = {
    "SHA256": "sha256",
    "SHA512": "sha512",
    "SHA384": "sha384",
    "SHA224": "sha224",
    "SHA1": "sha1",
    "MD5": "md5",
    "SHA3_256": "sha3_256",
    "SHA3_512": "sha3_512",
}
"""Benji's names (PyCryptodome's modules), and ours."""
_BLAKE2 = {"BLAKE2b": 64, "BLAKE2s": 32}
"""Bytes of a digest at most."""


class BlockHash:
    """Thread-safe.

    Attributes:
        name: of the function, as Benji writes it; "" until it is known.
    """

    def __init__(self, function: str, where: str) -> None:
        """Use a configured function, or "" if none is.

        Raises:
            ConfigError: it is one that nobody knows.
        """
        self.name = function
        self._lock = threading.Lock()
        self._known: Hash | None = _function(function, where) if function else None

    def fits(self, data: bytes, checksum: bytes) -> bool:
        """Is that the content's checksum?"""
        known = self._known
        if known is not None:
            return known(data) == checksum
        for name, function in _candidates(len(checksum)):
            if function(data) == checksum:
                with self._lock:
                    self.name, self._known = name, function
                return True
        return False


def _function(text: str, where: str) -> Hash:
    name, _, options = text.partition(",")
    if name in _FIXED and not options:
        return _fixed(_FIXED[name])
    if name in _BLAKE2:
        key, _, value = options.partition("=")
        most = _BLAKE2[name]
        per = {"digest_bits": 8, "digest_bytes": 1}.get(key.strip(), 0)
        if not options:
            return _blake2(name, most)
        if per and value.strip().isdigit() and 1 <= int(value) // per <= most:
            return _blake2(name, int(value) // per)
    raise ConfigError(f"{where}: hashFunction {text!r:.80} is not known")


def _candidates(length: int) -> Sequence[tuple[str, Hash]]:
    found: list[tuple[str, Hash]] = []
    for name, most in _BLAKE2.items():
        if 1 <= length <= most:
            found.append((f"{name},digest_bits={length * 8}", _blake2(name, length)))
    for name, ours in _FIXED.items():
        if hashlib.new(ours, usedforsecurity=False).digest_size == length:
            found.append((name, _fixed(ours)))
    return found


def _fixed(name: str) -> Hash:
    return lambda data: hashlib.new(name, data, usedforsecurity=False).digest()


def _blake2(name: str, length: int) -> Hash:
    if name == "BLAKE2b":
        return lambda data: hashlib.blake2b(data, digest_size=length).digest()
    return lambda data: hashlib.blake2s(data, digest_size=length).digest()
