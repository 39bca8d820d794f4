"""MBR and GPT on disk, little-endian (UEFI specification 2.10, chapter 5; the MBR is folklore).

::

    MBR         boot code:440 id:4 0:2 4 x entry:16 0x55 0xaa                  the first 512 bytes
    EBR         the same: one partition, and where the next EBR is
    GPT header  at sector 1 and in the last sector
    GPT entry   128 bytes (or more), where the header says
"""

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

__all__ = ["GPT_MAGIC", "MBR_SIZE", "GptEntry", "GptHeader", "Mbr", "MbrEntry"]

MbrEntry = Struct(
    "status" / Int8ul,
    "first_chs" / Bytes(3),
    "kind" / Int8ul,
    "last_chs" / Bytes(3),
    "start" / Int32ul,  # sectors
    "count" / Int32ul,  # sectors
)

Mbr = Struct(
    "code" / Bytes(440),
    "disk_id" / Int32ul,
    Padding(2),
    "entries" / MbrEntry[4],
    "signature" / Int16ul,
)
MBR_SIZE = Mbr.sizeof()

GPT_MAGIC = b"EFI PART"

GptHeader = Struct(
    "magic" / Const(GPT_MAGIC),
    "revision" / Int32ul,
    "header_size" / Int32ul,
    "crc" / Int32ul,  # of the header, this field being zero
    "reserved" / Int32ul,
    "own" / Int64ul,  # sectors, as all that follow
    "alternate" / Int64ul,
    "first_usable" / Int64ul,
    "last_usable" / Int64ul,
    "disk_guid" / Bytes(16),
    "entries" / Int64ul,
    "count" / Int32ul,
    "entry_size" / Int32ul,  # bytes
    "entries_crc" / Int32ul,
)

GptEntry = Struct(
    "kind" / Bytes(16),
    "guid" / Bytes(16),
    "first" / Int64ul,
    "last" / Int64ul,  # inclusive
    "attributes" / Int64ul,
    "name" / Bytes(72),  # UTF-16
)
