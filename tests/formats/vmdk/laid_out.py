"""VMDKs that qemu-img reads but cannot make, laid out here byte by byte.

::

    grains   {number: "data" bytes | ZERO}        the rest is not stored
       |
    hosted()  stream()  vmfs_sparse()  se_sparse()    a file with header, directory, tables, grains

Grains are stored in descending order with gaps between, so that nobody gets by on luck.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from nbdsrv.formats.vmdk.descriptor import Descriptor, ExtentLine, render
from nbdsrv.formats.vmdk.structs import (
    COMPRESSION_DEFLATE,
    COWD_HEADER,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINE_TEST,
    FLAG_ZERO_GRAINS,
    GD_AT_END,
    GRAIN_MARKER,
    MARKER,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    SESPARSE_HEADER,
    SESPARSE_VERSION,
    SESPARSE_VOLATILE_HEADER,
    SPARSE_HEADER,
)

__all__ = ["ZERO", "described", "hosted", "se_sparse", "stream", "vmfs_sparse", "with_grains"]

ZERO = b""
"""A grain of zeroes, said so in the table."""
SECTOR = 512
Grains = Mapping[int, bytes]


def described(path: Path, create_type: str, *extents: ExtentLine, **more: object) -> Path:
    """A descriptor of its own."""
    path.write_text(render(Descriptor(create_type, extents, **more)))  # type: ignore[arg-type]
    return path


def with_grains(size: int, grain: int, grains: Grains, below: bytes = b"") -> bytes:
    """What an extent with such grains reads as."""
    content = bytearray(below[:size].ljust(size, b"\0"))
    for number, data in grains.items():
        piece = data.ljust(grain, b"\0")
        content[number * grain : number * grain + grain] = piece
    return bytes(content[:size])


def hosted(
    path: Path,
    size: int,
    grains: Grains,
    *,
    grain: int = 65536,
    descriptor: bytes = b"",
    **raw: int,
) -> Path:
    """KDMV; ``raw`` overrides header fields."""
    tables = -(-size // (grain * 512))
    gd, first_table = 32, 64
    end = first_table + tables * 4
    fields = _hosted_fields(size, grain) | {
        "descriptor_offset": 1 if descriptor else 0,
        "descriptor_size": 20 if descriptor else 0,
        "gd_offset": gd,
        "overhead": end,
        **raw,
    }
    entries, data = _store(grains, grain, end)
    with open(path, "wb") as file:
        file.write(SPARSE_HEADER.build(fields))
        file.write(descriptor)
        _write_tables(file, entries, tables, 512, 4, gd, first_table)
        _write_grains(file, data)
    return path


def _hosted_fields(size: int, grain: int) -> dict[str, object]:
    return {
        "version": 2,
        "flags": FLAG_NEWLINE_TEST | FLAG_ZERO_GRAINS,
        "capacity": size // SECTOR,
        "grain_size": grain // SECTOR,
        "descriptor_offset": 1,
        "descriptor_size": 20,
        "entries_per_table": 512,
        "redundant_gd_offset": 0,
        "gd_offset": 0,
        "overhead": 128,
        "unclean_shutdown": 0,
        "newlines": b"\n \r\n",
        "compression": 0,
    }


def stream(
    path: Path, size: int, grains: Grains, *, grain: int = 65536, markers: bool = True
) -> Path:
    """KDMV as VMware streams it: tables behind their grains, the directory and a footer at the end.

    The last grain is as short as the disk; qemu-img writes neither it nor the footer like this.
    """
    text = Descriptor("streamOptimized", (ExtentLine(size // SECTOR, "SPARSE", path.name),))
    fields = _hosted_fields(size, grain) | {
        "version": 3,
        "flags": FLAG_NEWLINE_TEST
        | FLAG_ZERO_GRAINS
        | FLAG_COMPRESSED
        | (FLAG_MARKERS if markers else 0),
        "gd_offset": GD_AT_END,
        "compression": COMPRESSION_DEFLATE,
    }
    data = bytearray(SPARSE_HEADER.build(fields) + render(text).encode().ljust(127 * SECTOR, b"\0"))
    directory = []
    for first in range(0, -(-size // grain), 512):
        table = [
            _append_grain(data, n, grains.get(n), grain, size, markers)
            for n in range(first, first + 512)
        ]
        if any(table):
            _append_marker(data, MARKER_GT, 4)
            directory.append(len(data) // SECTOR)
            data += b"".join(entry.to_bytes(4, "little") for entry in table)
        else:
            directory.append(0)
    _append_marker(data, MARKER_GD, 1)
    fields["gd_offset"] = len(data) // SECTOR
    data += b"".join(entry.to_bytes(4, "little") for entry in directory)
    data += bytes(-len(data) % SECTOR)
    _append_marker(data, MARKER_FOOTER, 1)
    data += SPARSE_HEADER.build(fields)
    _append_marker(data, MARKER_EOS, 0)
    path.write_bytes(data)
    return path


def _append_grain(
    data: bytearray, number: int, piece: bytes | None, grain: int, size: int, markers: bool
) -> int:
    """The table's entry."""
    if piece is None:
        return 0
    if piece == ZERO:
        return 1
    entry = len(data) // SECTOR
    packed = zlib.compress(piece[: size - number * grain])
    if markers:
        data += GRAIN_MARKER.build({"first_sector": number * grain // SECTOR, "size": len(packed)})
    data += packed
    data += bytes(-len(data) % SECTOR)
    return entry


def _append_marker(data: bytearray, kind: int, sectors: int) -> None:
    data += MARKER.build({"sectors": sectors, "kind": kind})


def vmfs_sparse(path: Path, size: int, grains: Grains, *, grain: int = 512, **raw: int) -> Path:
    """COWD; ``raw`` overrides header fields."""
    tables = -(-size // (grain * 4096))
    gd, first_table = 4, 8
    end = first_table + tables * 32
    entries, data = _store(grains, grain, end)
    fields = {
        "version": 1,
        "flags": 3,
        "capacity": size // SECTOR,
        "grain_size": grain // SECTOR,
        "gd_offset": gd,
        "gd_entries": tables,
        "free_sector": end,
        **raw,
    }
    with open(path, "wb") as file:
        file.write(COWD_HEADER.build(fields))
        _write_tables(file, entries, tables, 4096, 4, gd, first_table)
        _write_grains(file, data)
    return path


def se_sparse(path: Path, size: int, grains: Grains, **raw: int) -> Path:
    """SESPARSE; ``raw`` overrides header fields, ``replay_journal`` among them."""
    grain = 4096
    tables = -(-size // (grain * 4096))
    gd, tables_at = 16, raw.get("tables_offset", 32)
    grains_at = tables_at + tables * 64
    places, data = _store(grains, grain, 0)
    entries = {}
    for number, sector in places.items():
        index = sector // 8
        entries[number] = 2 << 60 if sector == 1 else 3 << 60 | (index & 0xFFF) << 48 | index >> 12
    fields = dict.fromkeys(
        (sub.name for sub in SESPARSE_HEADER.subcons if sub.name not in {None, "magic"}), 0
    ) | {
        "version": SESPARSE_VERSION,
        "capacity": size // SECTOR,
        "grain_size": 8,
        "table_size": 64,
        "volatile_header_offset": 1,
        "volatile_header_size": 1,
        "journal_header_offset": 2,
        "journal_header_size": 2,
        "journal_offset": 2048,
        "journal_size": 2048,
        "gd_offset": gd,
        "gd_size": 16,
        "tables_offset": tables_at,
        "tables_size": tables * 64,
        "free_bitmap_offset": 8,
        "free_bitmap_size": 1,
        "backmap_offset": 9,
        "backmap_size": 1,
        "grains_offset": grains_at,
        "grains_size": size // SECTOR,
        **raw,
    }
    fields.pop("replay_journal", None)
    volatile = {
        "free_table_number": tables,
        "next_transaction": 0,
        "replay_journal": raw.get("replay_journal", 0),
    }
    with open(path, "wb") as file:
        file.write(SESPARSE_HEADER.build(fields))
        file.write(SESPARSE_VOLATILE_HEADER.build(volatile))
        for table in range(tables):
            if any(number // 4096 == table for number in entries):
                file.seek(gd * SECTOR + table * 8)
                file.write((1 << 60 | table).to_bytes(8, "little"))
        for number, entry in entries.items():
            file.seek(tables_at * SECTOR + number * 8)
            file.write(entry.to_bytes(8, "little"))
        file.truncate(grains_at * SECTOR)
        _write_grains(file, {sector + grains_at: piece for sector, piece in data.items()})
    return path


def _store(grains: Grains, grain: int, end: int) -> tuple[dict[int, int], dict[int, bytes]]:
    """Table entries by grain number, and pieces by sector."""
    entries: dict[int, int] = {}
    data: dict[int, bytes] = {}
    step = max(grain // SECTOR, 1)
    at = -(-end // step) * step + step
    for number in sorted(grains, reverse=True):
        if grains[number] == ZERO:
            entries[number] = 1
            continue
        entries[number] = at
        data[at] = grains[number].ljust(grain, b"\0")
        at += step * (2 if number % 3 == 0 else 1)
    return entries, data


def _write_tables(
    file: BinaryIO,
    entries: Mapping[int, int],
    tables: int,
    per_table: int,
    size: int,
    gd: int,
    at: int,
) -> None:
    for table in range(tables):
        if not any(number // per_table == table for number in entries):
            continue
        first = at + table * per_table * size // SECTOR
        file.seek(gd * SECTOR + table * size)
        file.write(first.to_bytes(size, "little"))
    for number, entry in entries.items():
        file.seek(at * SECTOR + number * size)
        file.write(entry.to_bytes(size, "little"))
    file.truncate(at * SECTOR + tables * per_table * size)


def _write_grains(file: BinaryIO, data: Mapping[int, bytes]) -> None:
    for sector, piece in data.items():
        file.seek(sector * SECTOR)
        file.write(piece)
