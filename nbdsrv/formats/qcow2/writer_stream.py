"""A qcow2 image that is written from front to back without ever seeking: into a pipe.

::

    | header | refcount table | refcount blocks | L1 | L2 ... L2 | data ........ |
    every cluster has one reference; the first cluster of data is where the tables end

What will be data is known beforehand. Clusters that were promised and do not come are zeroes.
"""

from array import array
from collections.abc import Callable, Iterator

from nbdsrv.formats.qcow2.structs import COPIED
from nbdsrv.formats.qcow2.writer_shape import Places, Shape, encode_header
from nbdsrv.formats.qcow2.writer_space import big_endian
from nbdsrv.formats.target_file import TargetFile

__all__ = ["Stream"]

ZEROES = bytes(1 << 20)
"""Written where promised data turns out to be zeroes."""

Ranges = Callable[[], Iterator[tuple[int, int]]]


class Stream:
    """All methods block; one call at a time."""

    def __init__(self, target: TargetFile, shape: Shape, size: int) -> None:
        """Raises UnsupportedImage for a disk that is too large."""
        self._target = target
        self._shape = shape
        self._size = size
        self._l1_size = shape.l1_size(size, target.path)
        self._promised: Iterator[tuple[int, int]] = iter(())
        self._cluster = self._left = 0
        """The promised cluster that comes next, and how many follow each other with it."""

    def begin(self, ranges: Ranges) -> None:
        """Write header and tables; ``ranges`` is what ``data`` will be called for at most."""
        tables, clusters = self._measure(ranges)
        l1_clusters = self._shape.clusters(self._l1_size * 8)
        counts, blocks = self._count(1 + l1_clusters + tables + clusters)
        l1_at = 1 + counts + blocks
        bits = self._shape.cluster_bits
        places = Places(self._size, self._l1_size, l1_at << bits, 1 << bits, counts)
        self._target.append(encode_header(self._shape, places))
        self._append_counts(counts, blocks, l1_at + l1_clusters + tables + clusters)
        self._append_l1(ranges, l1_at + l1_clusters)
        self._append_l2(ranges, l1_at + l1_clusters + tables)
        self._promised = self._clusters(ranges)

    def data(self, offset: int, data: memoryview) -> None:
        """The next piece; what was promised before it and has not come is zeroes."""
        cluster = offset >> self._shape.cluster_bits
        count = self._shape.clusters(len(data))
        self._skip_to(cluster)
        self._target.append(data, bytes((count << self._shape.cluster_bits) - len(data)))
        while count:
            assert self._left, f"data at {offset} was not planned"
            taken = min(count, self._left)
            self._advance(taken)
            count -= taken

    def finish(self) -> None:
        """Write what was promised and has not come."""
        self._skip_to(None)

    def _skip_to(self, cluster: int | None) -> None:
        """Zeroes for promised clusters up to ``cluster``, or to the end."""
        while True:
            if not self._left:
                self._cluster, self._left = next(self._promised, (0, 0))
                if not self._left:
                    return
            left = self._left
            if cluster is not None:
                left = min(left, cluster - self._cluster)
                if left <= 0:
                    return
            self._append_zeroes(left << self._shape.cluster_bits)
            self._advance(left)

    def _advance(self, count: int) -> None:
        self._cluster += count
        self._left -= count
        if not self._left:
            self._cluster, self._left = next(self._promised, (0, 0))

    def _append_zeroes(self, length: int) -> None:
        while length:
            part = min(length, len(ZEROES))
            self._target.append(memoryview(ZEROES)[:part])
            length -= part

    # --- tables --------------------------------------------------------------------------------

    def _clusters(self, ranges: Ranges) -> Iterator[tuple[int, int]]:
        """(cluster, count) of what is planned, ascending, within one L2 table each."""
        bits, table = self._shape.cluster_bits, 1 << self._shape.l2_bits
        at = 0
        for offset, length in ranges():
            at = max(at, offset >> bits)
            end = offset + length - 1 >> bits
            while at <= end:
                upto = min(end + 1, (at // table + 1) * table)
                yield at, upto - at
                at = upto

    def _measure(self, ranges: Ranges) -> tuple[int, int]:
        """L2 tables and data clusters."""
        tables = clusters = 0
        last = -1
        for cluster, count in self._clusters(ranges):
            number = cluster >> self._shape.l2_bits
            tables += number != last
            last = number
            clusters += count
        return tables, clusters

    def _count(self, others: int) -> tuple[int, int]:
        """Clusters of the refcount table, and refcount blocks, which count themselves too."""
        counts = blocks = 1
        while True:
            needed = -(-(others + counts + blocks) // (self._shape.cluster_size // 2))
            clusters = self._shape.clusters(needed * 8)
            if needed <= blocks and clusters <= counts:
                self._shape.check_refcounts(counts, self._target.path)
                return counts, blocks
            blocks, counts = max(blocks, needed), max(counts, clusters)

    def _append_counts(self, counts: int, blocks: int, total: int) -> None:
        size, bits = self._shape.cluster_size, self._shape.cluster_bits
        table = array("Q", range(1 + counts << bits, 1 + counts + blocks << bits, size))
        self._target.append(big_endian(table).ljust(counts << bits, b"\0"))
        per_block = size // 2
        one = (1).to_bytes(2, "big")
        for block in range(blocks):
            used = max(0, min(per_block, total - block * per_block))
            self._target.append((one * used).ljust(size, b"\0"))

    def _append_l1(self, ranges: Ranges, first: int) -> None:
        bits = self._shape.cluster_bits
        entries = array("Q", bytes(self._l1_size * 8))
        position = first << bits
        for cluster, _ in self._clusters(ranges):
            number = cluster >> self._shape.l2_bits
            if not entries[number]:
                entries[number] = position | COPIED
                position += self._shape.cluster_size
        length = self._shape.clusters(len(entries) * 8) << bits
        self._target.append(big_endian(entries).ljust(length, b"\0"))

    def _append_l2(self, ranges: Ranges, first: int) -> None:
        bits, size = self._shape.cluster_bits, self._shape.cluster_size
        empty = array("Q", bytes(size))
        table, last = empty[:], -1
        position = first << bits
        for cluster, count in self._clusters(ranges):
            number, index = cluster >> self._shape.l2_bits, cluster & (len(empty) - 1)
            if number != last and last >= 0:
                self._target.append(big_endian(table))
                table = empty[:]
            last = number
            begin = position | COPIED
            table[index : index + count] = array("Q", range(begin, begin + count * size, size))
            position += count * size
        if last >= 0:
            self._target.append(big_endian(table))
