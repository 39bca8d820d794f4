"""VMDK on disk: headers, markers, constants. All little-endian, all offsets in sectors of 512.

======== ================ ======================== =====================================
magic    extent           directory, table entries found in
======== ================ ======================== =====================================
KDMV     hosted sparse    32 bits, 512 a table     monolithicSparse, twoGbMaxExtentSparse,
                                                   streamOptimized
COWD     vmfsSparse       32 bits, 4096 a table    snapshots of ESX(i) up to VMFS 5
cafebabe seSparse         64 bits, 4096 a table    snapshots on VMFS 6
======== ================ ======================== =====================================

Facts relied on: VMware, "Virtual Disk Format 5.0"; for seSparse, which VMware has not published,
what the QEMU project has written down of it.
"""

from typing import Any, Final

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

__all__ = [
    "COMPRESSION_DEFLATE",
    "COMPRESSION_NONE",
    "COWD_HEADER",
    "COWD_MAGIC",
    "COWD_TABLE_ENTRIES",
    "FLAG_COMPRESSED",
    "FLAG_MARKERS",
    "FLAG_NEWLINE_TEST",
    "FLAG_REDUNDANT_TABLES",
    "FLAG_ZERO_GRAINS",
    "FOOTER_LENGTH",
    "GD_AT_END",
    "GRAIN_MARKER",
    "MARKER",
    "MARKER_EOS",
    "MARKER_FOOTER",
    "MARKER_GD",
    "MARKER_GT",
    "NO_PARENT",
    "SECTOR",
    "SESPARSE_HEADER",
    "SESPARSE_MAGIC",
    "SESPARSE_VERSION",
    "SESPARSE_VOLATILE_HEADER",
    "SESPARSE_VOLATILE_MAGIC",
    "SPARSE_HEADER",
    "SPARSE_MAGIC",
    "SPARSE_TABLE_ENTRIES",
    "ZERO_GRAIN",
]

SECTOR = 512
NO_PARENT = 0xFFFFFFFF
"""``parentCID`` of a disk without parent."""

# --- hosted sparse extents -------------------------------------------------------------------

SPARSE_MAGIC = b"KDMV"
SPARSE_TABLE_ENTRIES = 512
FLAG_NEWLINE_TEST: Final = 1 << 0
FLAG_REDUNDANT_TABLES: Final = 1 << 1
FLAG_ZERO_GRAINS: Final = 1 << 2
"""A table entry of ``ZERO_GRAIN`` is a grain of zeroes."""
FLAG_COMPRESSED: Final = 1 << 16
FLAG_MARKERS: Final = 1 << 17
ZERO_GRAIN = 1
GD_AT_END = 0xFFFFFFFFFFFFFFFF
"""``gd_offset`` of a stream: the header that counts is the footer."""
COMPRESSION_NONE: Final = 0
COMPRESSION_DEFLATE: Final = 1

SPARSE_HEADER: Any = Struct(
    "magic" / Const(SPARSE_MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int64ul,
    "grain_size" / Int64ul,
    "descriptor_offset" / Int64ul,
    "descriptor_size" / Int64ul,
    "entries_per_table" / Int32ul,
    "redundant_gd_offset" / Int64ul,
    "gd_offset" / Int64ul,
    "overhead" / Int64ul,
    "unclean_shutdown" / Int8ul,
    "newlines" / Bytes(4),  # \n, blank, \r, \n: shows a transfer in text mode
    "compression" / Int16ul,
    Padding(433),
)

MARKER_EOS: Final = 0
MARKER_GT: Final = 1
MARKER_GD: Final = 2
MARKER_FOOTER: Final = 3

MARKER: Any = Struct(
    "sectors" / Int64ul,  # of what follows this sector
    "size" / Const(0, Int32ul),
    "kind" / Int32ul,
    Padding(496),
)
GRAIN_MARKER: Any = Struct("first_sector" / Int64ul, "size" / Int32ul)
"""In front of a compressed grain: where on the disk it belongs, bytes that follow at once."""

FOOTER_LENGTH = 3 * SECTOR
"""At a stream's end: a MARKER_FOOTER, the footer (a SPARSE_HEADER), a MARKER_EOS."""

# --- vmfsSparse extents ----------------------------------------------------------------------

COWD_MAGIC = b"COWD"
COWD_TABLE_ENTRIES = 4096

COWD_HEADER: Any = Struct(
    "magic" / Const(COWD_MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int32ul,
    "grain_size" / Int32ul,
    "gd_offset" / Int32ul,
    "gd_entries" / Int32ul,
    "free_sector" / Int32ul,
    Padding(2016),
)

# --- seSparse extents ------------------------------------------------------------------------

SESPARSE_MAGIC = bytes.fromhex("bebafeca00000000")
SESPARSE_VERSION = 0x0000000200000001
SESPARSE_VOLATILE_MAGIC = bytes.fromhex("fecafeca00000000")

SESPARSE_HEADER: Any = Struct(
    "magic" / Const(SESPARSE_MAGIC),
    "version" / Int64ul,
    "capacity" / Int64ul,
    "grain_size" / Int64ul,
    "table_size" / Int64ul,  # sectors a table takes
    "flags" / Int64ul,
    Padding(32),
    "volatile_header_offset" / Int64ul,
    "volatile_header_size" / Int64ul,
    "journal_header_offset" / Int64ul,
    "journal_header_size" / Int64ul,
    "journal_offset" / Int64ul,
    "journal_size" / Int64ul,
    "gd_offset" / Int64ul,
    "gd_size" / Int64ul,
    "tables_offset" / Int64ul,
    "tables_size" / Int64ul,
    "free_bitmap_offset" / Int64ul,
    "free_bitmap_size" / Int64ul,
    "backmap_offset" / Int64ul,
    "backmap_size" / Int64ul,
    "grains_offset" / Int64ul,
    "grains_size" / Int64ul,
    Padding(304),
)
SESPARSE_VOLATILE_HEADER: Any = Struct(
    "magic" / Const(SESPARSE_VOLATILE_MAGIC),
    "free_table_number" / Int64ul,
    "next_transaction" / Int64ul,
    "replay_journal" / Int64ul,
    Padding(480),
)
