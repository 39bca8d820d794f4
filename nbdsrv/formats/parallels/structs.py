"""Parallels images on disk, little-endian; a sector has 512 bytes.

::

    0      header:64
    64     the table: a u32 for every cluster, 0 = absent
    data   clusters                                        entry counts
           WithoutFreeSpace   old                          sectors
           WithouFreSpacExt   new                          clusters

Facts: "Parallels Expandable Image File Format" in QEMU's documentation.
"""

from construct import Bytes, Int32ul, Int64ul, Struct

__all__ = [
    "EMPTY_FLAG",
    "EXTENSION_MAGIC",
    "HEADER_SIZE",
    "IN_USE",
    "MAGIC",
    "MAGIC_EXT",
    "SECTOR",
    "VERSION",
    "ParallelsHeader",
]

MAGIC = b"WithoutFreeSpace"
MAGIC_EXT = b"WithouFreSpacExt"

ParallelsHeader = Struct(
    "magic" / Bytes(16),
    "version" / Int32ul,
    "heads" / Int32ul,
    "cylinders" / Int32ul,
    "tracks" / Int32ul,  # sectors in a cluster
    "entries" / Int32ul,
    "sectors" / Int64ul,  # the old format uses the lower half only
    "in_use" / Int32ul,
    "data_start" / Int32ul,  # sectors; may be 0 in the old format
    "flags" / Int32ul,
    "extension" / Int64ul,  # sectors; 0 = none
)
HEADER_SIZE = ParallelsHeader.sizeof()

SECTOR = 512
VERSION = 2
IN_USE = 0x746F_6E59
"""Somebody has it open for writing, or did when the power went."""
EMPTY_FLAG = 1
"""Nothing has ever been written."""
EXTENSION_MAGIC = (0xAB23_4CEF_23DC_EA87).to_bytes(8, "little")
