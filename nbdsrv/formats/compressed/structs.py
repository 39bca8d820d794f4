"""Headers of gzip, xz and zstd that an index is made from.

::

    bgzf   1f 8b 08 04 ... extra: "BC" 2:2 size-1:2      a gzip member of at most 64 KiB
    xz     stream: header:12 block ... index footer:12   variable-length integers, little-endian
    zstd   frame: magic:4 header block ... [checksum:4]  block header: 3 bytes, little-endian
           seek table: magic:4 size:4 entry ... count:4 flags:1 magic:4

All numbers are little-endian.

Facts: SAM specification 4.1 (BGZF), the .xz file format 1.2, RFC 8878, zstd's contrib/
seekable_format.
"""

from construct import Bytes, Const, Int8ul, Int16ul, Int24ul, Int32ul, Struct

__all__ = [
    "SEEK_TABLE_MAGIC",
    "SKIPPABLE_MAGIC",
    "XZ_FOOTER_MAGIC",
    "XZ_MAGIC",
    "ZSTD_MAGIC",
    "BgzfHeader",
    "SeekTableFooter",
    "XzFooter",
    "XzHeader",
    "ZstdBlock",
]

BgzfHeader = Struct(
    "magic" / Const(b"\x1f\x8b\x08\x04"),
    "time" / Int32ul,
    "flags" / Int8ul,
    "system" / Int8ul,
    "extra" / Const(6, Int16ul),
    "field" / Const(b"BC"),
    "length" / Const(2, Int16ul),
    "last" / Int16ul,  # size of the member, minus 1
)

XZ_MAGIC = b"\xfd7zXZ\0"
XZ_FOOTER_MAGIC = b"YZ"

XzHeader = Struct("magic" / Const(XZ_MAGIC), "flags" / Bytes(2), "crc" / Int32ul)

XzFooter = Struct(
    "crc" / Int32ul,
    "backward" / Int32ul,  # size of the index in units of 4 bytes, minus 1
    "flags" / Bytes(2),
    "magic" / Const(XZ_FOOTER_MAGIC),
)

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = 0x184D2A50
"""The lowest four bits are anything."""
SEEK_TABLE_MAGIC = 0x8F92EAB1

ZstdBlock = Struct("header" / Int24ul)  # last:1 kind:2 size:21, from the lowest bit

SeekTableFooter = Struct(
    "count" / Int32ul,
    "descriptor" / Int8ul,  # bit 7: entries have a checksum; bits 2 to 6: must be 0
    "magic" / Const(SEEK_TABLE_MAGIC, Int32ul),
)
