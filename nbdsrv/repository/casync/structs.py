"""A blob index (.caibx) on disk, little-endian.

::

    size:8 magic:8 flags:8 min:8 avg:8 max:8      IndexHeader
    marker:8 magic:8                              of a table whose length is told at its end
    end:8 id:32                                   for each chunk
    0:8 0:8 48:8 size:8 magic:8                   TableTail: an item that ends at 0 ends the table

``size`` of the tail counts from the table's header. Names are casync's.
"""

from struct import Struct as Packed

from construct import Const, Int64ul, Struct

__all__ = [
    "DIGEST",
    "HEADER",
    "ITEM",
    "SHA512_256",
    "TABLE_AT",
    "TAIL",
    "IndexHead",
    "TableTail",
]

DIGEST = 32
IndexHead = Struct(
    "size" / Const(48, Int64ul),
    "magic" / Const(0x96824D9C7B129FF9, Int64ul),
    "feature_flags" / Int64ul,
    "chunk_size_min" / Int64ul,
    "chunk_size_avg" / Int64ul,
    "chunk_size_max" / Int64ul,
    "table_size" / Const((1 << 64) - 1, Int64ul),
    "table_magic" / Const(0xE75B9E112F17417D, Int64ul),
)
HEADER = IndexHead.sizeof()
ITEM = Packed("<Q32s")
TableTail = Struct(
    "zero" / Const(0, Int64ul),
    "zero2" / Const(0, Int64ul),
    "index_offset" / Const(48, Int64ul),
    "size" / Int64ul,
    "magic" / Const(0x4B4F050E5549ECD1, Int64ul),
)
TAIL = TableTail.sizeof()
TABLE_AT = 48

SHA512_256 = 0x2000_0000_0000_0000
"""Feature flag: ids are SHA-512/256; without it SHA-256."""
