"""L2 entries: what the words of a table say of the guest's clusters.

::

    words     | off 5 | off 6 | off 7 |  0  |  0  | ZERO | compressed | off 9 ! |
    Segments  |         DATA          | ABSENT    | ZERO |   BLOCK    |  fault  |

An entry is broken (``faults``) when it is unaligned, points outside the file or at one of the
image's own tables, has reserved bits set, contradicts the version or the features, or claims a
cluster as its own (COPIED: "the refcount is exactly one") that another entry of the same page
claims too (``claims``).
"""

import sys
from array import array
from collections.abc import Iterator

from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.qcow2.claims import Claim
from nbdsrv.formats.qcow2.faults import Fault, fault_key
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.structs import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    SECTOR,
    SUBCLUSTERS,
    ZERO_FLAG,
)

__all__ = ["Entries", "words_of"]

_DATA, _BLOCK, _ZERO, _ABSENT = (int(kind) for kind in Kind)
_NEVER = -1
"""No entry continues this one."""
_ALL_DATA = (1 << SUBCLUSTERS) - 1
_ALL_ZERO = _ALL_DATA << SUBCLUSTERS
_UNIFORM = {0: _ABSENT, _ALL_DATA: _DATA, _ALL_ZERO: _ZERO}


def words_of(table: bytes) -> "array[int]":
    """A table's 64-bit words."""
    words = array("Q", table)
    if sys.byteorder == "little":
        words.byteswap()
    return words


