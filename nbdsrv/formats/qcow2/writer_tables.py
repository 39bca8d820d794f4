"""The L1 and L2 tables of an image being written in any order.

::

    guest cluster ── L1[number of table] ──> L2[number in table] = COPIED | position
                                                                 = COMPRESSED | sectors | position
                                                                 = ZERO, or 0: not there

Tables are made when something is entered into them. The ones used last stay in memory, the others
are in the file and come back when they are needed again, which in an ordered copy they are not.
"""

import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from nbdsrv.errors import DiskError
from nbdsrv.formats.qcow2.structs import COMPRESSED, COPIED, SECTOR, ZERO_FLAG
from nbdsrv.formats.qcow2.writer_shape import Places, Shape, encode_header
from nbdsrv.formats.qcow2.writer_space import Space, big_endian, from_big_endian
from nbdsrv.formats.target_file import TargetFile

__all__ = ["Tables"]

MAX_TABLE_BYTES = 32 << 20
"""L2 tables kept in memory: 512 of 64 KiB, which is 256 GiB of the disk."""


class Tables:
    """Thread-safe, under one lock; what it calls a cluster is a number, counted from 0.

    Attributes:
        size: of the disk, bytes.
    """

    def __init__(self, target: TargetFile, shape: Shape, size: int) -> None:
        """Raises UnsupportedImage for a disk that is too large. Blocks."""
        self.size = size
        self._target = target
        self._shape = shape
        self._lock = threading.Lock()
        self._space = Space(target, shape)
        self._l1 = array("Q", bytes(8 * shape.l1_size(size, target.path)))
        self._l2: OrderedDict[int, array[int]] = OrderedDict()
        self._space.clusters(1)  # the header
        self._l1_position = self._space.clusters(shape.clusters(len(self._l1) * 8))

    def take(self, cluster: int, count: int) -> Sequence[tuple[int, int, int]]:
        """Give clusters their places, stored as they are: (cluster, count, position) pieces."""
        with self._lock:
            return [
                (first, number, self._take(table, index, number))
                for first, number, table, index in self._pieces(cluster, count)
            ]

    def _take(self, table: "array[int]", index: int, count: int) -> int:
        position = self._space.clusters(count)
        step, begin = self._shape.cluster_size, position | COPIED
        entries = range(begin, begin + count * step, step)
        table[index : index + count] = array("Q", entries)
        return position

    def pack(self, clusters: Sequence[tuple[int, int]]) -> Sequence[int]:
        """Give compressed clusters (cluster, bytes) their places, in this order."""
        positions = []
        shift = 62 - (self._shape.cluster_bits - 8)
        with self._lock:
            for cluster, length in clusters:
                _, _, table, index = next(self._pieces(cluster, 1))
                position = self._space.packed(length)
                more = (position + length - 1) // SECTOR - position // SECTOR
                table[index] = COMPRESSED | more << shift | position
                positions.append(position)
        return positions

    def zero(self, cluster: int, count: int) -> None:
        """These clusters read as zeroes, whatever lies below."""
        with self._lock:
            for _, number, table, index in self._pieces(cluster, count):
                table[index : index + number] = array("Q", [ZERO_FLAG]) * number

    def entry(self, cluster: int) -> int:
        """The L2 entry as it is now."""
        with self._lock:
            if not self._l1[cluster >> self._shape.l2_bits]:
                return 0
            _, _, table, index = next(self._pieces(cluster, 1))
            return table[index]

    def finish(self) -> None:
        """Write all tables, then the header: from here on it is an image."""
        with self._lock:
            for number, table in self._l2.items():
                self._target.store(self._l1[number], big_endian(table))
            self._l2.clear()
            entries = array("Q", (entry and entry | COPIED for entry in self._l1))
            self._target.store(self._l1_position, big_endian(entries))
            position, clusters = self._space.finish()
            self._target.resize(self._space.end)
            places = Places(self.size, len(self._l1), self._l1_position, position, clusters)
            self._target.store(0, encode_header(self._shape, places))

    def _pieces(self, cluster: int, count: int) -> Iterator[tuple[int, int, "array[int]", int]]:
        """(cluster, count, table, index) within one L2 table each."""
        bits = self._shape.l2_bits
        while count:
            index = cluster & ((1 << bits) - 1)
            number = min(count, (1 << bits) - index)
            yield cluster, number, self._table(cluster >> bits), index
            cluster += number
            count -= number

    def _table(self, number: int) -> "array[int]":
        table = self._l2.get(number)
        if table is not None:
            self._l2.move_to_end(number)
            return table
        position = self._l1[number]
        if position:
            table = self._read_back(position)
        else:
            self._l1[number] = self._space.clusters(1)
            table = array("Q", bytes(self._shape.cluster_size))
        self._l2[number] = table
        while len(self._l2) > max(MAX_TABLE_BYTES >> self._shape.cluster_bits, 1):
            oldest, evicted = self._l2.popitem(last=False)
            self._target.store(self._l1[oldest], big_endian(evicted))
        return table

    def _read_back(self, position: int) -> "array[int]":
        try:
            data = os.pread(self._target.fd, self._shape.cluster_size, position)
        except OSError as error:
            raise DiskError.from_os(f"reading {self._target.path}", error) from error
        if len(data) != self._shape.cluster_size:
            raise DiskError(f"{self._target.path} has become shorter while it was written")
        return from_big_endian("Q", data)
