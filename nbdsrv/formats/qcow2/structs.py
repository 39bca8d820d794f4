"""qcow2 as it lies in the file: structures, constants, flags. No logic.

::

    cluster 0    header | additional fields | extensions ... | backing file name
    elsewhere    refcount table -> refcount blocks -> one count per cluster
                 L1 table -> L2 tables -> one entry per guest cluster
                 snapshot table   bitmap directory -> bitmap tables -> bitmap data

    L2 entry, standard     63 COPIED | 62 = 0 | ... | 55..9 host offset | ... | 0 ZERO
    L2 entry, compressed   63 = 0    | 62 = 1 | sectors beyond the first | x-1..0 host offset
    second word, extended  63..32 subcluster reads as zeroes | 31..0 subcluster is allocated

Everything is big endian. Source: QEMU's docs/interop/qcow2.txt, whose names the fields keep.
"""

from enum import IntEnum, IntFlag

from construct import (
    Bytes,
    Const,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Struct,
)

__all__ = [
    "BITMAPS_EXTENSION",
    "BITMAP_ENTRY",
    "COMPRESSED",
    "COPIED",
    "DEFAULT_REFCOUNT_ORDER",
    "DIRTY_TRACKING",
    "EXTENSION",
    "FEATURE_NAME",
    "HEADER",
    "HEADER_FIELDS",
    "L1_RESERVED",
    "L2_RESERVED",
    "MAGIC",
    "MAX_BACKING_NAME",
    "MAX_BITMAPS",
    "MAX_BITMAP_NAME",
    "MAX_CLUSTER_BITS",
    "MAX_GRANULARITY_BITS",
    "MAX_L1_BYTES",
    "MAX_REFCOUNT_ORDER",
    "MAX_REFCOUNT_TABLE_BYTES",
    "MAX_SNAPSHOTS",
    "MAX_SNAPSHOT_EXTRA",
    "MIN_CLUSTER_BITS",
    "MIN_EXTENDED_CLUSTER_BITS",
    "MIN_GRANULARITY_BITS",
    "OFFSET_MASK",
    "SECTOR",
    "SNAPSHOT",
    "SNAPSHOT_EXTRA",
    "SUBCLUSTERS",
    "V2_LENGTH",
    "V3_LENGTH",
    "ZERO_FLAG",
    "Autoclear",
    "BitmapFlag",
    "Compatible",
    "Compression",
    "Crypt",
    "ExtensionType",
    "Incompatible",
]

MAGIC = b"QFI\xfb"
SECTOR = 512

# --- bounds: QEMU's own, so that whatever QEMU can open we can ---------------------------------

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_CLUSTER_BITS = 14
"""A subcluster, a 32nd of a cluster, is at least a sector."""
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_EXTRA = 1024
MAX_BACKING_NAME = 1023
MAX_BITMAPS = 65535
MAX_BITMAP_NAME = 1023
MAX_REFCOUNT_ORDER = 6
DEFAULT_REFCOUNT_ORDER = 4
"""What version 2 always has: counts of 16 bits."""

# --- the header --------------------------------------------------------------------------------

V2_LENGTH = 72
V3_LENGTH = 104
"""The least a version 3 header can be; ``compression_type`` makes it 112 with its padding."""

HEADER = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
"""All of version 2's header, the first 72 bytes of version 3's."""

HEADER_FIELDS = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
"""Bytes 72 to 103 of version 3. Byte 104, where the header is that long: compression type."""

EXTENSION = Struct("type" / Int32ub, "length" / Int32ub)
"""Followed by ``length`` bytes, padded to a multiple of 8."""

FEATURE_NAME = Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))
"""One entry of the feature name table; type 0 incompatible, 1 compatible, 2 autoclear."""


class Incompatible(IntFlag):
    """Features that must be understood to read the image."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Features that whoever writes without knowing them must clear."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


class Crypt(IntEnum):
    """``crypt_method``."""

    NONE = 0
    AES = 1
    LUKS = 2


class Compression(IntEnum):
    """``compression_type``: zlib means raw deflate."""

    ZLIB = 0
    ZSTD = 1


class ExtensionType(IntEnum):
    """Header extensions; others are ignored."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPT_HEADER = 0x0537BE77
    DATA_FILE = 0x44415441


# --- L1 and L2 entries -------------------------------------------------------------------------

COPIED = 1 << 63
"""The refcount is exactly one; accurate in the active tables only."""
COMPRESSED = 1 << 62
ZERO_FLAG = 1 << 0
"""Reads as zeroes, whatever the offset; version 3 without extended entries."""
OFFSET_MASK = (1 << 56) - (1 << 9)
L1_RESERVED = (0x7F << 56) | 0x1FF
L2_RESERVED = (0x3F << 56) | 0x1FE
SUBCLUSTERS = 32

# --- snapshots ---------------------------------------------------------------------------------

SNAPSHOT = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_str_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)
"""Followed by extra data, id and name, padded to a multiple of 8."""

SNAPSHOT_EXTRA = Struct("vm_state_size_large" / Int64ub, "disk_size" / Int64ub)

# --- bitmaps -----------------------------------------------------------------------------------

BITMAPS_EXTENSION = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)

BITMAP_ENTRY = Struct(
    "bitmap_table_offset" / Int64ub,
    "bitmap_table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
"""Followed by extra data and the name, padded to a multiple of 8."""

DIRTY_TRACKING = 1
"""The only ``type`` of bitmap there is."""
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
"""QEMU's range, though the format allows any."""


class BitmapFlag(IntFlag):
    """``flags`` of a bitmap's directory entry."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2
