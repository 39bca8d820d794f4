"""What a VHDX file is made of (MS-VHDX, "Virtual Hard Disk v2 File Format").

::

    0         64K        128K       192K        256K       1M
    | file id | header 1 | header 2 | regions 1 | regions 2 | log, metadata, BAT, blocks ...

    metadata region   | table 64 KiB | items ... |
    BAT               | payload x chunk ratio | bitmap | payload x chunk ratio | bitmap | ...
    log               | header, descriptors | data sectors | header ... |      4 KiB sectors, a ring

All integers are little-endian, everything beyond the first MiB lies on multiples of 1 MiB.
"""

from enum import IntEnum
from typing import Any
from uuid import UUID

from construct import Bytes, Int16ul, Int32ul, Int64ul, Struct

__all__ = [
    "BAT_REGION",
    "BITMAP_BITS",
    "BITMAP_PRESENT",
    "BITMAP_SIZE",
    "CHECKSUM",
    "DATA_DESCRIPTOR",
    "DATA_SECTOR",
    "DESCRIPTOR_SIZE",
    "ENTRY_HEADER_SIZE",
    "FILE_IDENTIFIER",
    "FILE_PARAMETERS",
    "HAS_PARENT",
    "HEADER",
    "HEADERS",
    "HEADER_SECTION",
    "HEADER_SIZE",
    "LEAVE_ALLOCATED",
    "LOCATOR",
    "LOCATOR_ENTRY",
    "LOCATOR_ENTRY_SIZE",
    "LOCATOR_SIZE",
    "LOGICAL_SECTOR_SIZE",
    "LOG_ENTRY",
    "LOG_SECTOR",
    "MAX_BLOCK",
    "MAX_DISK",
    "MAX_ITEM",
    "MAX_TABLE_ENTRIES",
    "METADATA_ENTRY",
    "METADATA_REGION",
    "METADATA_TABLE",
    "METADATA_TABLE_SIZE",
    "MIB",
    "PARENT_LOCATOR",
    "PHYSICAL_SECTOR_SIZE",
    "REGION_ENTRY",
    "REGION_TABLE",
    "REGION_TABLES",
    "REGION_TABLE_SIZE",
    "TABLE_ENTRY_SIZE",
    "VHDX_LOCATOR",
    "VIRTUAL_DISK_ID",
    "VIRTUAL_DISK_SIZE",
    "ZERO_DESCRIPTOR",
    "BlockState",
]

MIB = 1 << 20
HEADER_SECTION = MIB
"""Nothing else lies in the first MiB."""
CHECKSUM = 4
"""Where in headers, region tables and log entries the CRC-32C stands, itself taken as zero."""

# --- headers -------------------------------------------------------------------------------------

FILE_IDENTIFIER: Any = Struct("signature" / Bytes(8), "creator" / Bytes(512))

HEADERS = (64 << 10, 128 << 10)
HEADER_SIZE = 4096
HEADER: Any = Struct(
    "signature" / Bytes(4),  # head
    "checksum" / Int32ul,
    "sequence_number" / Int64ul,
    "file_write_guid" / Bytes(16),
    "data_write_guid" / Bytes(16),
    "log_guid" / Bytes(16),
    "log_version" / Int16ul,
    "version" / Int16ul,
    "log_length" / Int32ul,
    "log_offset" / Int64ul,
)

# --- regions -------------------------------------------------------------------------------------

REGION_TABLES = (192 << 10, 256 << 10)
REGION_TABLE_SIZE = 64 << 10
REGION_TABLE: Any = Struct(
    "signature" / Bytes(4),  # regi
    "checksum" / Int32ul,
    "entry_count" / Int32ul,
    "reserved" / Int32ul,
)
REGION_ENTRY: Any = Struct(
    "guid" / Bytes(16),
    "file_offset" / Int64ul,
    "length" / Int32ul,
    "required" / Int32ul,
)
TABLE_ENTRY_SIZE = 32
"""Bytes of an entry in the region table and in the metadata table."""
MAX_TABLE_ENTRIES = 2047
"""Entries in either: what 64 KiB hold."""

BAT_REGION = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

# --- metadata ------------------------------------------------------------------------------------

METADATA_TABLE_SIZE = 64 << 10
METADATA_TABLE: Any = Struct(
    "signature" / Bytes(8),  # metadata
    "reserved" / Int16ul,
    "entry_count" / Int16ul,
    "reserved2" / Bytes(20),
)
METADATA_ENTRY: Any = Struct(
    "item_id" / Bytes(16),
    "offset" / Int32ul,  # from the beginning of the region
    "length" / Int32ul,
    "flags" / Int32ul,  # 1 user, 2 virtual disk, 4 required
    "reserved" / Int32ul,
)
MAX_ITEM = MIB
"""Bytes of a metadata item at most."""

FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

LEAVE_ALLOCATED = 1
HAS_PARENT = 2
"""Flags of the file parameters."""
MAX_BLOCK = 256 * MIB
MAX_DISK = 64 << 40

VHDX_LOCATOR = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
LOCATOR_SIZE = 20
LOCATOR: Any = Struct("locator_type" / Bytes(16), "reserved" / Int16ul, "key_value_count" / Int16ul)
LOCATOR_ENTRY_SIZE = 12
LOCATOR_ENTRY: Any = Struct(
    "key_offset" / Int32ul,  # from the beginning of the item
    "value_offset" / Int32ul,
    "key_length" / Int16ul,  # bytes of UTF-16LE
    "value_length" / Int16ul,
)

# --- BAT -----------------------------------------------------------------------------------------


class BlockState(IntEnum):
    """The low three bits of a BAT entry of a payload block; the high 44 are its MiB in the file."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


BITMAP_PRESENT = 6
"""The state of a sector bitmap block that is there."""
BITMAP_SIZE = MIB
BITMAP_BITS = 1 << 23
"""Sectors a bitmap block speaks of, least significant bit first: a *chunk* of the disk."""

# --- log -----------------------------------------------------------------------------------------

LOG_SECTOR = 4096
ENTRY_HEADER_SIZE = 64
LOG_ENTRY: Any = Struct(
    "signature" / Bytes(4),  # loge
    "checksum" / Int32ul,  # over the whole entry
    "entry_length" / Int32ul,
    "tail" / Int32ul,  # where in the log the first entry still needed is
    "sequence_number" / Int64ul,
    "descriptor_count" / Int32ul,
    "reserved" / Int32ul,
    "log_guid" / Bytes(16),
    "flushed_file_offset" / Int64ul,
    "last_file_offset" / Int64ul,
)
DESCRIPTOR_SIZE = 32
ZERO_DESCRIPTOR: Any = Struct(
    "signature" / Bytes(4),  # zero
    "reserved" / Int32ul,
    "zero_length" / Int64ul,
    "file_offset" / Int64ul,
    "sequence_number" / Int64ul,
)
DATA_DESCRIPTOR: Any = Struct(
    "signature" / Bytes(4),  # desc
    "trailing_bytes" / Bytes(4),
    "leading_bytes" / Bytes(8),
    "file_offset" / Int64ul,
    "sequence_number" / Int64ul,
)
DATA_SECTOR: Any = Struct(
    "signature" / Bytes(4),  # data
    "sequence_high" / Int32ul,
    "data" / Bytes(4084),  # without the first 8 and the last 4 bytes: those are in the descriptor
    "sequence_low" / Int32ul,
)
