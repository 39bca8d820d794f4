"""VMDKs of the streamOptimized kind being written: what an OVA carries and ovftool takes.

::

    | header | descriptor | .. | grain | grain | .. | GT | grain | .. | GT | GD | footer | EOS |
      GD_AT_END, 64 KiB in all   |                    |                 |    |
                         marker {sector, size},     marker of a sector of its own in front
                         deflated, whole sectors

A grain is 64 KiB of the disk, a grain table (GT) has 512 of them and follows the last it names, the
grain directory (GD) names the tables. Nothing is written behind: a pipe will do.
"""

import asyncio
import os
import secrets
import struct
import sys
import zlib
from array import array
from collections.abc import Callable

from isal import isal_zlib

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.vmdk.descriptor import Descriptor, ExtentLine, render
from nbdsrv.formats.vmdk.structs import (
    COMPRESSION_DEFLATE,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINE_TEST,
    GD_AT_END,
    MARKER,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    SECTOR,
    SPARSE_HEADER,
    SPARSE_TABLE_ENTRIES,
)
from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["DEFAULT_LEVEL", "GRAIN", "MAX_LEVEL", "MAX_SIZE", "VmdkWriter"]

GRAIN = 1 << 16
"""Bytes of the disk that are compressed together; VMware's own size."""
_TABLE_SPAN = GRAIN * SPARSE_TABLE_ENTRIES
_OVERHEAD = 128
"""Sectors before the first grain, VMware's own number."""
_DESCRIPTOR_AT, _DESCRIPTOR_SECTORS = 1, 20
_VERSION = 3
MAX_SIZE = 2 << 40
"""Bytes. The tables hold 32-bit sector numbers, so that the file ends at 2 TiB; incompressible
data of that size does not fit, which is found out when it happens."""
_MAX_SECTOR = 0xFFFFFFFF
JOB = 4 * GRAIN
"""Bytes compressed by one thread at a time: a piece of 2 MiB keeps eight of them busy."""
DEFAULT_LEVEL, MAX_LEVEL = 2, 9
"""Up to 3 is Intel's library, several times as fast as zlib for some per cent more bytes."""
_ISAL_LEVELS = 3


