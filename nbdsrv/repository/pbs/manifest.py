"""``index.json.blob``: what a snapshot holds, and who vouches for it.

::

    {"backup-type": "vm", "backup-id": "100", "backup-time": 1767225600,
     "files": [{"filename": "drive-scsi0.img.fidx", "crypt-mode": "encrypt", "size": ..., "csum"}],
     "unprotected": {"key-fingerprint", "notes", "verify_state"},       may change
     "signature": HMAC over everything else, as canonical JSON: keys sorted, no spaces
    }

It is never encrypted, so that a listing takes no key.
"""

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.pbs.blob import open_blob
from nbdsrv.repository.pbs.keys import CryptKey, plain_fingerprint

__all__ = ["MAX_MANIFEST", "Archive", "Manifest", "read_manifest"]

MAX_MANIFEST = 4 << 20
"""Bytes, packed and unpacked; a machine with 30 disks has some 8 KiB, and notes."""
MAX_ARCHIVES = 4096
MAX_SIZE = 1 << 62
"""Bytes of a disk; so that no sum overflows."""
MAX_NAME = 255
MODES = ("none", "encrypt", "sign-only")


class Archive(msgspec.Struct, frozen=True, rename="kebab"):
    """A file of a snapshot.

    Attributes:
        filename: in the snapshot's directory.
        size: of the disk for an index, of the file for a blob; bytes.
        csum: of the digests, or of the file; 64 hexadecimal digits.
        crypt_mode: ``none``, ``encrypt`` or ``sign-only``.
    """

    filename: str
    size: int
    csum: str
    crypt_mode: str = "none"


class _Document(msgspec.Struct, rename="kebab"):
    backup_type: str
    backup_id: str
    backup_time: int
    files: list[Archive]
    unprotected: dict[str, Any] = {}
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one says.

    Attributes:
        identity: type, id and time, as in the names of its directories.
        archives: by file name, in order.
        fingerprint: of the key, 64 hexadecimal digits, or "".
        notes: the user's.
        verify_state: what the server's own verification found: ``ok``, ``failed``, or "".
        signature: hexadecimal, or "".
        signed: what it is of; b"" without one.
    """

    identity: tuple[str, str, int]
    archives: dict[str, Archive]
    fingerprint: str
    notes: str
    verify_state: str
    signature: str
    signed: bytes

    def is_signed_by(self, key: CryptKey) -> bool:
        """Is it what the owner of the key has signed?"""
        return key.sign(self.signed) == self.signature


def read_manifest(where: str, raw: bytes) -> Manifest:
    """Parse a manifest.

    Args:
        where: its file, for messages.
        raw: all of it.

    Raises:
        CorruptImage: it is broken.
    """
    text = open_blob(where, raw, MAX_MANIFEST)
    try:
        document = msgspec.json.decode(text)
        found = msgspec.convert(document, _Document)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise _corrupt(where, f"no manifest: {error}") from error
    signature = found.signature or ""
    return Manifest(
        identity=(found.backup_type, found.backup_id, found.backup_time),
        archives=_archives(where, found.files),
        fingerprint=plain_fingerprint(_text(found.unprotected.get("key-fingerprint"))),
        notes=_text(found.unprotected.get("notes")),
        verify_state=_verify_state(found.unprotected.get("verify_state")),
        signature=signature,
        signed=_canonical(where, document) if signature else b"",
    )


def _archives(where: str, files: list[Archive]) -> dict[str, Archive]:
    if len(files) > MAX_ARCHIVES:
        raise _corrupt(where, f"names {len(files)} archives")
    found: dict[str, Archive] = {}
    for each in files:
        name = each.filename
        odd = "/" in name or name.startswith(".") or not name.isprintable()
        if odd or not 0 < len(name) <= MAX_NAME or name in found:
            raise _corrupt(where, f"an archive called {name[:80]!r}")
        if not 0 <= each.size <= MAX_SIZE:
            raise _corrupt(where, f"{name} of {each.size} bytes")
        if each.crypt_mode not in MODES:
            raise _corrupt(where, f"{name} has crypt-mode {each.crypt_mode[:40]!r}")
        if len(each.csum) != 64 or not _is_hex(each.csum):
            raise _corrupt(where, f"{name} has the checksum {each.csum[:80]!r}")
        found[name] = each
    return found


def _is_hex(text: str) -> bool:
    try:
        return bytes.fromhex(text).hex() == text.lower()
    except ValueError:
        return False


def _canonical(where: str, document: Any) -> bytes:
    """As Proxmox signs it."""
    rest = {
        name: value for name, value in document.items() if name not in {"unprotected", "signature"}
    }
    try:
        text = json.dumps(rest, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return text.encode()
    except (RecursionError, ValueError) as error:  # lone surrogates
        raise _corrupt(where, f"no manifest: {error}") from error


def _verify_state(value: Any) -> str:
    return _text(value.get("state")) if isinstance(value, dict) else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _corrupt(where: str, what: str) -> CorruptImage:
    return CorruptImage(f"corrupt repository: {where}: {what}")
