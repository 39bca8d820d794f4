"""Which clusters of an image are in use: refcounts, read as needed, changed in memory.

::

    refcount table   | block 0 | block 1 |    0    | ...       at ``header.refcount_table_offset``
                         |
    refcount block       '--> | 1 | 1 | 2 | 0 | 1 | ...        one count per cluster of the file
                                            '--> free

Changes stay in memory until ``changes`` hands them out to be written, in an order that whoever
writes must keep: blocks first, and durable, before the table names them, and both before anything
refers to a cluster that they count.

New clusters come from what is free already, found by looking through the blocks once, and then from
the end of the file.
"""

import errno as os_errno
import os
import threading
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.entries import words_of
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.refcount_block import Block, decode_block, new_block
from nbdsrv.formats.qcow2.structs import MAX_REFCOUNT_TABLE_BYTES, OFFSET_MASK
from nbdsrv.formats.qcow2.writer_space import big_endian

__all__ = ["Changes", "Refcounts", "Taken"]

MAX_BLOCKS = 128
"""Refcount blocks kept in memory when they are unchanged: 8 MiB of 64 KiB."""
DEVICE_RESERVE = 16
"""Clusters at a device's end that only tables get: a refcount block must always fit."""
GROW_STEP = 2 << 20
"""Bytes: files are grown by multiples, since growing costs as much as a small write does."""
LOOK_THROUGH = 16
"""Blocks looked through for free clusters before one allocation gives up and grows the file."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Consecutive clusters that have been allocated.

    Attributes:
        position: of the first, bytes.
        fresh: has the file never been that long, so that they read as zeroes?
    """

    position: int
    count: int
    fresh: bool


@dataclass(slots=True)
class Changes:
    """What has to be written.

    Attributes:
        blocks: (position, bytes), to be durable before anything else.
        table: (position, bytes), to be durable after ``blocks``.
        ranges: which entries of which blocks these are, to put them back.
        entries: likewise of the table.
        old_table: (position, clusters) of the table that is free once ``table`` is durable.
    """

    blocks: list[tuple[int, bytes]] = field(default_factory=list)
    table: list[tuple[int, bytes]] = field(default_factory=list)
    ranges: dict[int, tuple[int, int]] = field(default_factory=dict)
    entries: set[int] = field(default_factory=set)
    old_table: tuple[int, int] | None = None


