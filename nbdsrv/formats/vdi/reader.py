"""Reading VDI: dynamic, fixed and differencing images.

::

    disk    | block 0 | block 1 | block 2 | block 3 |          block_size each (1 MiB)
    table       1         -1        0         -2               one u32 each
                |      parent's     |        zeroes
    file    | header | table |xx block |xx block |             xx: block_extra bytes

Facts: VirtualBox's VDICore.h; -1 in an image without a parent reads as zeroes.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.vdi.header import Header, read_header
from nbdsrv.formats.vdi.parent import find_parent, prove_parent
from nbdsrv.formats.vdi.structs import ABSENT, DISCARDED
from protocol.terms import BlockSizes

__all__ = ["VdiDisk", "open_vdi"]

PAGE_ENTRIES = 4096
"""Table entries read at a time: 16 KiB of table, 4 GiB of disk."""
MAX_PREFERRED = 64 << 10
"""Bytes; a larger piece of a block is not cheaper to read."""


class VdiDisk(MappedDisk):
    """A VDI and, if it is a differencing one, its parent."""

    format = "vdi"

    def __init__(
        self, workers: Workers, file: ImageFile, header: Header, backing: Disk | None
    ) -> None:
        super().__init__(workers, file, backing)
        self.header = header
        self.size = header.size
        self.page_span = header.block_size * PAGE_ENTRIES
        self.block_sizes = replace(BlockSizes(), preferred=MAX_PREFERRED)

    @property
    def facts(self) -> Mapping[str, object]:
        """Kind, block size, who made it, UUIDs and the parent."""
        header = self.header
        facts: dict[str, object] = {
            "version": "1.1",
            "kind": header.kind,
            "block_size": header.block_size,
            "creator": header.creator,
            "uuid": str(header.identity),
        }
        if header.comment:
            facts["comment"] = header.comment
        if self.backing is not None:
            facts["parent"] = self.backing.name
            facts["parent_uuid"] = str(header.parent)
        return facts

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        block_size = self.header.block_size
        first = offset // block_size
        count = -(-length // block_size)
        raw = self.file.read(self.header.table_at + 4 * first, 4 * count, "the block table")
        if raw == b"\xff" * len(raw):
            return (Segment(length, Kind.ABSENT),)
        entries = array("I", raw)
        if sys.byteorder == "big":  # pragma: no cover
            entries.byteswap()
        self._check_page(entries, first)
        return self._translate(entries, length)

    def _translate(self, entries: "array[int]", left: int) -> Iterator[Segment]:
        block_size = self.header.block_size
        stride = block_size + self.header.block_extra
        data_at = self.header.data_at + self.header.block_extra
        for entry in entries:
            length = min(block_size, left)
            left -= length
            if entry == ABSENT:
                yield Segment(length, Kind.ABSENT)
            elif entry == DISCARDED:
                yield Segment(length, Kind.ZERO)
            else:
                yield Segment(length, Kind.DATA, data_at + entry * stride)

    def _check_page(self, entries: "array[int]", first: int) -> None:
        """Every block is within the file, and no two blocks of the page are the same."""
        header, file = self.header, self.file
        stride = header.block_size + header.block_extra
        stored = [entry for entry in entries if entry < DISCARDED]
        if not stored:
            return
        if len(set(stored)) < len(stored):
            seen: set[int] = set()
            for index, entry in enumerate(entries):
                if entry in seen:
                    at = header.table_at + 4 * (first + index)
                    raise file.corrupt(at, f"stored block {entry} is used twice")
                if entry < DISCARDED:
                    seen.add(entry)
        if header.data_at + (max(stored) + 1) * stride <= file.size:
            return
        # The disk's last block may be stored as far as the disk goes.
        tail = header.size - (first + len(entries) - 1) * header.block_size
        for index, entry in enumerate(entries):
            if entry >= DISCARDED:
                continue
            needed = header.block_size if index < len(entries) - 1 else min(tail, header.block_size)
            start = header.data_at + entry * stride + header.block_extra
            if start + needed > file.size:
                at = header.table_at + 4 * (first + index)
                raise file.corrupt(at, f"stored block {entry} lies beyond the end of the file")


async def open_vdi(file: ImageFile, opening: Opening) -> Disk:
    """Open a VDI, and the chain below it.

    Raises:
        CorruptImage: broken, or a parent that is not the one it was made on.
        DiskError: the parent is not there.
    """
    header = await opening.workers.look_up(read_header, file)
    if not header.parent.int:
        return VdiDisk(opening.workers, file, header, None)
    name = await opening.workers.look_up(find_parent, file, header)
    backing = await opening.below(file, name, "vdi")
    try:
        if not isinstance(backing, VdiDisk):  # pragma: no cover - "vdi" opens nothing else
            raise DiskError(f"{file.path}: its parent {backing.name} is no VDI")
        prove_parent(file, header, backing.name, backing.header)
        return VdiDisk(opening.workers, file, header, backing)
    except BaseException:
        await backing.close()
        raise