class VmdkWriter(ImageWriter):
    """A streamOptimized VMDK; its size is rounded up to whole sectors."""

    granularity = GRAIN

    def __init__(self, workers: Workers, target: TargetFile, *, level: int = DEFAULT_LEVEL) -> None:
        """Becomes the owner of ``target``, which is not open yet; ``level`` is 1 to 9."""
        self._workers = workers
        self._target = target
        self._compress = _compressor(level)
        self._capacity = 0
        self._directory = array("I")
        self._table = array("I", bytes(4 * SPARSE_TABLE_ENTRIES))
        self._table_number = -1
        self.seekable = target.seekable

    async def open(self, size: int) -> None:
        """The format has an end, and a beginning."""
        if size > MAX_SIZE:
            raise UnsupportedImage(
                f"{self._target.path}: a streamOptimized VMDK has at most 2 TiB, this disk has"
                f" {size / (1 << 30):.0f} GiB; write another format, for instance qcow2"
            )
        if not size:
            raise UnsupportedImage(f"{self._target.path}: a VMDK has at least one sector, not none")
        await self._workers.run(self._target.open)

    async def begin(self, plan: Plan) -> None:
        """Header and descriptor, which need to know nothing but the size."""
        self._capacity = -(-plan.size // SECTOR)
        self._directory = array("I", bytes(4 * -(-plan.size // _TABLE_SPAN)))
        await self._workers.run(self._write_head)

    def _write_head(self) -> None:
        name = os.path.basename(self._target.path) if self.seekable else "disk.vmdk"
        text = _descriptor(self._capacity, name)
        head = self._header(GD_AT_END) + text.ljust(_DESCRIPTOR_SECTORS * SECTOR, b"\0")
        self._target.append(head.ljust(_OVERHEAD * SECTOR, b"\0"))

    async def data(self, offset: int, data: memoryview) -> None:
        """Compressed in several threads, then appended; grains of zeroes are left out."""
        jobs = [
            self._workers.run(self._deflate, offset + start, data[start : start + JOB])
            for start in range(0, len(data), JOB)
        ]
        # All of them, whatever becomes of one: the caller's buffer is being read.
        results = await asyncio.gather(*jobs, return_exceptions=True)
        grains: list[tuple[int, bytes]] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            grains += result
        await self._workers.run(self._append, grains)

    def _deflate(self, offset: int, data: memoryview) -> list[tuple[int, bytes]]:
        """(grain's number, what is to be written) for each grain that is not zeroes."""
        grains = []
        for start in range(0, len(data), GRAIN):
            grain = bytes(data[start : start + GRAIN]).ljust(GRAIN, b"\0")
            if grain == _ZEROES:
                continue
            packed = self._compress(grain)
            marker = _pack_marker((offset + start) // SECTOR, len(packed))
            grains.append(((offset + start) // GRAIN, _padded(marker + packed)))
        return grains

    def _append(self, grains: list[tuple[int, bytes]]) -> None:
        pending: list[bytes] = []
        position = self._target.position
        for number, packed in grains:
            table, entry = divmod(number, SPARSE_TABLE_ENTRIES)
            if table != self._table_number:
                self._target.append(*pending)
                pending = []
                self._end_table()
                self._table_number = table
                position = self._target.position
            self._table[entry] = self._sector(position)
            pending.append(packed)
            position += len(packed)
        self._target.append(*pending)

    def _end_table(self) -> None:
        """The table of the grains written lately."""
        if self._table_number < 0:
            return
        table = _little(self._table)
        self._target.append(_marker(MARKER_GT, len(table)))
        self._directory[self._table_number] = self._sector(self._target.position)
        self._target.append(table)
        self._table = array("I", bytes(4 * SPARSE_TABLE_ENTRIES))

    def _sector(self, position: int) -> int:
        sector = position // SECTOR
        if sector > _MAX_SECTOR:
            raise UnsupportedImage(
                f"{self._target.path}: more than 2 TiB of data do not fit into a VMDK;"
                " write another format, for instance qcow2"
            )
        return sector

    async def zero(self, offset: int, length: int) -> None:
        """A grain that is left out is zeroes."""

    async def finish(self) -> None:
        """The last table, the directory, the footer."""
        await self._workers.run(self._finish)

    def _finish(self) -> None:
        self._end_table()
        directory = _padded(_little(self._directory))
        self._target.append(_marker(MARKER_GD, len(directory)))
        footer = self._header(self._sector(self._target.position))
        self._target.append(directory, _marker(MARKER_FOOTER, len(footer)), footer)
        self._target.append(_marker(MARKER_EOS, 0))
        self._target.publish()

    async def abort(self) -> None:
        """Remove it."""
        await self._workers.run(self._target.discard)

    def _header(self, directory: int) -> bytes:
        return bytes(
            SPARSE_HEADER.build(
                {
                    "version": _VERSION,
                    "flags": FLAG_NEWLINE_TEST | FLAG_COMPRESSED | FLAG_MARKERS,
                    "capacity": self._capacity,
                    "grain_size": GRAIN // SECTOR,
                    "descriptor_offset": _DESCRIPTOR_AT,
                    "descriptor_size": _DESCRIPTOR_SECTORS,
                    "entries_per_table": SPARSE_TABLE_ENTRIES,
                    "redundant_gd_offset": 0,
                    "gd_offset": directory,
                    "overhead": _OVERHEAD,
                    "unclean_shutdown": 0,
                    "newlines": b"\n \r\n",
                    "compression": COMPRESSION_DEFLATE,
                }
            )
        )


_ZEROES = bytes(GRAIN)
_pack_marker = struct.Struct("<QI").pack
"""A ``GRAIN_MARKER``, thousands of times a second."""


def _compressor(level: int) -> Callable[[bytes], bytes]:
    """A function that makes a zlib stream of a grain."""
    if level <= _ISAL_LEVELS:
        return lambda grain: isal_zlib.compress(grain, level)
    return lambda grain: zlib.compress(grain, level)


def _descriptor(sectors: int, name: str) -> bytes:
    """Its text, without what a name in quotes may not have."""
    plain = "".join(c for c in name if c.isprintable() and c not in '"\\')[:200] or "disk.vmdk"
    heads, track = 255, 63
    content = secrets.token_bytes(12) + (secrets.randbelow(0xFFFFFFFE - 1) + 1).to_bytes(4)
    return render(
        Descriptor(
            create_type="streamOptimized",
            extents=(ExtentLine(sectors, "SPARSE", plain, access="RDONLY"),),
            # The end of the long one, and neither of the numbers that mean "none".
            content_id=int.from_bytes(content[-4:]),
            database={
                "adapterType": "lsilogic",
                "geometry.cylinders": str(min(max(1, sectors // (heads * track)), 65535)),
                "geometry.heads": str(heads),
                "geometry.sectors": str(track),
                "longContentID": content.hex(),
                "uuid": _uuid(),
                "virtualHWVersion": "4",
            },
        )
    ).encode("utf-8", "replace")


def _uuid() -> str:
    """The way VMware writes it: 16 bytes in two groups."""
    number = secrets.token_bytes(16)
    return f"{number[:8].hex(' ')}-{number[8:].hex(' ')}"


def _marker(kind: int, length: int) -> bytes:
    return bytes(MARKER.build({"sectors": length // SECTOR, "kind": kind}))


def _little(numbers: "array[int]") -> bytes:
    if sys.byteorder == "big":
        numbers = array("I", numbers)
        numbers.byteswap()
    return numbers.tobytes()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)
