"""Where a snapshot has data at all, from the head of its export stream: xapi-nbd cannot tell.

::

    GET /export_raw_vdi?format=vhd ── | footer | header | BAT | ... hung up here
                                                          │
    AllocatedDisk.extents ── DATA where the BAT has a block, HOLE elsewhere; bytes still by NBD

It spares a full backup the reading of what was never written, and costs one short attachment of the
snapshot. Disks exported as qcow2 are read whole: their tables may be far into the stream.
"""

import struct
from collections.abc import Iterator

from construct import ConstructError

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.vhd.structs import (
    ABSENT,
    FOOTER_SIZE,
    HEADER,
    HEADER_CHECKSUM,
    HEADER_COOKIE,
    HEADER_SIZE,
    SECTOR,
    checksum,
)
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_export import begin_export
from nbdsrv.source.xapi_records import Vdi
from nbdsrv.source.xapi_session import XapiSession
from protocol.contexts import ALLOCATION
from protocol.extents import DATA, HOLE, ExtentList

__all__ = ["AllocatedDisk", "Allocation", "read_allocation"]

MAX_HEAD = 16 << 20
"""Bytes until the end of the BAT: 4 MiB for the largest VHD, with blocks of 2 MiB."""
MAX_BLOCKS = 1 << 21
MAX_EXTENTS = 1 << 16
"""Extents of one answer."""


class Allocation:
    """Which blocks of a disk have data. Immutable."""

    def __init__(self, block: int, present: bytes) -> None:
        """``present``: a byte for each block of so many bytes, 0 or 1."""
        self.block = block
        self._present = present

    def extents(self, offset: int, length: int, size: int) -> ExtentList:
        """Of a disk of ``size`` bytes; what lies beyond the table is a hole."""
        return ExtentList(offset, self._pieces(offset, min(offset + length, size)))

    def _pieces(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        for _ in range(MAX_EXTENTS):
            if at >= end:
                return
            index = at // self.block
            data = self._present[index : index + 1] == b"\1"
            other = self._present.find(b"\0" if data else b"\1", index)
            stop = end if other < 0 and not data else min(end, self._edge(other))
            yield stop - at, DATA if data else HOLE
            at = stop

    def _edge(self, index: int) -> int:
        return (index if index >= 0 else len(self._present)) * self.block


class AllocatedDisk(Passthrough):
    """A Disk, and where it has data."""

    def __init__(self, workers: Workers, inside: Disk, allocation: Allocation) -> None:
        """Becomes the owner of ``inside``."""
        super().__init__(workers, inside)
        self._allocation = allocation

    async def extents(self, offset: int, length: int) -> ExtentList:
        """By the table."""
        self._check(offset, length)
        if not length:
            return await super().extents(offset, length)
        return self._allocation.extents(offset, length, self.size)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """The same; other contexts are the inner Disk's."""
        if context == ALLOCATION:
            return await self.extents(offset, length)
        return await super().status(context, offset, length)


async def read_allocation(session: XapiSession, vdi: Vdi, kind: str) -> Allocation:
    """The head of the export stream.

    Raises:
        SourceError: there is none of that kind, or it is not what it should be.
    """
    if kind != "vhd":
        raise SourceError(f"the export of {vdi.uuid} is {kind}: its map is not at its beginning")
    head = bytearray()
    needed = FOOTER_SIZE + HEADER_SIZE
    table = 0
    async with begin_export(session, vdi, kind) as (server, answer):
        async for part in answer.parts():
            head += part
            if len(head) >= needed and not table:
                table, needed = _table(server.name, vdi, head)
            if table and len(head) >= needed:
                break
        else:
            raise SourceError(f"{server.name}: the stream of {vdi.uuid} ends before its table")
    return _allocation(head, table, needed)


def _table(where: str, vdi: Vdi, head: bytearray) -> tuple[int, int]:
    """Where the BAT begins and ends."""
    raw = bytes(head[FOOTER_SIZE : FOOTER_SIZE + HEADER_SIZE])
    try:
        header = HEADER.parse(raw)
    except ConstructError as error:
        raise SourceError(f"{where}: the stream of {vdi.uuid} is no VHD") from error
    if header.cookie != HEADER_COOKIE or header.checksum != checksum(raw, HEADER_CHECKSUM):
        raise SourceError(f"{where}: the stream of {vdi.uuid} is no VHD")
    block, count = header.block_size, header.max_table_entries
    begin, end = header.table_offset, header.table_offset + 4 * count
    fits = 0 < count <= MAX_BLOCKS and begin >= FOOTER_SIZE + HEADER_SIZE and end <= MAX_HEAD
    if not fits or block < SECTOR or block & (block - 1) or block * count < vdi.size:
        raise SourceError(f"{where}: the stream of {vdi.uuid} has no table that makes sense")
    return begin, end


def _allocation(head: bytearray, begin: int, end: int) -> Allocation:
    (block,) = struct.unpack_from(">I", head, FOOTER_SIZE + 32)
    entries = struct.unpack_from(f">{(end - begin) // 4}I", head, begin)
    return Allocation(block, bytes(entry != ABSENT for entry in entries))
