"""VDI on disk, little-endian.

::

    0      text:64 magic:4 version:4                 "<<< ... Disk Image >>>"
    72     header of version 1.1, 384 or 400 bytes
    offBlocks    the table: a u32 for every block: its place among the stored ones
    offData      stored blocks, each ``block_extra`` bytes and then ``block_size`` of the disk

Names are those of VirtualBox without their type prefixes.
"""

from construct import Bytes, Const, Int32ul, Int64ul, Struct

__all__ = ["ABSENT", "DIFFERENCING", "DISCARDED", "HEADER_SIZE", "TYPES", "VERSION", "VdiHeader"]

VdiHeader = Struct(
    "text" / Bytes(64),
    "magic" / Const(0xBEDA107F, Int32ul),
    "version" / Int32ul,
    "header_size" / Int32ul,  # counted from here
    "type" / Int32ul,
    "flags" / Int32ul,
    "comment" / Bytes(256),
    "blocks_offset" / Int32ul,
    "data_offset" / Int32ul,
    "cylinders" / Int32ul,
    "heads" / Int32ul,
    "sectors" / Int32ul,
    "sector_size" / Int32ul,
    "unused" / Int32ul,
    "disk_size" / Int64ul,
    "block_size" / Int32ul,
    "block_extra" / Int32ul,
    "block_count" / Int32ul,
    "blocks_allocated" / Int32ul,
    "uuid_create" / Bytes(16),
    "uuid_modify" / Bytes(16),
    "uuid_linkage" / Bytes(16),
    "uuid_parent_modify" / Bytes(16),
)
HEADER_SIZE = VdiHeader.sizeof()
HEADER_SIZE_AT = 72
"""From where ``header_size`` counts."""

VERSION = 0x0001_0001
TYPES = {1: "dynamic", 2: "fixed", 4: "differencing"}
DIFFERENCING = 4

ABSENT = 0xFFFF_FFFF
"""Table entry: never written; the parent's, if there is one."""
DISCARDED = 0xFFFF_FFFE
"""Table entry: zeroes, whatever the parent has."""
