"""What only the writer of a VHD needs to know: the geometry's formula, and tapdisk's batmap.

::

    BAT, whole sectors | batmap header | 1 bit per block, MSB first, whole sectors |
                         512 bytes       1: every sector of the block is in the file
"""

from typing import Any

from construct import Bytes, Const, Int32ub, Int64ub, Struct

from nbdsrv.formats.vhd.structs import SECTOR

__all__ = ["BATMAP_HEADER", "batmap", "batmap_length", "geometry"]

BATMAP_HEADER: Any = Struct(
    "cookie" / Const(b"tdbatmap"),
    "offset" / Int64ub,  # of the bits
    "size" / Int32ub,  # of the bits, sectors
    "version" / Const(0x00010002, Int32ub),
    "checksum" / Int32ub,  # of the bits: the complement of the sum of their bytes
    "reserved" / Bytes(484),
)

MAX_CYLINDERS, MAX_HEADS, MAX_SECTORS_PER_TRACK = 65535, 16, 255


def batmap_length(entries: int) -> int:
    """Bytes that header and bits take together."""
    return SECTOR + -(-entries // (8 * SECTOR)) * SECTOR


def batmap(present: bytes, position: int) -> bytes:
    """Header and bits; ``present`` has a 1 for each block in the file, else a 0.

    ``position``: where in the file the header will be.
    """
    length = batmap_length(len(present)) - SECTOR
    text = present.translate(_DIGITS) + b"0" * (8 * length - len(present))
    bits = int(text, 2).to_bytes(length) if length else b""
    header = {
        "offset": position + SECTOR,
        "size": length // SECTOR,
        "checksum": ~sum(bits) & 0xFFFFFFFF,
        "reserved": bytes(484),
    }
    return bytes(BATMAP_HEADER.build(header)) + bits


_DIGITS = bytes.maketrans(b"\0\1", b"01")


def geometry(sectors: int) -> dict[str, int]:
    """Cylinders, heads and sectors per track, as the specification's appendix computes them.

    Rounded down: never more than the disk has, so that a reader that believes them stays inside.
    """
    sectors = min(sectors, MAX_CYLINDERS * MAX_HEADS * MAX_SECTORS_PER_TRACK)
    if sectors >= MAX_CYLINDERS * MAX_HEADS * 63:
        track, heads = MAX_SECTORS_PER_TRACK, MAX_HEADS
    else:
        track = 17
        heads = max(-(-(sectors // track) // 1024), 4)
        if sectors // track >= heads * 1024 or heads > MAX_HEADS:
            track, heads = 31, MAX_HEADS
        if sectors // track >= heads * 1024:
            track, heads = 63, MAX_HEADS
    return {"cylinders": sectors // track // heads, "heads": heads, "sectors": track}
