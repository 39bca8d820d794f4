"""Dynamic VHDs being written, as one stream.

::

    | footer | header | BAT | batmap | block | block | ...            | footer |
      copy                             bitmap of ones, 2 MiB of data
    a pipe   all known from the plan ─> in order
    a file   written last, when it is known which blocks there are

Choices, each because a reader is particular about it:

* Creator ``tap`` 1.3: QEMU believes the size only of creators it knows, and computes it from the
  geometry otherwise. tapdisk 1.2 and later promises a *batmap* (which blocks have a full bitmap),
  so there is one.
* Blocks follow each other without gaps, in the disk's order, the last one whole: readers of streams
  rely on it.
* Every bitmap is all ones: what is not written within a block is stored as zeroes.
* Timestamps count from 2000.
"""

import sys
import time
import uuid
from array import array

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.vhd.structs import (
    ABSENT,
    FOOTER_SIZE,
    MAX_SECTORS,
    SECTOR,
    DiskType,
    bitmap_size,
)
from nbdsrv.formats.vhd.writer_frame import (
    BLOCK,
    TABLE_AT,
    build_footer,
    build_header,
    entries_of,
)
from nbdsrv.formats.vhd.writer_structs import batmap, batmap_length
from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["BLOCK", "VhdWriter", "stream_length"]

_BITMAP = b"\xff" * bitmap_size(BLOCK)
_CREATOR_VERSION = 0x00010003


class VhdWriter(ImageWriter):
    """A dynamic VHD of at most 2040 GiB; its size is rounded up to whole sectors."""

    granularity = BLOCK

    def __init__(self, workers: Workers, target: TargetFile) -> None:
        """Becomes the owner of ``target``, which is not open yet."""
        self._workers = workers
        self._target = target
        self._size = 0
        self._bat = array("I")
        self._blocks_at = 0
        self._footer = b""
        self.seekable = target.seekable

    async def open(self, size: int) -> None:
        """The format has an end."""
        if size > MAX_SECTORS * SECTOR:
            raise UnsupportedImage(
                f"{self._target.path}: a VHD has at most 2040 GiB, this disk has"
                f" {size / (1 << 30):.0f}; write another format, for instance qcow2"
            )
        await self._workers.run(self._target.open)

    async def begin(self, plan: Plan) -> None:
        """Into a pipe all tables."""
        size = -(-plan.size // SECTOR) * SECTOR
        entries = entries_of(size)
        self._size = size
        self._bat = array("I", [ABSENT]) * entries
        self._blocks_at = TABLE_AT + _padded(4 * entries) + batmap_length(entries)
        self._footer = build_footer(
            size, uuid.uuid4(), time.time(), _CREATOR_VERSION, DiskType.DYNAMIC
        )
        if self.seekable:
            self._target.position = self._blocks_at
        else:
            await self._workers.run(self._promise, plan)

    def _promise(self, plan: Plan) -> None:
        at = self._blocks_at
        for offset, length in plan.data():
            for number in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
                if self._bat[number] == ABSENT:
                    self._bat[number] = at // SECTOR
                    at += len(_BITMAP) + BLOCK
        self._target.append(self._tables())

    async def data(self, offset: int, data: memoryview) -> None:
        """Whole blocks, behind the ones before."""
        await self._workers.run(self._append, offset, data)

    def _append(self, offset: int, data: memoryview) -> None:
        for start in range(0, len(data), BLOCK):
            number = (offset + start) // BLOCK
            sector = self._target.position // SECTOR
            if self.seekable:
                self._bat[number] = sector
            assert self._bat[number] == sector, "the plan did not tell of this block"
            block = data[start : start + BLOCK]
            self._target.append(_BITMAP, block, bytes(BLOCK - len(block)))

    async def zero(self, offset: int, length: int) -> None:
        """A block that is left out is zeroes."""

    async def finish(self) -> None:
        """The footer; in a file also what stands at its beginning."""
        await self._workers.run(self._finish)

    def _finish(self) -> None:
        self._target.append(self._footer)
        if self.seekable:
            self._target.store(0, self._tables())
        self._target.publish()

    async def abort(self) -> None:
        """Remove it."""
        await self._workers.run(self._target.discard)

    def _tables(self) -> bytes:
        """Everything before the first block."""
        table = array("I", self._bat)
        if sys.byteorder == "little":
            table.byteswap()
        data = self._footer + build_header(len(table)) + table.tobytes()
        data += b"\xff" * (_padded(len(data)) - len(data))
        present = bytes(entry != ABSENT for entry in self._bat)
        return data + batmap(present, len(data))


def stream_length(plan: Plan) -> int:
    """Bytes that a pipe will be given for ``plan``, from the first to the last."""
    entries = entries_of(plan.size)
    blocks, end = 0, 0  # ranges are ascending, but two may lie in one block
    for offset, length in plan.data():
        first = max(offset // BLOCK, end)
        end = max(-(-(offset + length) // BLOCK), end)
        blocks += end - first
    tables = TABLE_AT + _padded(4 * entries) + batmap_length(entries)
    return tables + blocks * (len(_BITMAP) + BLOCK) + FOOTER_SIZE


def _padded(length: int) -> int:
    return -(-length // SECTOR) * SECTOR
