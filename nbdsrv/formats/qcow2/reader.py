"""qcow2 images: from guest offsets to host offsets through L1 and L2.

::

    guest offset   | L1 index | L2 index | within the cluster |
                        |          |
                   L1 [ ... ]      |                 one pread per page
                        '--> L2 [ ... ]              one pread per table of the page
                                   '--> Segment      ``Entries``, in one place

A page is ``PAGE_ENTRIES`` clusters: a part of an L2 table, or several tables where clusters are
small. The L1 table stays in the file (it may be 32 MiB, and the page cache has what is used).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.qcow2.bitmaps import Bitmap, dirty_extents
from nbdsrv.formats.qcow2.claims import Claim, conflicts, without_conflicts
from nbdsrv.formats.qcow2.compression import decompressor
from nbdsrv.formats.qcow2.entries import Entries, words_of
from nbdsrv.formats.qcow2.facts import describe
from nbdsrv.formats.qcow2.faults import Fault, fault_key, fault_of
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.snapshots import Snapshot
from nbdsrv.formats.qcow2.structs import L1_RESERVED, OFFSET_MASK
from nbdsrv.formats.qcow2.thin import without_holes
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import ExtentList
from protocol.terms import BlockSizes

__all__ = ["Layers", "Qcow2Disk"]

PAGE_ENTRIES = 2048
"""Clusters in a page: 128 MiB of 64 KiB clusters; some 2 ms when each is somewhere else."""
MAX_PAGES = 1 << 15
"""Pages of a disk, beyond which they are made larger: walking through a page that has nothing
takes some 20 us."""
MAX_PAGE_ENTRIES = 8192
EXTENDED_PAGE_ENTRIES = 512
"""Likewise where each may have 32 subclusters."""
QUICK = 1 << 16
"""Bytes of a cluster that unpacks within a tenth of a millisecond."""
MAX_PREFERRED = 1 << 16
"""Bytes; larger clusters are not read as a whole."""

_ABSENT, _BLOCK = int(Kind.ABSENT), int(Kind.BLOCK)


@dataclass(frozen=True, slots=True)
class Layers:
    """What an image turned out to be made of.

    Attributes:
        snapshots: all of them.
        snapshot: the one that is to be read, None for the current state.
        bitmaps: all of them, usable or not.
        thin: may clusters be holes in their file? See ``thin``; not asked for when writing.
    """

    file: ImageFile
    header: Header
    data_file: ImageFile | None
    backing: Disk | None
    snapshots: tuple[Snapshot, ...]
    snapshot: Snapshot | None
    bitmaps: tuple[Bitmap, ...]
    thin: bool = False


def page_span(size: int, header: Header) -> int:
    """Bytes of the disk in a page."""
    if header.extended:
        return EXTENDED_PAGE_ENTRIES << header.cluster_bits
    entries = PAGE_ENTRIES
    while size >> header.cluster_bits > entries * MAX_PAGES and entries < MAX_PAGE_ENTRIES:
        entries *= 2
    return entries << header.cluster_bits


class Qcow2Disk(MappedDisk):
    """A qcow2 image, or one of its internal snapshots."""

    format = "qcow2"

    def __init__(self, workers: Workers, layers: Layers) -> None:
        """Becomes the owner of the files and the backing Disk."""
        super().__init__(workers, layers.file, layers.backing)
        header, snapshot = layers.header, layers.snapshot
        self.header = header
        self.size = header.size if snapshot is None else snapshot.disk_size
        self.block_sizes = BlockSizes(preferred=min(max(header.cluster_size, 512), MAX_PREFERRED))
        self.page_span = page_span(self.size, header)
        self._layers = layers
        self._data_file = layers.data_file
        if layers.data_file is not None:
            self.further_files = (layers.data_file.path,)
        self._l1_position = (snapshot or header).l1_table_offset
        self._entries = Entries(header, layers.file, layers.data_file, active=snapshot is None)
        self._decompress = decompressor(header.compression_type)
        usable = () if snapshot else tuple(b for b in layers.bitmaps if b.usable)
        self._bitmaps = {bitmap.context: bitmap for bitmap in usable}
        self.contexts = (ALLOCATION, ALLOCATION_DEPTH, *self._bitmaps)

    @property
    def facts(self) -> Mapping[str, object]:
        """Version, clusters, features, chain, snapshots and bitmaps."""
        layers = self._layers
        return describe(layers.header, layers.snapshots, layers.bitmaps, layers.snapshot)

    # --- the tables, in threads ----------------------------------------------------------------

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        header = self.header
        table_bits = header.cluster_bits + header.l2_bits
        first = offset >> table_bits
        count = (offset + length - 1 >> table_bits) - first + 1
        l1_at = self._l1_position + first * 8
        raw = self._read_metadata(l1_at, count * 8, "the L1 table")
        if not any(raw):
            return (Segment(length, _ABSENT),)
        segments: list[Segment] = []
        claims = self._table_claims()
        for index, word in enumerate(words_of(raw)):
            begin = max(first + index << table_bits, offset)
            span = min(first + index + 1 << table_bits, offset + length) - begin
            segments += self._read_table(word, l1_at + index * 8, begin, span, claims)
        doubtful = conflicts(claims)
        if doubtful:
            return without_conflicts(segments, doubtful, header.cluster_size)
        return without_holes(self.file, segments) if self._layers.thin else segments

    def _read_table(
        self, word: int, l1_at: int, offset: int, length: int, claims: list[Claim]
    ) -> Iterable[Segment]:
        """The part of the L2 table behind the L1 entry ``word`` that is about this range."""
        if not word:
            return (Segment(length, _ABSENT),)
        header = self.header
        table = word & OFFSET_MASK
        index = offset >> header.cluster_bits & (1 << header.l2_bits) - 1
        position = table + index * header.entry_size
        size = -(-length >> header.cluster_bits) * header.entry_size
        fault = None
        if word & L1_RESERVED:
            fault = Fault.L1_RESERVED
        elif not header.is_aligned(table):
            fault = Fault.L1_UNALIGNED
        elif table < header.cluster_size or position + size > self.file.size:
            fault = Fault.L1_OUTSIDE
        if fault is not None:
            return (Segment(length, _BLOCK, fault_key(l1_at, fault)),)
        claims.append(Claim(table, table + header.cluster_size))
        raw = self._read_metadata(position, size, "an L2 table")
        return self._entries.segments(raw, position, offset, length, claims)

    def _read_metadata(self, position: int, length: int, what: str) -> bytes:
        """A part of an L1 or L2 table, as it is now."""
        return self.file.read(position, length, what)

    def _table_claims(self) -> list[Claim]:
        """Where the tables that the header tells of lie."""
        header = self.header
        l1_end = header.l1_table_offset + header.l1_size * 8
        refcounts = header.refcount_table_offset
        refcounts_end = refcounts + (header.refcount_table_clusters << header.cluster_bits)
        claims = [Claim(header.l1_table_offset, l1_end), Claim(refcounts, refcounts_end)]
        snapshot = self._layers.snapshot
        if snapshot is not None:
            start = snapshot.l1_table_offset
            claims.append(Claim(start, start + snapshot.l1_size * 8))
        return claims

    def _decode(self, key: int) -> bytes:
        """A compressed cluster, or the fault that a broken entry is."""
        if key < 0:
            raise self.file.corrupt(*fault_of(key))
        position, length = self._entries.compressed_range(key)
        data = self.file.read_up_to(position, length)
        try:
            return self._decompress(data, self.header.cluster_size)
        except ValueError as error:
            raise self.file.corrupt(position, f"a compressed cluster, {error}") from error

    def _packed(self, key: int) -> tuple[int, int] | None:
        quick = key >= 0 and self.header.cluster_size <= QUICK
        return self._entries.compressed_range(key) if quick else None

    def _close_files(self) -> None:
        self.file.close()
        if self._data_file is not None:
            self._data_file.close()

    # --- block status --------------------------------------------------------------------------

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Also ``qemu:dirty-bitmap:NAME``: 1 where the bitmap says dirty."""
        bitmap = self._bitmaps.get(context)
        if bitmap is None:
            return await super().status(context, offset, length)
        self._check(offset, length)
        found = await self.workers.look_up(
            dirty_extents, self.file, bitmap, self.header.cluster_size, offset, length
        )
        return ExtentList(offset, found)
