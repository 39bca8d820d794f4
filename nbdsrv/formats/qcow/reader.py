"""qcow images, version 1: two levels of tables, compressed clusters, a backing file.

::

    guest offset   | L1 index | L2 index | within the cluster |
                        '-> L1 -> L2 -> a cluster, a compressed cluster, or 0: the backing file's

There are no refcounts and no snapshots: a cluster belongs to one entry.
"""

from collections.abc import Iterable, Iterator, Mapping

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.qcow.header import Header, read_header
from nbdsrv.formats.qcow.structs import COMPRESSED, SECTOR
from nbdsrv.formats.qcow2.claims import Claim, conflicts, without_conflicts
from nbdsrv.formats.qcow2.compression import inflate
from nbdsrv.formats.qcow2.entries import words_of
from nbdsrv.formats.qcow2.faults import Fault, fault_key, fault_of
from protocol.terms import BlockSizes

__all__ = ["QcowDisk", "open_qcow"]

PAGE_ENTRIES = 8192
"""Clusters in a page, at least an L2 table: 32 MiB of 4 KiB clusters."""

_DATA, _BLOCK, _, _ABSENT = (int(kind) for kind in Kind)


class QcowDisk(MappedDisk):
    """A qcow image."""

    format = "qcow"

    def __init__(
        self, workers: Workers, file: ImageFile, header: Header, backing: Disk | None
    ) -> None:
        """Becomes the owner of ``file`` and ``backing``."""
        super().__init__(workers, file, backing)
        self.header = header
        self.size = header.size
        self.block_sizes = BlockSizes(preferred=max(header.cluster_size, 4096))
        self.page_span = max(PAGE_ENTRIES, 1 << header.l2_bits) << header.cluster_bits
        self._offset_bits = 63 - header.cluster_bits

    @property
    def facts(self) -> Mapping[str, object]:
        """Clusters and chain."""
        name = self.header.backing_file
        facts: dict[str, object] = {"version": 1, "cluster_size": self.header.cluster_size}
        if name:
            facts["backing_file"] = name if name.isprintable() else ascii(name)[1:-1]
        return facts

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        header = self.header
        table_bits = header.cluster_bits + header.l2_bits
        first = offset >> table_bits
        count = (offset + length - 1 >> table_bits) - first + 1
        l1_at = header.l1_table_offset + first * 8
        raw = self.file.read(l1_at, count * 8, "the L1 table")
        if not any(raw):
            return (Segment(length, _ABSENT),)
        claims = [Claim(0, header.l1_table_offset + header.l1_size * 8)]
        segments: list[Segment] = []
        for index, table in enumerate(words_of(raw)):
            begin = first + index << table_bits
            span = min(begin + (1 << table_bits), offset + length) - begin
            segments += self._read_table(table, l1_at + index * 8, span, claims)
        doubtful = conflicts(claims)
        if doubtful:
            return without_conflicts(segments, doubtful, header.cluster_size)
        return segments

    def _read_table(
        self, table: int, l1_at: int, length: int, claims: list[Claim]
    ) -> Iterable[Segment]:
        if not table:
            return (Segment(length, _ABSENT),)
        size = -(-length >> self.header.cluster_bits) * 8
        if table % SECTOR or table + size > self.file.size:
            fault = Fault.L1_UNALIGNED if table % SECTOR else Fault.L1_OUTSIDE
            return (Segment(length, _BLOCK, fault_key(l1_at, fault)),)
        claims.append(Claim(table, table + (8 << self.header.l2_bits)))
        return self._from_entries(self.file.read(table, size, "an L2 table"), table, length, claims)

    def _from_entries(
        self, table: bytes, position: int, length: int, claims: list[Claim]
    ) -> Iterator[Segment]:
        cluster = self.header.cluster_size
        left = length
        for index, word in enumerate(words_of(table)):
            span = min(cluster, left)
            left -= span
            if not word:
                yield Segment(span, _ABSENT)
                continue
            compressed = word & COMPRESSED
            start, size = self._compressed_range(word) if compressed else (word, span)
            where = position + index * 8
            if start + size > self.file.size:
                yield Segment(span, _BLOCK, fault_key(where, Fault.OUTSIDE))
            elif not compressed and start % SECTOR:
                yield Segment(span, _BLOCK, fault_key(where, Fault.UNALIGNED))
            elif compressed:
                yield Segment(span, _BLOCK, word & ~COMPRESSED)
            else:
                claims.append(Claim(start, start + span))
                yield Segment(span, _DATA, start)

    def _compressed_range(self, word: int) -> tuple[int, int]:
        """Position and bytes."""
        word &= ~COMPRESSED
        return word & (1 << self._offset_bits) - 1, word >> self._offset_bits

    def _decode(self, key: int) -> bytes:
        if key < 0:
            raise self.file.corrupt(*fault_of(key))
        position, length = self._compressed_range(key)
        data = self.file.read(position, length, "a compressed cluster")
        try:
            return inflate(data, self.header.cluster_size)
        except ValueError as error:
            raise self.file.corrupt(position, f"a compressed cluster, {error}") from error


async def open_qcow(file: ImageFile, opening: Opening) -> Disk:
    """``file`` as a qcow image, the Disk owns it then.

    Raises:
        DiskError: it is broken or encrypted, or its backing file cannot be opened.
    """
    header = await opening.workers.look_up(read_header, file)
    backing = None
    if header.backing_file:
        backing = await opening.below(file, header.backing_file)
    return QcowDisk(opening.workers, file, header, backing)
