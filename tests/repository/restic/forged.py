"""A repository that somebody with the password wrote by hand: sealed properly, saying anything.

An encoder of its own, from restic's description of its format; nothing of the reader is used.

::

    Forge ── pack(blobs) ── index(...) ── tree(nodes) ── snapshot(tree)
"""

import base64
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.poly1305 import Poly1305

__all__ = ["Forge"]

PASSWORD = "secret words"


def seal(secret: bytes, plain: bytes) -> bytes:
    """By the 64 bytes: encryption, mac's k, mac's r."""
    encrypt, k, r = secret[:32], secret[32:48], secret[48:64]
    iv = os.urandom(16)
    sealed = Cipher(algorithms.AES(encrypt), modes.CTR(iv)).encryptor().update(plain)
    masked = Cipher(algorithms.AES(k), modes.ECB()).encryptor().update(iv)
    return iv + sealed + Poly1305.generate_tag(r + masked, sealed)


class Forge:
    """An empty repository of version 2, with a cheap key, to be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.master = os.urandom(64)
        for name in ("keys", "index", "snapshots", "data", "locks"):
            (path / name).mkdir(parents=True)
        salt = os.urandom(64)
        record = {
            "mac": {"k": _base64(self.master[32:48]), "r": _base64(self.master[48:])},
            "encrypt": _base64(self.master[:32]),
        }
        user = hashlib.scrypt(PASSWORD.encode(), salt=salt, n=16, r=8, p=1, dklen=64)
        document: dict[str, Any] = {"kdf": "scrypt", "N": 16, "r": 8, "p": 1}
        document |= {"salt": _base64(salt)}
        document |= {"data": _base64(seal(user, json.dumps(record).encode()))}
        self._named("keys", json.dumps(document).encode())
        self.config({"version": 2, "id": "ab" * 32, "chunker_polynomial": "25b468838dcb75"})

    def config(self, document: Any) -> None:
        (self.path / "config").write_bytes(seal(self.master, json.dumps(document).encode()))

    def _named(self, directory: str, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        place = self.path / directory / name[:2] if directory == "data" else self.path / directory
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
        return name

    def document(self, directory: str, document: Any, *, raw: bytes = b"") -> str:
        """A sealed file; ``raw`` instead of JSON."""
        return self._named(directory, seal(self.master, raw or json.dumps(document).encode()))

    def pack(
        self, blobs: Sequence[tuple[str, bytes]], *, header: bytes | None = None
    ) -> tuple[str, list[dict[str, Any]]]:
        """(type, plaintext) each, compressed; its name, and what an index says of it."""
        body, table, rows = b"", b"", []
        for kind, plain in blobs:
            id_ = hashlib.sha256(plain).digest()
            sealed = seal(self.master, zstandard.compress(plain))
            number = 3 if kind == "tree" else 2
            table += struct.pack("<BII32s", number, len(sealed), len(plain), id_)
            rows.append(
                {
                    "id": id_.hex(),
                    "type": kind,
                    "offset": len(body),
                    "length": len(sealed),
                    "uncompressed_length": len(plain),
                }
            )
            body += sealed
        sealed = seal(self.master, table if header is None else header)
        return self._named("data", body + sealed + struct.pack("<I", len(sealed))), rows

    def index(self, packs: Mapping[str, Sequence[Any]], **more: Any) -> str:
        rows = [{"id": name, "blobs": list(blobs)} for name, blobs in packs.items()]
        return self.document("index", {"packs": rows, **more})

    def snapshot(self, tree: str | None, **more: Any) -> str:
        document = {"time": "2026-03-01T10:00:00.123456789+02:00", "tree": tree}
        document |= {"hostname": "vm", "paths": ["/x"], **more}
        return self.document("snapshots", document)

    def file(
        self, pieces: Sequence[bytes], /, snapshot: Mapping[str, Any] | None = None, **more: Any
    ) -> str:
        """A snapshot of disk.raw, made of these pieces; ``more`` in its node. Its name."""
        ids = [hashlib.sha256(piece).hexdigest() for piece in pieces]
        node = {"name": "disk.raw", "type": "file", "size": sum(map(len, pieces)), "content": ids}
        tree = json.dumps({"nodes": [node | more]}).encode() + b"\n"
        distinct = dict.fromkeys(pieces)
        name, rows = self.pack([("data", piece) for piece in distinct])
        other, others = self.pack([("tree", tree)])
        self.index({name: rows, other: others})
        return self.snapshot(hashlib.sha256(tree).hexdigest(), **(snapshot or {}))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
