"""A datastore of Proxmox Backup Server, written from the description of the format alone.

There is no genuine tool to make one where these tests run. So this knows nothing of nbdsrv: it
imports none of it, and is held against the known answers of Proxmox's own tests
(``test_pbs_keys``).

::

    store = Datastore(path)                       .chunks/
    key = Key(bytes(32))
    store.snapshot("vm/100", 1767225600, {"drive-scsi0": content}, key=key)

Little-endian throughout; CRC-32 is zlib's.
"""

import base64
import hashlib
import hmac
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["CHUNK", "Datastore", "Key", "blob", "chunk_file", "fixed_index", "key_file", "stamp"]

CHUNK = 64 << 10
"""The smallest the format allows, so that small disks have many; 4 MiB in practice."""

PLAIN = bytes([66, 171, 56, 7, 190, 131, 112, 161])
ZSTD = bytes([49, 185, 88, 66, 111, 182, 163, 127])
ENCRYPTED = bytes([123, 103, 133, 190, 34, 45, 76, 240])
ENCRYPTED_ZSTD = bytes([230, 89, 27, 191, 11, 191, 216, 11])
FIXED_INDEX = bytes([47, 127, 65, 237, 145, 253, 15, 205])
DYNAMIC_INDEX = bytes([28, 145, 78, 165, 25, 186, 179, 205])


