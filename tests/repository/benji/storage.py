"""An independent writer of Benji's storages, from the format's description alone.

::

    made = Storage(path, cipher=Wrapped(key))
    made.version("v1", disk)            block lists as 0.17 writes them, or as later ones do
"""

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zstandard
from cryptography.hazmat.primitives import keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["BLOCK", "DATE", "Agreed", "Storage", "Wrapped"]

BLOCK = 64 << 10
"""Benji's default is 4 MiB; small disks have many blocks so."""
DATE = "2026-11-20T03:00:%02d.000000Z"


class Envelope(Protocol):
    module: str

    def new(self) -> tuple[bytes, bytes]:
        """A key, and how it is kept."""


@dataclass
class Wrapped:
    """A master key."""

    master: bytes
    module: str = "aes_256_gcm"

    def new(self) -> tuple[bytes, bytes]:
        key = os.urandom(32)
        return key, keywrap.aes_key_wrap(self.master, key)


@dataclass
class Agreed:
    """An ECC key: its point times a fresh number, multiplied out by hand."""

    private: ec.EllipticCurvePrivateKey
    module: str = "aes_256_gcm_ecc"

    def new(self) -> tuple[bytes, bytes]:
        curve = self.private.curve
        fresh = ec.generate_private_key(curve)
        q = self.private.public_key().public_numbers()
        x, y = _times(fresh.private_numbers().private_value, (q.x, q.y), PRIMES[curve.name])
        size = -(-curve.key_size // 8)
        key = hashlib.sha256(x.to_bytes(size, "big") + y.to_bytes(size, "big")).digest()
        der = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return key, fresh.public_key().public_bytes(*der)


PRIMES = {
    "secp256r1": 2**256 - 2**224 + 2**192 + 2**96 - 1,
    "secp384r1": 2**384 - 2**128 - 2**96 + 2**32 - 1,
    "secp521r1": 2**521 - 1,
}
Affine = tuple[int, int]


def _times(number: int, point: Affine, prime: int) -> Affine:
    total: Affine | None = None
    while number:
        if number & 1:
            total = point if total is None else _plus(total, point, prime)
        point = _plus(point, point, prime)
        number >>= 1
    assert total is not None
    return total


def _plus(a: Affine, b: Affine, prime: int) -> Affine:
    if a == b:
        slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, prime)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, prime)
    x = (slope * slope - a[0] - b[0]) % prime
    return x, (slope * (a[0] - x) - a[1]) % prime


@dataclass
class Storage:
    """A storage's directory.

    Attributes:
        path: of it.
        envelope: how it is encrypted.
        hmac_key: metadata is authenticated with.
        lists_sparse: as Benji 0.17 does.
        golden: content by version.
        packed: by zstd?
        metadata: version of the version objects.
    """

    path: Path
    envelope: Envelope | None = None
    hmac_key: bytes | None = None
    lists_sparse: bool = True
    packed: bool = True
    metadata: str = "3.0.0"
    block: int = BLOCK
    golden: dict[str, bytes] = field(default_factory=dict)
    count: int = 0
    _known: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def version(self, uid: str, disk: bytes, /, **changes: Any) -> Path:
        """Back up; where its object lies."""
        self.count += 1
        blocks: list[dict[str, Any]] = []
        for index, at in enumerate(range(0, len(disk), self.block)):
            data = bytes(disk[at : at + self.block])
            row: dict[str, Any] = {"uid": {"left": None, "right": None}, "idx": index}
            row |= {"size": len(data), "valid": True, "checksum": None}
            if any(data):
                left, right = self._put(data, (self.count, index + 1))
                checksum = hashlib.blake2b(data, digest_size=32).hexdigest()
                row |= {"uid": {"left": left, "right": right}, "checksum": checksum}
            elif not self.lists_sparse:
                continue
            blocks.append(row)
        version = {
            "uid": uid,
            "date": DATE % self.count,
            "volume": "pool/vm 1",
            "snapshot": "",
            "size": len(disk),
            "block_size": self.block,
            "status": "valid",
            "protected": False,
            "bytes_read": len(disk),
            "bytes_written": 0,
            "bytes_deduplicated": 0,
            "bytes_sparse": 0,
            "duration": 1,
            "storage": "store",
            "labels": {"tier": "gold"},
        }
        version |= {**changes, "blocks": changes.get("blocks", blocks)}
        said = {"metadata_version": self.metadata, "versions": [version]}
        self.golden[uid] = bytes(disk)
        return self.put(
            f"versions/{_fanned(uid)}", json.dumps(said, separators=(",", ":")).encode()
        )

    def _put(self, data: bytes, uid: tuple[int, int]) -> tuple[int, int]:
        digest = hashlib.blake2b(data, digest_size=32)
        if digest.digest() in self._known:
            return self._known[digest.digest()]
        self._known[digest.digest()] = uid
        self.put(self.block_path(*uid), data, digest.hexdigest())
        return uid

    def block_path(self, left: int, right: int) -> str:
        return f"blocks/{_fanned(f'{left:016x}-{right:016x}')}"

    def put(self, path: str, data: bytes, checksum: str | None = None) -> Path:
        """An object and its metadata."""
        meta: dict[str, Any] = {"created": DATE % 0, "metadata_version": "2.0.0"}
        meta |= {"modified": DATE % 0, "size": len(data)}
        if checksum:
            meta["checksum"] = checksum
        transforms: list[Mapping[str, Any]] = []
        if self.packed:
            smaller = zstandard.ZstdCompressor(write_content_size=False).compress(data)
            if len(smaller) < len(data):
                materials: dict[str, Any] = {"original_size": len(data)}
                transforms.append({"name": "zs", "module": "zstd", "materials": materials})
                data = smaller
        if self.envelope is not None:
            key, kept = self.envelope.new()
            iv = os.urandom(16)
            data = Cipher(algorithms.AES(key), modes.GCM(iv)).encryptor().update(data)
            materials = {"envelope_key": base64.b64encode(kept).decode()}
            materials["iv"] = base64.b64encode(iv).decode()
            row = {"name": "crypt", "module": self.envelope.module, "materials": materials}
            transforms.append(row)
        meta |= {"object_size": len(data), "transforms": transforms}
        if self.hmac_key is not None:
            made = hmac.new(self.hmac_key, _flat(meta).encode(), "sha256").digest()
            meta["hmac"] = {"algorithm": "sha256", "digest": base64.b64encode(made).decode()}
        target = self.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        Path(f"{target}.meta").write_text(json.dumps(meta, separators=(",", ":")))
        return target


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(key + _flat(value[key]) for key in sorted(value))
    if isinstance(value, list):
        return "".join(map(_flat, value))
    return str(value)


def _fanned(key: str) -> str:
    digest = hashlib.md5(key.encode()).hexdigest()
    return f"{digest[:2]}/{digest[2:4]}/{key}"
