"""Opening a blob: a chunk, a manifest, a configuration.

::

    magic crc | data                       PLAIN: as it is        ZSTD: unpacked
    magic crc | iv tag | ciphertext        ENCRYPTED: decrypted   ENCRYPTED_ZSTD: then unpacked
              '-- crc covers this --'
"""

import zlib

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.pbs.keys import CryptKey, WrongKey
from nbdsrv.repository.pbs.structs import BLOB_HEADER, ENCRYPTED_HEADER, BlobKind
from nbdsrv.repository.unpacking import BrokenPayload, unzstd

__all__ = ["check_blob", "is_encrypted", "open_blob"]

_ENCRYPTED = frozenset({BlobKind.ENCRYPTED, BlobKind.ENCRYPTED_ZSTD})
_PACKED = frozenset({BlobKind.ZSTD, BlobKind.ENCRYPTED_ZSTD})


def is_encrypted(kind: BlobKind) -> bool:
    """Does it take a key?"""
    return kind in _ENCRYPTED


def check_blob(where: str, raw: bytes | memoryview) -> BlobKind:
    """What kind of blob it is; its CRC has been checked.

    Args:
        where: the file, for messages.
        raw: all of it.

    Raises:
        CorruptImage: it is no blob, or not what was written.
    """
    if len(raw) < BLOB_HEADER.size:
        raise _corrupt(where, f"{len(raw)} bytes are no blob, was it cut short?")
    magic, crc = BLOB_HEADER.unpack_from(raw)
    try:
        kind = BlobKind(int.from_bytes(magic, "big"))
    except ValueError as error:
        raise _corrupt(where, f"begins with {magic.hex()}, as no blob does") from error
    begin = _data_at(kind)
    if len(raw) < begin:
        raise _corrupt(where, f"{len(raw)} bytes are no encrypted blob, was it cut short?")
    if zlib.crc32(memoryview(raw)[begin:]) != crc:
        raise _corrupt(where, "its CRC-32 is wrong: it was changed, or cut short")
    return kind


def open_blob(
    where: str,
    raw: bytes | memoryview,
    limit: int,
    key: CryptKey | None = None,
    *,
    sealed: bool = False,
) -> bytes:
    """What a blob holds, checked, decrypted, unpacked. Blocking; any thread.

    Args:
        where: the file, for messages.
        raw: all of it.
        limit: bytes it may hold.
        key: for encrypted ones.
        sealed: must it be encrypted?

    Raises:
        CorruptImage: it is broken, holds more, or takes another key.
    """
    kind = check_blob(where, raw)
    data: bytes | memoryview = memoryview(raw)[_data_at(kind) :]
    if is_encrypted(kind):
        if key is None:
            raise _corrupt(where, "is encrypted, though nothing says so")
        _, _, iv, tag = ENCRYPTED_HEADER.unpack_from(raw)
        try:
            data = key.decrypt(iv, tag, data)
        except WrongKey as error:
            text = f"does not decrypt with the key {key.short}: another key's, or changed"
            raise _corrupt(where, text) from error
    elif sealed:
        raise _corrupt(where, "is not encrypted, though its index is")
    if kind in _PACKED:
        try:
            return unzstd(data, limit)
        except BrokenPayload as error:
            raise _corrupt(where, str(error)) from error
    if len(data) > limit:
        raise _corrupt(where, f"holds {len(data)} bytes, more than {limit}")
    return bytes(data)


def _data_at(kind: BlobKind) -> int:
    return ENCRYPTED_HEADER.size if is_encrypted(kind) else BLOB_HEADER.size


def _corrupt(where: str, what: str) -> CorruptImage:
    return CorruptImage(f"corrupt repository: {where}: {what}")