class Key:
    """An encryption key and what follows from it."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.id_key = hashlib.pbkdf2_hmac("sha256", key, b"_id_key", 10, 32)

    def digest(self, data: bytes) -> bytes:
        return hashlib.sha256(data + self.id_key).digest()

    def fingerprint(self) -> str:
        constant = hashlib.sha256(b"Proxmox Backup Encryption Key Fingerprint").digest()
        return ":".join(f"{each:02x}" for each in self.digest(constant))

    def signature(self, manifest: Mapping[str, Any]) -> str:
        rest = {k: v for k, v in manifest.items() if k not in ("unprotected", "signature")}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hmac.new(self.id_key, text.encode(), hashlib.sha256).hexdigest()


def key_file(key: Key, kdf: Mapping[str, Any] | None = None, password: bytes = b"") -> str:
    """JSON as proxmox-backup-client writes it."""
    data = key.key
    if kdf is not None:
        if "Scrypt" in kdf:
            given = kdf["Scrypt"]
            wrapping = hashlib.scrypt(
                password,
                salt=base64.b64decode(given["salt"]),
                n=given["n"],
                r=given["r"],
                p=given["p"],
                maxmem=1 << 30,
                dklen=32,
            )
        else:
            given = kdf["PBKDF2"]
            salt = base64.b64decode(given["salt"])
            wrapping = hashlib.pbkdf2_hmac("sha256", password, salt, given["iter"], 32)
        iv = os.urandom(16)
        sealed = AESGCM(wrapping).encrypt(iv, data, None)
        data = iv + sealed[-16:] + sealed[:-16]
    return json.dumps(
        {
            "kdf": kdf,
            "created": "2026-01-01T00:00:00+00:00",
            "modified": "2026-01-01T00:00:00+00:00",
            "data": base64.b64encode(data).decode(),
            "fingerprint": key.fingerprint(),
        }
    )


def blob(data: bytes, *, key: Key | None = None, compress: bool = True) -> bytes:
    """A blob of any of the four kinds; compressed only where that makes it smaller."""
    packed = _zstd(data) if compress else data
    small = len(packed) < len(data)
    body = packed if small else data
    if key is None:
        return (ZSTD if small else PLAIN) + struct.pack("<I", zlib.crc32(body)) + body
    iv = os.urandom(16)
    sealed = AESGCM(key.key).encrypt(iv, body, None)
    text, tag = sealed[:-16], sealed[-16:]
    magic = ENCRYPTED_ZSTD if small else ENCRYPTED
    return magic + struct.pack("<I", zlib.crc32(text)) + iv + tag + text


def _zstd(data: bytes) -> bytes:
    """As a stream: the frame does not tell its length."""
    stream = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    return stream.compress(data) + stream.flush()


def chunk_file(root: Path, digest: bytes) -> Path:
    """Where a chunk lies."""
    return root / ".chunks" / digest.hex()[:4] / digest.hex()


def fixed_index(size: int, chunk: int, digests: bytes, created: int = 0) -> bytes:
    """An .fidx."""
    csum = hashlib.sha256(digests).digest()
    head = FIXED_INDEX + bytes(range(16)) + struct.pack("<q", created) + csum
    head += struct.pack("<QQ", size, chunk)
    return head + bytes(4096 - len(head)) + digests


def stamp(seconds: int) -> str:
    """A snapshot's directory."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Datastore:
    """A datastore on disk."""

    root: Path
    chunk: int = CHUNK
    compress: bool = True
    chunks: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / ".chunks").mkdir(parents=True)
        (self.root / ".lock").touch()

    def put_chunk(self, data: bytes, key: Key | None) -> bytes:
        """Store a chunk once; its digest."""
        digest = key.digest(data) if key else hashlib.sha256(data).digest()
        path = chunk_file(self.root, digest)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(blob(data, key=key, compress=self.compress))
        self.chunks[digest] = len(data)
        return digest

    def directory(self, group: str, seconds: int) -> Path:
        """Of a snapshot: ``a/b/vm/100`` lies under ns/a/ns/b."""
        *spaces, kind, id_ = group.split("/")
        path = self.root
        for space in spaces:
            path = path / "ns" / space
        return path / kind / id_ / stamp(seconds)

    def snapshot(
        self,
        group: str,
        seconds: int,
        disks: Mapping[str, bytes],
        *,
        key: Key | None = None,
        mode: str | None = None,
        signed: bool = True,
        notes: str | None = None,
        protected: bool = False,
        finished: bool = True,
        suffix: str = ".img.fidx",
        unprotected: Mapping[str, Any] | None = None,
        with_files: bool = True,
    ) -> Path:
        """A snapshot with an index for each disk, a configuration, and a manifest."""
        kind, id_ = group.split("/")[-2:]
        path = self.directory(group, seconds)
        path.mkdir(parents=True)
        (path.parent / "owner").write_text("root@pam\n")
        mode = mode or ("encrypt" if key else "none")
        inner = key if mode == "encrypt" else None
        files = []
        for name, content in disks.items():
            pieces = [content[at : at + self.chunk] for at in range(0, len(content), self.chunk)]
            digests = b"".join(self.put_chunk(piece, inner) for piece in pieces)
            (path / f"{name}{suffix}").write_bytes(
                fixed_index(len(content), self.chunk, digests, seconds)
            )
            csum = hashlib.sha256(digests).hexdigest()
            files.append(_file(f"{name}{suffix}", mode, len(content), csum))
        if with_files:
            raw = blob(b"cores: 2\nmemory: 2048\n" * 9, key=inner)
            (path / "qemu-server.conf.blob").write_bytes(raw)
            csum = hashlib.sha256(raw).hexdigest()
            files.append(_file("qemu-server.conf.blob", mode, len(raw), csum))
        manifest: dict[str, Any] = {
            "backup-type": kind,
            "backup-id": id_,
            "backup-time": seconds,
            "files": files,
            "unprotected": {"chunk_upload_stats": {"count": 1}, **(unprotected or {})},
        }
        if notes is not None:
            manifest["unprotected"]["notes"] = notes
        if key is not None:
            manifest["unprotected"].setdefault("key-fingerprint", key.fingerprint())
            if manifest["unprotected"]["key-fingerprint"] is None:
                del manifest["unprotected"]["key-fingerprint"]
        manifest["signature"] = key.signature(manifest) if key and signed else None
        if protected:
            (path / ".protected").touch()
        if finished:
            self.put_manifest(path, manifest)
        return path

    def put_manifest(self, path: Path, manifest: Mapping[str, Any]) -> None:
        (path / "index.json.blob").write_bytes(blob(json.dumps(manifest, indent=2).encode()))

    def manifest(self, path: Path) -> dict[str, Any]:
        raw = (path / "index.json.blob").read_bytes()
        text = raw[12:]
        if raw.startswith(ZSTD):
            text = zstandard.ZstdDecompressor().decompressobj().decompress(text)
        found: dict[str, Any] = json.loads(text)
        return found


def _file(name: str, mode: str, size: int, csum: str) -> dict[str, Any]:
    return {"filename": name, "crypt-mode": mode, "size": size, "csum": csum}