class Entries:
    """The rules for the entries of one image.

    Attributes:
        active: are these the current tables, in which COPIED is accurate?
    """

    def __init__(
        self,
        header: Header,
        file: ImageFile,
        data_file: ImageFile | None,
        *,
        active: bool,
    ) -> None:
        self.active = active
        self._file = file
        self._data_file = data_file
        self._extended = header.extended
        self._version = header.version
        self._cluster = header.cluster_size
        self._sector_bits = header.cluster_bits - 8
        self._offset_bits = 62 - self._sector_bits
        # An entry without any of these bits is a place in the file, and all is well with it.
        self._unusual = COMPRESSED | L2_RESERVED | ZERO_FLAG | self._cluster - 512
        if data_file is not None:
            self._unusual = -1

    def segments(
        self, table: bytes, position: int, guest: int, length: int, claims: list[Claim]
    ) -> list[Segment]:
        """What a piece of an L2 table says.

        Args:
            table: the piece.
            position: of the piece in the file.
            guest: offset of its first cluster in the disk.
            length: bytes of the disk; the last cluster may be cut short by the disk's end.
            claims: the ranges of the image file that hold guest data are added.
        """
        words = words_of(table)
        if not any(words):
            return [Segment(length, _ABSENT)]
        read = self._extended_runs if self._extended else self._standard_runs
        return list(read(words, position, guest, length, claims))

    def compressed_range(self, key: int) -> tuple[int, int]:
        """Position and most bytes of a compressed cluster; ``key`` is its descriptor."""
        position = key & ((1 << self._offset_bits) - 1)
        sectors = key >> self._offset_bits
        return position, (sectors + 1) * SECTOR - position % SECTOR

    # --- standard entries ----------------------------------------------------------------------

    def _standard_runs(
        self, words: "array[int]", position: int, guest: int, length: int, claims: list[Claim]
    ) -> Iterator[Segment]:
        cluster = self._cluster
        starts, firsts = [], []
        expected, step = _NEVER, 0
        for index, word in enumerate(words):
            if word == expected:
                expected += step
                continue
            starts.append(index)
            firsts.append(word)
            step = self._step(word)
            expected = _NEVER if step == _NEVER else word + step
        starts.append(len(words))
        unusual, size = self._unusual, self._file.size
        for number, word in enumerate(firsts):
            start = starts[number] * cluster
            span = min(starts[number + 1] * cluster, length) - start
            at = word & OFFSET_MASK
            if at and not word & unusual and at + span <= size:
                shared = not (self.active and word & COPIED)
                claims.append(Claim(at, at + span, shared))
                yield Segment(span, _DATA, at)
                continue
            where = position + starts[number] * 8
            if not word:
                yield Segment(span, _ABSENT)
            elif word & COMPRESSED:
                yield self._compressed(word, where, span)
            elif word & L2_RESERVED:
                yield Segment(span, _BLOCK, fault_key(where, Fault.RESERVED))
            elif word & ZERO_FLAG:
                yield self._zero(word, where, span)
            else:
                yield from self._data(word, where, guest + start, span, claims)

    def _step(self, word: int) -> int:
        """What the next entry has more if it goes on where this one ends."""
        if word & COMPRESSED:
            return _NEVER
        if word & OFFSET_MASK or (word & COPIED and self._data_file is not None):
            return self._cluster
        return 0 if word in {0, ZERO_FLAG} else _NEVER

    def _zero(self, word: int, where: int, span: int) -> Segment:
        if self._version < 3:
            return Segment(span, _BLOCK, fault_key(where, Fault.VERSION))
        if (word & OFFSET_MASK) % self._cluster:
            return Segment(span, _BLOCK, fault_key(where, Fault.UNALIGNED))
        return Segment(span, _ZERO)

    def _compressed(self, word: int, where: int, span: int) -> Segment:
        key = word & (COMPRESSED - 1)
        start = key & ((1 << self._offset_bits) - 1)
        fault = None
        if word & COPIED or start >> 56:
            fault = Fault.RESERVED
        elif self._data_file is not None:
            fault = Fault.DATA_FILE
        elif not self._cluster <= start < self._file.size:
            fault = Fault.OUTSIDE
        return Segment(span, _BLOCK, key if fault is None else fault_key(where, fault))

    def _data(
        self,
        word: int,
        where: int,
        guest: int,
        span: int,
        claims: list[Claim],
        entry_size: int = 8,
    ) -> Iterator[Segment]:
        """A run of clusters that follow each other in the file; what is beyond its end is not."""
        start = word & OFFSET_MASK
        file = self._data_file
        fault = None
        if start % self._cluster:
            fault = Fault.UNALIGNED
        elif file is not None:
            if start != guest:
                fault = Fault.DATA_FILE
        elif not start:
            fault = Fault.OUTSIDE
        if fault is not None:
            yield Segment(span, _BLOCK, fault_key(where, fault))
            return
        if file is None:
            claims.append(Claim(start, start + span, not (self.active and word & COPIED)))
        there = max(0, (file or self._file).size - start)
        if there < span:
            whole = there // self._cluster * self._cluster
            if whole:
                yield Segment(whole, _DATA, start, file)
            where += whole // self._cluster * entry_size
            yield Segment(span - whole, _BLOCK, fault_key(where, Fault.OUTSIDE))
            return
        yield Segment(span, _DATA, start, file)

    # --- extended entries ----------------------------------------------------------------------

    def _extended_runs(
        self, words: "array[int]", position: int, guest: int, length: int, claims: list[Claim]
    ) -> Iterator[Segment]:
        cluster = self._cluster
        starts = []
        expected, step, same = _NEVER, 0, 0
        for index in range(0, len(words), 2):
            word, bitmap = words[index], words[index + 1]
            if word == expected and bitmap == same:
                expected += step
                continue
            starts.append(index)
            step = self._step(word) if bitmap in _UNIFORM else _NEVER
            expected, same = (_NEVER if step == _NEVER else word + step), bitmap
        starts.append(len(words))
        for number, index in enumerate(starts[:-1]):
            start = index // 2 * cluster
            span = min(starts[number + 1] // 2 * cluster, length) - start
            where = position + index * 8
            word, bitmap = words[index], words[index + 1]
            fault = self._extended_fault(word, bitmap)
            if fault is not None:
                yield Segment(span, _BLOCK, fault_key(where, fault))
            elif word & COMPRESSED:
                yield self._compressed(word, where, span)
            elif bitmap not in _UNIFORM:
                yield from self._subclusters(word, bitmap, where, guest + start, span, claims)
            elif _UNIFORM[bitmap] == _DATA:
                yield from self._data(word, where, guest + start, span, claims, 16)
            else:
                yield Segment(span, _UNIFORM[bitmap])

    def _extended_fault(self, word: int, bitmap: int) -> Fault | None:
        if word & COMPRESSED:
            return Fault.SUBCLUSTERS if bitmap else None
        if word & (L2_RESERVED | ZERO_FLAG):
            return Fault.RESERVED
        if (word & OFFSET_MASK) % self._cluster:
            return Fault.UNALIGNED
        allocated = bitmap & _ALL_DATA
        if allocated & bitmap >> SUBCLUSTERS:
            return Fault.SUBCLUSTERS
        if allocated and not word & OFFSET_MASK and self._data_file is None:
            return Fault.SUBCLUSTERS
        return None

    def _subclusters(
        self, word: int, bitmap: int, where: int, guest: int, span: int, claims: list[Claim]
    ) -> Iterator[Segment]:
        """A cluster whose subclusters are not all alike."""
        size = self._cluster // SUBCLUSTERS
        start = word & OFFSET_MASK
        file = self._data_file
        # A cluster of zero and absent subclusters only has no place, in either file.
        placed = bool(start or bitmap & _ALL_DATA)
        if placed and file is not None and start != guest:
            yield Segment(span, _BLOCK, fault_key(where, Fault.DATA_FILE))
            return
        if placed and file is None:
            claims.append(Claim(start, start + span, not (self.active and word & COPIED)))
        limit = (file or self._file).size
        for at in range(0, span, size):
            length = min(size, span - at)
            if not bitmap & 1:
                yield Segment(length, _ZERO if bitmap >> SUBCLUSTERS & 1 else _ABSENT)
            elif start + at + length > limit:
                yield Segment(length, _BLOCK, fault_key(where, Fault.OUTSIDE))
            else:
                yield Segment(length, _DATA, start + at, file)
            bitmap >>= 1
