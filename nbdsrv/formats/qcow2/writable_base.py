"""A qcow2 image whose tables change while it is read: the tables, and how they reach the file.

::

    flush   data, new tables, refcount blocks | refcount table | L2 and L1 entries
                                         fdatasync        fdatasync           fdatasync

    given up ──> quarantine ── QUARANTINE_S ──> one reference less; a hole, free
       entries not yet durable

Rules:

* An entry is written only when what it refers to, and the count of it, are durable. A crash at any
  moment leaves an image without errors; clusters that nothing refers to are the worst of it.
* A cluster that was given up is given away again only after ``QUARANTINE_S``: whoever located it
  before may still be reading there, or writing.
* The tables belong to the loop, the refcounts to whichever thread needs a cluster.
"""

import asyncio
import os
from array import array
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TypeVar, TypeVarTuple

from nbdsrv.disk.runs import FileRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.page import Kind, Page
from nbdsrv.formats.qcow2.claims import Claim
from nbdsrv.formats.qcow2.reader import Layers, Qcow2Disk
from nbdsrv.formats.qcow2.structs import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO_FLAG
from nbdsrv.formats.qcow2.writable_patch import patch
from nbdsrv.formats.qcow2.writable_start import Start, prepare
from nbdsrv.formats.qcow2.writable_store import NewClusters, WriteBack, release
from nbdsrv.formats.qcow2.writable_tables import Table
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

