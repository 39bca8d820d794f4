"""Disks as the streams that XAPI exports and imports.

::

    raw     the bytes
    vhd     footer copy, header, BAT, then blocks of 2 MiB that are not all zeroes, in order, footer
    qcow2   version 3, clusters of 64 KiB: header, refcounts, L1, L2, data, in order

With a base only what differs from it is there: a differencing VHD; in qcow2 no backing name, and
what has become zero is stored as data.

Written from the formats' specifications, not with ``nbdsrv.formats``: that is what reads them.
"""

import struct
import time
import uuid

__all__ = ["export_stream", "import_stream"]

BLOCK = 2 << 20
CLUSTER = 64 << 10


def export_stream(data: bytes, kind: str, identity: str, base: tuple[bytes, str] | None) -> bytes:
    """The whole stream.

    Args:
        data: the disk.
        kind: raw, vhd or qcow2.
        identity: its uuid.
        base: the bytes and the uuid of what it is told against.
    """
    if kind == "raw":
        return data
    old = base[0].ljust(len(data), b"\0") if base else None
    if kind == "vhd":
        return _vhd(data, identity, old, base[1] if base else None)
    return _qcow2(data, old)


def _pieces(data: bytes, size: int, old: bytes | None) -> dict[int, bytes]:
    """Those that must be told, whole."""
    found = {}
    for index in range(-(-len(data) // size)):
        piece = data[index * size : (index + 1) * size]
        before = bytes(len(piece)) if old is None else old[index * size : (index + 1) * size]
        if piece != before:
            found[index] = piece.ljust(size, b"\0")
    return found


def _vhd(data: bytes, identity: str, old: bytes | None, parent: str | None) -> bytes:
    blocks = _pieces(data, BLOCK, old)
    count = -(-len(data) // BLOCK)
    table = 512 + 1024
    start = table + -(-count * 4 // 512) * 512
    bat = [0xFFFFFFFF] * (-(-count * 4 // 512) * 128)
    for slot, index in enumerate(blocks):
        bat[index] = (start + slot * (512 + BLOCK)) // 512
    kind = 3 if parent is None else 4
    cylinders = min(len(data) // 512 // (16 * 255), 65535)
    geometry = struct.pack(">HBB", cylinders, 16, 255)
    stamp = int(time.time()) - 946684800
    footer = struct.pack(
        ">8sIIQI4sI4sQQ4sII16sBB426x",
        *(b"conectix", 2, 0x10000, 512, stamp, b"tap\0", 0x10003, b"\0\0\0\0"),
        *(len(data), len(data), geometry, kind, 0, uuid.UUID(identity).bytes, 0, 0),
    )
    footer = _summed(footer, 64)
    named = uuid.UUID(parent).bytes if parent else bytes(16)
    name = f"{parent}.vhd".encode("utf-16-be") if parent else b""
    header = struct.pack(
        ">8sQQIIII16sI4x512s448x",
        *(b"cxsparse", 0xFFFFFFFFFFFFFFFF, table, 0x10000, count, BLOCK, 0, named, stamp, name),
    )
    header = _summed(header, 36)
    body = b"".join(b"\xff" * 512 + block for block in blocks.values())
    return footer + header + struct.pack(f">{len(bat)}I", *bat) + body + footer


def _summed(structure: bytes, at: int) -> bytes:
    return structure[:at] + struct.pack(">I", ~sum(structure) & 0xFFFFFFFF) + structure[at + 4 :]


def _qcow2(data: bytes, old: bytes | None) -> bytes:
    clusters = _pieces(data, CLUSTER, old)
    per_table = CLUSTER // 8
    tables = -(-len(data) // (CLUSTER * per_table))
    # header | refcount table | refcount blocks | L1 | L2 tables | data
    fixed = 2 + 1 + tables
    blocks = 1
    while blocks * (CLUSTER // 2) < fixed + blocks + len(clusters):
        blocks += 1
    level1 = 2 + blocks
    level2 = level1 + 1
    first = level2 + tables
    total = first + len(clusters)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, 16, len(data), 0, tables, level1 * CLUSTER, CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    refcount_table = b"".join(struct.pack(">Q", (2 + n) * CLUSTER) for n in range(blocks))
    refcounts = struct.pack(">H", 1) * total
    copied = 1 << 63
    l1 = b"".join(struct.pack(">Q", (level2 + n) * CLUSTER | copied) for n in range(tables))
    entries = [0] * (tables * per_table)
    for slot, index in enumerate(clusters):
        entries[index] = (first + slot) * CLUSTER | copied
    l2 = struct.pack(f">{len(entries)}Q", *entries)
    parts = (header, refcount_table, refcounts.ljust(blocks * CLUSTER, b"\0"), l1, l2)
    padded = (part.ljust(-(-len(part) // CLUSTER) * CLUSTER, b"\0") for part in parts)
    return b"".join(padded) + b"".join(clusters.values())


def import_stream(stream: bytes, kind: str, size: int) -> bytes:
    """The disk a stream holds.

    Raises:
        ValueError: it is broken, or larger than the disk.
    """
    if kind == "raw":
        if len(stream) > size:
            raise ValueError("larger than the VDI")
        return stream.ljust(size, b"\0")
    if kind != "vhd" or stream[:8] != b"conectix" or stream[-512:-504] != b"conectix":
        raise ValueError("not a VHD stream")
    (current,) = struct.unpack_from(">Q", stream, 48)
    table, _, count = struct.unpack_from(">QII", stream, 512 + 16)
    if current > size:
        raise ValueError("larger than the VDI")
    found = bytearray(-(-size // BLOCK) * BLOCK)
    for index, sector in enumerate(struct.unpack_from(f">{count}I", stream, table)):
        if sector != 0xFFFFFFFF:
            at = sector * 512 + 512
            found[index * BLOCK : (index + 1) * BLOCK] = stream[at : at + BLOCK].ljust(BLOCK, b"\0")
    return bytes(found[:size])
