"""What a VHD file is made of ("Virtual Hard Disk Image Format Specification", Microsoft, 2006).

::

    fixed          |=========== data ===========| footer |

    dynamic,       | footer | header | BAT | locators | block | block | ... | footer |
    differencing     copy     1 KiB                       |
                                          | sector bitmap | data |       1 bit per sector, MSB first

All integers are big-endian, all positions in the BAT are sectors. A checksum is the complement of
the sum of all bytes, its own taken as zeroes.
"""

from enum import IntEnum
from typing import Any

from construct import Array, Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Struct

__all__ = [
    "ABSENT",
    "CREATOR_TAP",
    "EPOCH",
    "FEATURES_RESERVED",
    "FOOTER",
    "FOOTER_CHECKSUM",
    "FOOTER_COOKIE",
    "FOOTER_HIDDEN",
    "FOOTER_SIZE",
    "HEADER",
    "HEADER_CHECKSUM",
    "HEADER_COOKIE",
    "HEADER_SIZE",
    "LOCATORS",
    "MAX_NAME",
    "MAX_SECTORS",
    "MAX_SIZE",
    "NO_OFFSET",
    "OLD_FOOTER_SIZE",
    "PARENT_UNIQUE_ID",
    "SECTOR",
    "VERSION",
    "DiskType",
    "Platform",
    "bitmap_size",
    "checksum",
]

SECTOR = 512
FOOTER_SIZE = 512
OLD_FOOTER_SIZE = 511
"""Before Virtual PC 2004 the footer had one byte less."""
HEADER_SIZE = 1024

FOOTER_COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
VERSION = 0x00010000
"""Of footer and header: 1.0."""
FEATURES_RESERVED = 2
"""The bit of ``features`` that must be set."""
NO_OFFSET = 0xFFFFFFFFFFFFFFFF
"""``data_offset`` of a fixed disk, and of every header."""
ABSENT = 0xFFFFFFFF
"""BAT entry of a block that is not in the file."""
EPOCH = 946684800
"""Timestamps count seconds from 2000-01-01 UTC; this is that moment in Unix time."""
MAX_SECTORS = 0xFF000000
"""Sectors of the largest disk, 2040 GiB: what a BAT of 32-bit sectors can surely hold."""
MAX_SIZE = (1 << 63) - 1
"""Bytes of any disk: offsets are signed 64-bit numbers to everyone else."""
CREATOR_TAP = b"tap\0"
"""tapdisk, of XenServer and XCP-ng."""


class DiskType(IntEnum):
    """The footer's ``disk_type``; other values are deprecated."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


class Platform(IntEnum):
    """What kind of name a parent locator holds."""

    NONE = 0
    W2RU = 0x57327275
    """A relative Windows path, UTF-16LE."""
    W2KU = 0x57326B75
    """An absolute Windows path, UTF-16LE."""
    MACX = 0x4D616358
    """A file:// URI, UTF-8."""


FOOTER: Any = Struct(
    "cookie" / Bytes(8),
    "features" / Int32ub,
    "version" / Int32ub,
    "data_offset" / Int64ub,  # of the header
    "timestamp" / Int32ub,
    "creator" / Bytes(4),
    "creator_version" / Int32ub,  # major << 16 | minor
    "creator_os" / Bytes(4),
    "original_size" / Int64ub,
    "current_size" / Int64ub,
    "geometry" / Struct("cylinders" / Int16ub, "heads" / Int8ub, "sectors" / Int8ub),
    "disk_type" / Int32ub,
    "checksum" / Int32ub,
    "unique_id" / Bytes(16),
    "saved_state" / Int8ub,
    "hidden" / Int8ub,  # tapdisk's; reserved in the specification
    "reserved" / Bytes(426),
)
FOOTER_CHECKSUM = 64
"""Where in the footer its checksum stands."""
FOOTER_HIDDEN = 85
"""Where in the footer ``hidden`` stands."""

_LOCATOR: Any = Struct(
    "platform" / Int32ub,
    "data_space" / Int32ub,  # sectors; in some of Microsoft's files bytes
    "data_length" / Int32ub,  # bytes
    "reserved" / Int32ub,
    "data_offset" / Int64ub,
)
LOCATORS = 8
MAX_NAME = 1 << 16
"""Bytes of a name in a locator: Windows paths have up to 32 767 UTF-16 units."""

HEADER: Any = Struct(
    "cookie" / Bytes(8),
    "data_offset" / Int64ub,
    "table_offset" / Int64ub,  # of the BAT
    "version" / Int32ub,
    "max_table_entries" / Int32ub,
    "block_size" / Int32ub,  # without its bitmap
    "checksum" / Int32ub,
    "parent_unique_id" / Bytes(16),
    "parent_timestamp" / Int32ub,
    "reserved1" / Bytes(4),
    "parent_unicode_name" / Bytes(512),  # UTF-16BE
    "locators" / Array(LOCATORS, _LOCATOR),
    "reserved2" / Bytes(256),
)
HEADER_CHECKSUM = 36
"""Where in the header its checksum stands."""
PARENT_UNIQUE_ID = 40
"""Where in the header its parent's unique id stands."""


def checksum(structure: bytes | bytearray, at: int) -> int:
    """Of a footer or header whose checksum stands ``at``."""
    own = sum(structure[at : at + 4])
    return ~(sum(structure) - own) & 0xFFFFFFFF


def bitmap_size(block_size: int) -> int:
    """Bytes of the sector bitmap in front of a block's data: whole sectors."""
    sectors = block_size // SECTOR
    return -(-sectors // (8 * SECTOR)) * SECTOR