class Refcounts:
    """Thread-safe, under one lock; methods block."""

    def __init__(self, file: ImageFile, header: Header) -> None:
        """Reads the table. Raises CorruptImage where it makes no sense."""
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self._lock = threading.Lock()
        self._block_bits = header.cluster_bits + 3 - header.refcount_order
        self._position = header.refcount_table_offset
        size = header.refcount_table_clusters << header.cluster_bits
        self._table = words_of(file.read(self._position, size, "the refcount table"))
        self._blocks: dict[int, Block] = {}
        self._changed: dict[int, tuple[int, int]] = {}
        self._entries: set[int] = set()
        self._moved: tuple[int, int] | None = None
        self._tables = set(range(self._position >> self._bits, self._position + size >> self._bits))
        self._tables.add(0)
        self._check_table()
        self._end = self._find_end()
        if not file.device:  # what is behind the file's end reads as zeroes
            self._end = max(self._end, -(-file.size >> self._bits))
        self._cursor = 0
        self._size_before = file.size

    # --- what is there -------------------------------------------------------------------------

    def _check_table(self) -> None:
        for index, word in enumerate(self._table):
            if not word:
                continue
            at = self._position + index * 8
            cluster = word >> self._bits
            if word & ~OFFSET_MASK or word & self._header.cluster_size - 1:
                raise self._file.corrupt(at, "a refcount block at an unaligned position")
            if word + self._header.cluster_size > self._file.size:
                raise self._file.corrupt(at, "a refcount block beyond the end of the file")
            if cluster in self._tables:
                raise self._file.corrupt(at, "a refcount block where another table lies")
            self._tables.add(cluster)

    def claim(self, position: int, clusters: int, at: int) -> None:
        """Clusters of another table, told of at ``at``: never to be given away.

        Raises:
            CorruptImage: they belong to a table already.
        """
        first = position >> self._bits
        for cluster in range(first, first + clusters):
            if cluster in self._tables:
                raise self._file.corrupt(at, f"a table at {position}, where another one lies")
            self._tables.add(cluster)

    def _find_end(self) -> int:
        """The cluster behind the last one in use."""
        for index in range(len(self._table) - 1, -1, -1):
            if self._table[index]:
                last = self._block(index).last_used()
                if last >= 0:
                    return (index << self._block_bits) + last + 1
        raise self._file.corrupt(self._position, "no cluster is in use; repair it: qemu-img check")

    @property
    def cluster_bits(self) -> int:
        """Clusters are ``1 << cluster_bits`` bytes."""
        return self._bits

    def is_table(self, cluster: int) -> bool:
        """Does a table lie there, so that no data may? Does not block."""
        return cluster in self._tables

    def no_table(self, cluster: int, count: int) -> bool:
        """Does no table lie among these clusters? Does not block."""
        return self._tables.isdisjoint(range(cluster, cluster + count))

    def table_range(self) -> tuple[int, int]:
        """Where the refcount table lies, and where it ends."""
        with self._lock:
            return self._position, self._position + len(self._table) * 8

    def sole(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The clusters of (first, count) runs that only one thing refers to, as runs."""
        found: list[tuple[int, int]] = []
        with self._lock:
            for first, count in runs:
                for cluster in range(first, first + count):
                    if self._count(cluster) != 1:
                        continue
                    if found and sum(found[-1]) == cluster:
                        found[-1] = (found[-1][0], found[-1][1] + 1)
                    else:
                        found.append((cluster, 1))
        return found

    def _count(self, cluster: int) -> int:
        index = cluster >> self._block_bits
        if index >= len(self._table) or not self._table[index]:
            return 0
        return self._block(index)[cluster & (1 << self._block_bits) - 1]

    def _block(self, index: int) -> Block:
        block = self._blocks.get(index)
        if block is None:
            size = self._header.cluster_size
            data = self._file.read(self._table[index], size, "a refcount block")
            block = self._blocks[index] = decode_block(data, self._header.refcount_order)
            self._evict()
        return block

    def _evict(self) -> None:
        if len(self._blocks) > MAX_BLOCKS + len(self._changed):
            for index in list(self._blocks)[:-1]:
                if index not in self._changed:
                    del self._blocks[index]
                    break

    # --- changes -------------------------------------------------------------------------------

    def take(self, count: int) -> Taken:
        """Allocate at least one cluster and at most ``count`` that follow each other.

        Raises:
            DiskError: ENOSPC where the image or its device cannot grow; or reading failed.
        """
        with self._lock:
            found = self._find_free(count)
            if found is None:
                return self._append(count)
            self._set(*found, 1)
            return Taken(found[0] << self._bits, found[1], fresh=False)

    def give_back(self, taken: Iterable[Taken]) -> None:
        """Undo ``take``: nothing refers to these clusters, and nothing did."""
        with self._lock:
            for clusters in taken:
                first = clusters.position >> self._bits
                self._set(first, clusters.count, 0)
                self._cursor = min(self._cursor, first)

    def drop(self, runs: Iterable[tuple[int, int]]) -> None:
        """One reference less to each cluster of (first, count) runs.

        Raises:
            CorruptImage: one has none.
        """
        with self._lock:
            for first, count in runs:
                for cluster in range(first, first + count):
                    self._drop(cluster)

    def _drop(self, cluster: int) -> None:
        count = self._count(cluster)
        if not count:
            text = "a cluster in use has refcount 0; repair the image: qemu-img check -r all"
            raise self._file.corrupt(cluster << self._bits, text)
        self._set(cluster, 1, count - 1)
        if count == 1:
            self._tables.discard(cluster)
            self._cursor = min(self._cursor, cluster)

    def _find_free(self, count: int) -> tuple[int, int] | None:
        mask = (1 << self._block_bits) - 1
        for _ in range(LOOK_THROUGH):
            if self._cursor >= self._end:
                return None
            index = self._cursor >> self._block_bits
            begin = index << self._block_bits
            if self._table[index]:
                block = self._block(index)
                found = block.find_free(self._cursor & mask, min(self._end - begin, mask + 1))
                if found >= 0:
                    first = begin + found
                    limit = min(count, self._end - first, mask + 1 - found)
                    length = block.free_length(found, limit)
                    self._refuse_tables(first, length)
                    self._cursor = first + length
                    return first, length
            self._cursor = begin + mask + 1
        return None

    def _refuse_tables(self, first: int, count: int) -> None:
        for cluster in range(first, first + count):
            if cluster in self._tables:
                text = "a table in use has refcount 0; repair the image: qemu-img check -r all"
                raise self._file.corrupt(cluster << self._bits, text)

    def _append(self, count: int) -> Taken:
        if self._file.device:
            count = min(count, (self._file.size >> self._bits) - self._end - DEVICE_RESERVE)
            if count <= 0:
                text = f"{self._file.path}: the device is full, {self._file.size} bytes"
                raise DiskError(text, os_errno.ENOSPC)
        first = self._end
        self._end += count
        self._set(first, count, 1)
        self._grow_file()
        return Taken(first << self._bits, count, fresh=not self._file.device)

    def _grow_file(self) -> None:
        size = self._end << self._bits
        if size <= self._file.size:
            return
        size = -(-size // GROW_STEP) * GROW_STEP
        try:
            os.ftruncate(self._file.fd, size)
        except OSError as error:
            raise DiskError.from_os(f"growing {self._file.path}", error) from error
        self._file.size = size

    def cut_file(self) -> None:
        """Give back what the file was grown by in advance. Raises OSError."""
        with self._lock:
            size = max(self._end << self._bits, self._size_before)
            if size < self._file.size:
                os.ftruncate(self._file.fd, size)
                self._file.size = size

    def _set(self, first: int, count: int, value: int) -> None:
        mask = (1 << self._block_bits) - 1
        while count:
            index, at = first >> self._block_bits, first & mask
            length = min(count, mask + 1 - at)
            block = self._writable_block(index)
            block.fill(at, length, value)
            low, high = self._changed.get(index, (at, at))
            self._changed[index] = (min(low, at), max(high, at + length))
            first += length
            count -= length

    def _writable_block(self, index: int) -> Block:
        if index >= len(self._table):
            self._grow_table(index)
        if self._table[index]:
            return self._block(index)
        cluster = self._end
        self._end += 1
        self._table[index] = cluster << self._bits
        self._tables.add(cluster)
        self._entries.add(index)
        block = new_block(self._header.cluster_size, self._header.refcount_order)
        self._blocks[index] = block
        self._changed[index] = (0, len(block))
        self._set(cluster, 1, 1)
        return block

    def _grow_table(self, index: int) -> None:
        """A table half as large again, elsewhere; the old one is free when it is durable."""
        size = self._header.cluster_size
        clusters = -(-(index + index // 2 + 2) * 8 // size)
        if clusters * size > max(MAX_REFCOUNT_TABLE_BYTES, size):
            text = f"{self._file.path}: the image cannot grow, its refcount table is full"
            raise DiskError(text, os_errno.ENOSPC)
        old = self._position, len(self._table) * 8 // size
        unwritten = self._moved is not None
        self._moved = self._moved or old
        self._table.extend(array("Q", bytes(clusters * size - len(self._table) * 8)))
        first = self._end
        self._end += clusters
        self._position = first << self._bits
        self._tables.update(range(first, first + clusters))
        self._set(first, clusters, 1)
        if unwritten:  # the file knows nothing of the table this one replaces
            begin = old[0] >> self._bits
            self._tables.difference_update(range(begin, begin + old[1]))
            self._set(begin, old[1], 0)
            self._cursor = min(self._cursor, begin)

    # --- to be written -------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Is anything to be written? Does not block."""
        return bool(self._changed)

    def changes(self) -> Changes:
        """Everything not yet written; it counts as written from here on, see ``put_back``."""
        with self._lock:
            found = Changes(ranges=self._changed, entries=self._entries, old_table=self._moved)
            for index, (low, high) in self._changed.items():
                start, data = self._blocks[index].encode(low, high)
                found.blocks.append((self._table[index] + start, data))
            if self._moved is not None:
                size = len(self._table) * 8 // self._header.cluster_size
                found.blocks.append((self._position, big_endian(self._table)))
                pointer = self._position.to_bytes(8, "big") + size.to_bytes(4, "big")
                found.table.append((REFCOUNT_TABLE_AT, pointer))
            else:
                for index in self._entries:
                    word = self._table[index].to_bytes(8, "big")
                    found.table.append((self._position + index * 8, word))
            self._changed, self._entries, self._moved = {}, set(), None
            return found

    def put_back(self, changes: Changes) -> None:
        """Writing ``changes`` has failed: they are to be written still."""
        with self._lock:
            for index, (low, high) in changes.ranges.items():
                now = self._changed.get(index, (low, high))
                self._changed[index] = (min(low, now[0]), max(high, now[1]))
            self._entries |= changes.entries
            self._moved = changes.old_table or self._moved


REFCOUNT_TABLE_AT = 48
"""Of ``refcount_table_offset`` and ``..._clusters`` in the header: one sector, written at once."""
