"""Ids of content, and names of objects.

=========  =========================  ==========================
           plain repository           encrypted repository
=========  =========================  ==========================
id         H(content)                 H keyed with K_id (content)
name       H(the object's bytes)      the same: checked without a key
=========  =========================  ==========================

H is BLAKE3-256, or SHA-256 (keyed: HMAC-SHA-256) where a rule demands it. Keyed, so that who keeps
the objects cannot tell whether they hold a certain file.
"""

import hashlib
import hmac
from collections.abc import Callable

from blake3 import blake3

from nbdsrv.store.store import Data

__all__ = ["HASHES", "ID_SIZE", "ZERO_ID", "Hashing"]

ID_SIZE = 32
ZERO_ID = bytes(ID_SIZE)
"""Stands for content that is all zeroes, which is never stored."""

HASHES = ("blake3", "sha256")


class Hashing:
    """How one repository names things. Thread-safe; large inputs release the interpreter.

    Attributes:
        name: one of ``HASHES``.
        id_of: content to its id, 32 bytes.
        name_of: an object's bytes to its name, 32 bytes.
    """

    def __init__(self, name: str, key: bytes | None = None) -> None:
        self.name = name
        self.id_of: Callable[[Data], bytes]
        self.name_of: Callable[[Data], bytes]
        if name == "blake3":
            self.name_of = lambda data: blake3(data).digest()
            if key is None:
                self.id_of = self.name_of
            else:
                self.id_of = lambda data: blake3(data, key=key).digest()
        elif name == "sha256":
            self.name_of = lambda data: hashlib.sha256(data).digest()
            if key is None:
                self.id_of = self.name_of
            else:
                self.id_of = lambda data: hmac.digest(key, data, "sha256")
        else:
            raise ValueError(name)
