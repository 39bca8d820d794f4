"""A Proxmox Backup Server datastore on disk, little-endian.

::

    blob        magic:8 crc:4 data                       CRC-32 (zlib's) of all behind the header
    encrypted   magic:8 crc:4 iv:16 tag:16 ciphertext    AES-256-GCM, no additional data
    fidx        header, padded to 4096 | digest:32 of each chunk
    didx        header, padded to 4096 | end:8 digest:32 of each chunk

A blob's magic is the beginning of a SHA-256 that names its kind; so are those of the indexes.
Names are those of Proxmox's source.
"""

from enum import IntEnum
from struct import Struct as Packed

from construct import Bytes, Const, Int64sl, Int64ul, Struct

__all__ = [
    "BLOB_HEADER",
    "DIGEST",
    "ENCRYPTED_HEADER",
    "INDEX_HEADER",
    "MAX_BLOB",
    "BlobKind",
    "FixedIndexHeader",
]

FixedIndexHeader = Struct(
    "magic" / Const(bytes.fromhex("2f7f41ed91fd0fcd")),
    "uuid" / Bytes(16),
    "ctime" / Int64sl,
    "index_csum" / Bytes(32),
    "size" / Int64ul,
    "chunk_size" / Int64ul,
)
INDEX_HEADER = 4096
"""Bytes before the digests; the rest of it is reserved."""
DIGEST = 32

BLOB_HEADER = Packed("<8sI")
ENCRYPTED_HEADER = Packed("<8sI16s16s")
MAX_BLOB = 128 << 20
"""Bytes, by the format."""


class BlobKind(IntEnum):
    """What lies behind a blob's header; values are magics read as big-endian numbers."""

    PLAIN = 0x42AB3807BE8370A1
    ZSTD = 0x31B958426FB6A37F
    ENCRYPTED = 0x7B6785BE222D4CF0
    ENCRYPTED_ZSTD = 0xE6591BBF0BBFD80B
