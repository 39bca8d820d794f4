"""Where a new image grows, and how often each of its clusters is referred to.

::

    file   | 0 |  1 | 2 ...          | 32767 | 32768 ...                       | next
           |<---- range 0: counts in memory --->|<---- range 1 ------------------> ...
                                             block of range 0, written when range 1 has begun

Space is only ever taken at the end, so a range that is behind ``next`` is complete: its counts are
written, into the cluster that comes next, and forgotten. Memory does not grow with the image, but
for the refcount table, eight bytes for 2 GiB.

Compressed clusters share: they are packed one behind the other, and each counts for every cluster
it touches.
"""

import sys
from array import array

from nbdsrv.formats.qcow2.writer_shape import Shape
from nbdsrv.formats.target_file import TargetFile

__all__ = ["Space", "big_endian", "from_big_endian"]

MAX_COUNT = 0xFFFF
"""Counts have 16 bits."""
_ONE = array("H", [1])


class Space:
    """Not thread-safe: its owner has a lock. Methods block."""

    def __init__(self, target: TargetFile, shape: Shape) -> None:
        self._target = target
        self._shape = shape
        self._bits = shape.cluster_bits
        self._size = shape.cluster_size
        self._per_block = self._size // 2
        self._next = 0
        self._open = 0
        """Where the next compressed cluster may go: behind the last one."""
        self._counts: dict[int, array[int]] = {}
        self._blocks = array("Q")

    @property
    def end(self) -> int:
        """Bytes of the file that are taken."""
        return self._next << self._bits

    def clusters(self, count: int) -> int:
        """Take ``count`` consecutive clusters; the position of the first."""
        first = self._next
        self._next += count
        self._fill(first, self._next)
        self._store_complete()
        return first << self._bits

    def packed(self, length: int) -> int:
        """Take ``length`` bytes for a compressed cluster, at most a cluster of them."""
        room = -self._open & (self._size - 1)
        position = self._open
        if room and self._counted(position >> self._bits) >= MAX_COUNT:
            room = 0
        if length > room:
            if not room or (position + room) >> self._bits != self._next:
                position, room = self._next << self._bits, 0
            self._next += -(-(length - room) >> self._bits)
        self._count(position >> self._bits, (position + length - 1 >> self._bits) + 1)
        self._open = position + length
        self._store_complete()
        return position

    def finish(self) -> tuple[int, int]:
        """Write all counts. Returns the refcount table's position and its clusters.

        Raises:
            UnsupportedImage: the table is larger than QEMU would read.
        """
        clusters = self._table_clusters()
        self._shape.check_refcounts(clusters, self._target.path)
        position = self.clusters(clusters)
        while len(self._blocks) * self._per_block < self._next:
            self._store_block()
        table = big_endian(self._blocks)
        self._target.store(position, table.ljust(clusters << self._bits, b"\0"))
        return position, clusters

    def _table_clusters(self) -> int:
        """Of the refcount table, which counts itself and the blocks yet to be written."""
        clusters = 1
        while True:
            total = self._next + clusters
            blocks = len(self._blocks)
            while blocks * self._per_block < total:
                blocks += 1
                total += 1
            needed = -(-blocks * 8 >> self._bits)
            if needed <= clusters:
                return clusters
            clusters = needed

    def _range(self, number: int) -> "array[int]":
        counts = self._counts.get(number)
        if counts is None:
            counts = self._counts[number] = array("H", bytes(self._size))
        return counts

    def _counted(self, cluster: int) -> int:
        number, index = divmod(cluster, self._per_block)
        return self._range(number)[index]

    def _count(self, begin: int, end: int) -> None:
        """One reference more to each of a few clusters."""
        for cluster in range(begin, end):
            number, index = divmod(cluster, self._per_block)
            self._range(number)[index] += 1

    def _fill(self, begin: int, end: int) -> None:
        """The first reference to each cluster."""
        while begin < end:
            number, index = divmod(begin, self._per_block)
            count = min(self._per_block - index, end - begin)
            self._range(number)[index : index + count] = _ONE * count
            begin += count

    def _store_complete(self) -> None:
        while (len(self._blocks) + 1) * self._per_block <= self._next:
            number = len(self._blocks)
            if (self._open >> self._bits) // self._per_block == number:
                self._open = 0  # nothing more goes in there
            self._store_block()

    def _store_block(self) -> None:
        number = len(self._blocks)
        cluster = self._next
        self._next += 1
        self._fill(cluster, self._next)
        self._blocks.append(cluster << self._bits)
        self._target.store(cluster << self._bits, big_endian(self._range(number)))
        del self._counts[number]


def big_endian(table: "array[int]") -> bytes:
    """As it goes into the file."""
    if sys.byteorder == "big":
        return table.tobytes()
    swapped = table[:]
    swapped.byteswap()
    return swapped.tobytes()


def from_big_endian(code: str, data: bytes) -> "array[int]":
    """``data`` of a file as an array of ``code``."""
    table = array(code, data)
    if sys.byteorder != "big":
        table.byteswap()
    return table
