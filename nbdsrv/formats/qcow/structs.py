"""qcow, version 1, as it lies in the file. No logic.

::

    header | backing file name | L1 table | L2 tables and clusters, as they were allocated

    L1 entry               offset of an L2 table, 0 for none
    L2 entry, standard     63 = 0 | offset of a cluster, 0 for none
    L2 entry, compressed   63 = 1 | bytes, ``cluster_bits`` wide | offset

Everything is big endian. Only QEMU's block/qcow.c defines the format.
"""

from construct import Const, Int8ub, Int16ub, Int32ub, Int64ub, Struct

__all__ = [
    "COMPRESSED",
    "HEADER",
    "MAX_BACKING_NAME",
    "MAX_CLUSTER_BITS",
    "MAX_L2_BITS",
    "MIN_CLUSTER_BITS",
    "MIN_L2_BITS",
    "SECTOR",
    "VERSION",
]

SECTOR = 512
VERSION = 1
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 16
MIN_L2_BITS, MAX_L2_BITS = 6, 13
"""QEMU's bounds: an L2 table is between 512 bytes and 64 KiB, as a cluster is."""
MAX_BACKING_NAME = 1023
COMPRESSED = 1 << 63

HEADER = Struct(
    "magic" / Const(b"QFI\xfb"),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "mtime" / Int32ub,
    "size" / Int64ub,
    "cluster_bits" / Int8ub,
    "l2_bits" / Int8ub,
    "padding" / Int16ub,
    "crypt_method" / Int32ub,
    "l1_table_offset" / Int64ub,
)