__all__ = ["ChangingQcow2"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

QUARANTINE_S = 60.0
"""How long a cluster that was given up is left alone; longer than any read or write takes that can
still be answered."""
MAX_QUARANTINE = 1 << 18
"""Runs of clusters in quarantine, some 30 MiB; beyond it no more are given up than must be."""

_DATA = int(Kind.DATA)


class ChangingQcow2(Qcow2Disk):
    """Everything about changing an image but the changes."""

    def __init__(self, workers: Workers, layers: Layers, start: Start) -> None:
        """Becomes the owner of the files and the backing Disk."""
        super().__init__(workers, layers)
        self._bitmaps.clear()  # from the first write on they are not what they say
        self.contexts = (ALLOCATION, ALLOCATION_DEPTH)
        self._bits = self.header.cluster_bits
        self._l2_bits = self.header.l2_bits
        self._tables = start.tables
        self._refcounts = start.refcounts
        self._prepared = start.prepared
        self._owning = asyncio.Lock()
        self._flushing = asyncio.Lock()
        self._old_version = self.header.version < 3
        self._begun = self._durable = 0
        self._given_up: list[tuple[int, int]] = []
        self._quarantine: deque[tuple[float, list[tuple[int, int]]]] = deque()
        self._recent: list[tuple[int, int, int, int]] = []
        self._flush_failed = False

    # --- reading beside writing ------------------------------------------------------------------

    def _read_metadata(self, position: int, length: int, what: str) -> bytes:
        """Of a table that is in memory, as it is there."""
        found = self._tables.in_memory(position, length)
        return super()._read_metadata(position, length, what) if found is None else found

    def _table_claims(self) -> list[Claim]:
        """Where they lie now: the refcount table may have moved."""
        header = self.header
        l1_end = header.l1_table_offset + header.l1_size * 8
        return [Claim(header.l1_table_offset, l1_end), Claim(*self._refcounts.table_range())]

    def _keep(self, number: int, page: Page) -> None:
        """The table may have changed while a thread was reading it for this page."""
        for offset, length, kind, position in self._recent:
            self._patch_page(number, page, offset, length, kind, position)
        super()._keep(number, page)

    def _changed(self, offset: int, length: int, kind: int, position: int = 0) -> None:
        """The guest's bytes are elsewhere from now on."""
        length = min(length, self.size - offset)
        self.epoch += 1
        if self._loading.locked():
            self._recent.append((offset, length, kind, position))
        else:
            self._recent.clear()
        first, last = offset // self.page_span, (offset + length - 1) // self.page_span
        for number in range(first, last + 1):
            page = self._pages.get(number)
            if page is not None:
                before = len(page)
                self._patch_page(number, page, offset, length, kind, position)
                self._segments += len(page) - before

    def _patch_page(
        self, number: int, page: Page, offset: int, length: int, kind: int, position: int
    ) -> None:
        begin = max(offset, number * self.page_span)
        end = min(offset + length, (number + 1) * self.page_span)
        if begin < end:
            at = position + begin - offset if kind == _DATA else 0
            patch(page, (begin, end, kind, at, None))

    # --- tables --------------------------------------------------------------------------------

    async def _pin(self, number: int) -> Table:
        """The table, in memory until its ``pins`` are back at what they were."""
        table = self._tables.get(number)
        if table is None:
            async with self._owning:
                table = self._tables.get(number)
                if table is None:
                    words = await self._run(self._tables.read_table, number)
                    table = self._tables.keep(number, words)
        table.pins += 1
        return table

    async def _own(self, table: Table) -> None:
        """Give the table a place of its own, if it has none or shares it with a snapshot."""
        if table.own:
            return
        async with self._owning:
            if table.own:
                return
            new = NewClusters(self.file, self._refcounts, self.name, self.header.cluster_size)
            old = table.position
            try:
                await self._run(new.take_table)
            finally:
                if new.stored:
                    self._tables.move(table, new.stored[0].position)
                    if old:
                        self._give_up(old >> self._bits)

    def _replace(self, table: Table, index: int, words: "array[int]") -> None:
        """Enter ``words``, and give up what the entries before them referred to."""
        for old, new in zip(table.words[index : index + len(words)], words, strict=True):
            if old & COMPRESSED:
                self.blocks.forget(old & (COMPRESSED - 1))
                self._given_up.append(self._packed_clusters(old))
            elif old & OFFSET_MASK and (old ^ new) & OFFSET_MASK:
                self._give_up((old & OFFSET_MASK) >> self._bits)
        self._tables.enter(table, index, words)

    def _packed_clusters(self, word: int) -> tuple[int, int]:
        """The clusters (first, count) of the file that a compressed one lies in."""
        position, length = self._entries.compressed_range(word & (COMPRESSED - 1))
        begin = position >> self._bits
        return begin, (position + length - 1 >> self._bits) - begin + 1

    def _give_up(self, cluster: int) -> None:
        runs = self._given_up
        if runs and sum(runs[-1]) == cluster:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((cluster, 1))

    def _may_give_up(self) -> bool:
        """Is there room to remember more clusters that were given up?"""
        waiting = len(self._given_up) + sum(len(runs) for _, runs in self._quarantine)
        return waiting < MAX_QUARANTINE

    def _check_entries(self, table: Table, index: int, stop: int) -> None:
        """Raises CorruptImage for an entry that must be neither followed nor given up."""
        for at in range(index, stop):
            word = table.words[at]
            if word and not self._sound(word):
                where = table.position + at * 8
                raise self.file.corrupt(where, f"an L2 entry {word:#x}; repair it: qemu-img check")

    def _sound(self, word: int) -> bool:
        """Does an entry, not 0, refer to a cluster of the file that may hold data, or to none?"""
        if word & COMPRESSED:
            begin, count = self._packed_clusters(word)
            inside = 0 < begin << self._bits < self.file.size
            return inside and not word & COPIED and self._refcounts.no_table(begin, count)
        position = word & OFFSET_MASK
        if word & (L2_RESERVED | self.header.cluster_size - 1) & ~ZERO_FLAG:
            return False
        if word & ZERO_FLAG and self._old_version:
            return False
        if not position:
            return bool(word & ZERO_FLAG)
        return position < self.file.size and not self._refcounts.is_table(position >> self._bits)

    # --- durability ----------------------------------------------------------------------------

    async def flush(self) -> None:
        """Everything written before is durable; once it has failed it fails for good."""
        self._check_flushed()
        await self._write_back(self._begun + 1)

    async def _relieve(self) -> None:
        """Write the tables before too many of them have changed."""
        if self._tables.crowded():
            await self._write_back(self._begun + 1)

    async def _write_back(self, number: int) -> None:
        """Write what has changed, in order, unless write-back ``number`` has been meanwhile."""
        async with self._flushing:
            self._check_flushed()
            if self._durable >= number:
                return
            self._begun += 1
            begun = self._begun
            work = WriteBack(self.file, self._refcounts, self._tables.take_changes())
            given_up, self._given_up = self._given_up, []
            try:
                await self._run(work.perform)
            finally:
                if work.done:
                    self._durable = begun
                    self._tables.written(work.taken)
                    given_up += work.given_up
                    if given_up:
                        self._quarantine.append((monotonic(), given_up))
                else:
                    self._tables.put_back(work.taken)
                    self._given_up = given_up + self._given_up
                    if work.lost:
                        self._flush_failed = True
                        self.epoch += 1  # nothing is placed any more
            await self._end_quarantine(monotonic() - QUARANTINE_S)

    async def _end_quarantine(self, until: float) -> None:
        """Give up for good what was given up before ``until``."""
        runs: list[tuple[int, int]] = []
        while self._quarantine and self._quarantine[0][0] <= until:
            runs += self._quarantine.popleft()[1]
        if runs:
            await self._run(release, self.file, self._refcounts, runs)

    def _check_flushed(self) -> None:
        if self._flush_failed:
            text = f"{self.name}: an earlier flush failed and data was lost; open the image anew"
            raise DiskError(text)

    async def _prepare(self) -> None:
        """Before the first change: what will not be true any more is marked as such."""
        if not self._prepared:
            async with self._flushing:
                if not self._prepared:
                    await self._run(prepare, self.file, self.header)
                    self._prepared = True

    async def cache(self, offset: int, length: int) -> None:
        """Read ahead into the page cache what lies in files, without waiting for it."""
        for run in await self.runs(offset, length) if length else ():
            if isinstance(run, FileRun):
                where = (run.fd, run.position, min(run.length, length))
                await self._run(os.posix_fadvise, *where, os.POSIX_FADV_WILLNEED)

    async def close(self) -> None:
        """Write the tables, so that what was written is found again; then close the files."""
        if self._closed:
            return
        self.epoch += 1
        try:
            if not self._flush_failed:
                await self._write_back(self._begun + 1)
                await self._end_quarantine(monotonic())
                if self._refcounts.pending:
                    await self._write_back(self._begun + 1)
                await self._run(self._refcounts.cut_file)
        finally:
            await super().close()

    async def _run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await self.workers.run(work, *args)
        except OSError as error:
            raise DiskError.from_os(self.name, error) from error
