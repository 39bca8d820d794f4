"""A blob index, read where it lies: which chunk holds which bytes.

::

    items    | end 0, id | end 1, id | ... | 1024 of them |  ...  | end n, id | tail
                                            ^ last end of each block: what is searched first

A disk of 1 TiB in chunks of 64 KiB has 640 MiB of index. Nothing of it is kept but the ends of the
blocks a search came by.

The format has no checksum of an index. What can be seen is that chunks follow each other and have
sizes that the header allows; and a wrong id leads to no chunk, or to one of another length.
"""

import hashlib
import re
from collections.abc import Iterator

from construct import ConstructError

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.repository.casync.structs import (
    DIGEST,
    HEADER,
    ITEM,
    SHA512_256,
    TABLE_AT,
    TAIL,
    IndexHead,
    TableTail,
)
from nbdsrv.store.tree import Tree

__all__ = ["MAX_CHUNK", "BlobIndex", "Item", "chunk_id"]

BLOCK = 1024
"""Items read at a time: 40 KiB."""
MAX_CHUNK = 64 << 20
"""Bytes; casync's default is 256 KiB at most."""
MAX_SPREAD = 1 << 16
"""How many of the smallest chunks may take the place of the largest one: what a page may hold."""
MAX_SIZE = 1 << 62
"""Bytes of a disk; so that no sum overflows."""
MAX_KNOWN = 1 << 16
"""Ends of blocks that are remembered."""

Item = tuple[int, int, int, bytes]
"""Number, start and end on the disk, id."""


def chunk_id(digest: str, data: bytes) -> bytes:
    """The id of a chunk with that content. ``digest``: as ``BlobIndex.digest``."""
    if digest == "sha256":
        return hashlib.sha256(data).digest()
    return hashlib.new("sha512_256", data).digest()


class BlobIndex:
    """An open index. Its methods block; any thread may call them.

    Attributes:
        path: for messages.
        size: of the disk, bytes.
        count: chunks.
        min_size, avg_size, max_size: of chunks, as the header says; only the last may be smaller.
        digest: ``sha512-256`` or ``sha256``.
    """

    def __init__(self, tree: Tree, path: str, length: int) -> None:
        """Open and check head and tail.

        Args:
            tree: where it lies.
            path: in it.
            length: of the file, bytes; for trees that are no directory of this host.

        Raises:
            CorruptImage: it is no index, or was cut short.
            UnsupportedImage: its chunks are too large.
            StoreError: it cannot be read; ``ObjectMissing`` if there is none.
        """
        self.path = tree.full(path)
        self._tree = tree
        self._path = path
        self._known: dict[int, int] = {}
        fd = tree.open_file(path)
        self._file = ImageFile.from_descriptor(self.path, fd) if fd is not None else None
        try:
            self._read_ends(self._file.size if self._file else length)
        except BaseException:
            self.close()
            raise

    def _read_ends(self, length: int) -> None:
        if length < HEADER + TAIL:
            raise self.corrupt(0, f"{length} bytes are no index, was it cut short?")
        try:
            head = IndexHead.parse(self._read(0, HEADER))
        except ConstructError as error:
            raise self.corrupt(0, "no index of casync") from error
        try:
            tail = TableTail.parse(self._read(length - TAIL, TAIL))
        except ConstructError as error:
            raise self.corrupt(length - TAIL, "its table has no end, was it cut short?") from error
        self.count, odd = divmod(length - HEADER - TAIL, ITEM.size)
        if odd or tail.size != length - TABLE_AT:
            what = f"a table of {tail.size} bytes in a file of {length}"
            raise self.corrupt(length - 16, what)
        self.min_size: int = head.chunk_size_min
        self.avg_size: int = head.chunk_size_avg
        self.max_size: int = head.chunk_size_max
        self.digest = "sha512-256" if head.feature_flags & SHA512_256 else "sha256"
        if not 1 <= self.min_size <= self.avg_size <= self.max_size:
            raise self.corrupt(24, f"chunks of {self.min_size} to {self.max_size} bytes")
        if self.max_size > MAX_CHUNK or self.max_size > self.min_size * MAX_SPREAD:
            text = f"{self.path}: chunks of {self.min_size} to {self.max_size} bytes are not served"
            raise UnsupportedImage(f"{text}, only of up to {MAX_CHUNK}")
        self.size = self._end(self.count - 1) if self.count else 0
        if not self.count <= self.size <= MAX_SIZE and self.count:
            raise self.corrupt(length - TAIL - ITEM.size, f"a disk of {self.size} bytes")

    def item(self, number: int) -> Item:
        """One item.

        Raises:
            CorruptImage: it does not follow the one before.
        """
        start, raw = self.block(number, 1)
        return next(self.parse(number, start, raw))

    def items(self, offset: int, end: int, zero: bytes = b"") -> Iterator[Item]:
        """Those that hold the bytes [offset, end), which are within the disk and at least one.

        Args:
            offset: bytes.
            end: bytes.
            zero: id of a chunk of the largest size; many of it in a row are told as one item.

        Raises:
            CorruptImage: they do not follow each other.
        """
        number = self.find(offset)
        while number < self.count:
            start, raw = self.block(number)
            for item in self.parse(number, start, raw, zero):
                yield item
                if item[2] >= end:
                    return
            number += len(raw) // ITEM.size
        raise self.corrupt(HEADER, f"its chunks end before {end}")

    def block(self, number: int, count: int = 0) -> tuple[int, bytes]:
        """Where an item begins on the disk, and it and some after it as they lie in the file."""
        before = min(number, 1)  # the one before says where the first begins
        count = min(count or BLOCK, self.count - number) + before
        raw = self._read(HEADER + (number - before) * ITEM.size, count * ITEM.size)
        if not before:
            return 0, raw
        return int.from_bytes(raw[: ITEM.size - DIGEST], "little"), raw[ITEM.size :]

    def parse(self, number: int, start: int, raw: bytes, zero: bytes = b"") -> Iterator[Item]:
        """The items of a block, proven to follow each other; ``zero``: as for ``items``."""
        many = re.compile(b"(?s)(?:.{8}" + re.escape(zero) + b")+") if zero else None
        at = 0
        while at < len(raw):
            end, id_ = ITEM.unpack_from(raw, at)
            count = 1
            # Most of a sparse disk is the same chunk: found at the speed of C.
            if many is not None and id_ == zero and (run := many.match(raw, at)):
                last = int.from_bytes(raw[run.end() - ITEM.size : run.end() - DIGEST], "little")
                if last - start == (run.end() - at) // ITEM.size * self.max_size:
                    count, end = (run.end() - at) // ITEM.size, last
            if count == 1:
                self._check(number, start, end)
            yield number, start, end, id_
            start = end
            at += count * ITEM.size
            number += count

    def _check(self, number: int, start: int, end: int) -> None:
        length = end - start
        smallest = 1 if number == self.count - 1 else self.min_size
        if not smallest <= length <= self.max_size or end > self.size:
            what = f"chunk {number} from {start} to {end} of a disk of {self.size} bytes"
            raise self.corrupt(HEADER + number * ITEM.size, what)

    def find(self, offset: int) -> int:
        """The number of the item that holds a byte of the disk.

        Raises:
            CorruptImage: the items do not follow each other.
        """
        low, high = 0, (self.count - 1) // BLOCK
        while low < high:
            middle = (low + high) // 2
            if self._last_end(middle) > offset:
                high = middle
            else:
                low = middle + 1
        number = low * BLOCK
        start, raw = self.block(number)
        if start <= offset:
            for end, _ in ITEM.iter_unpack(raw):
                if end > offset and start <= offset:
                    return number
                start = end
                number += 1
        raise self.corrupt(HEADER + low * BLOCK * ITEM.size, "its chunks are not in order")

    def _last_end(self, block: int) -> int:
        end = self._known.get(block)
        if end is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            end = self._known[block] = self._end(min((block + 1) * BLOCK, self.count) - 1)
        return end

    def _end(self, number: int) -> int:
        raw = self._read(HEADER + number * ITEM.size, ITEM.size - DIGEST)
        return int.from_bytes(raw, "little")

    def _read(self, position: int, length: int) -> bytes:
        if self._file is not None:
            return self._file.read(position, length, "the index")
        return self._tree.read_range(self._path, position, length)

    def corrupt(self, position: int, what: str) -> CorruptImage:
        """The error to raise."""
        return CorruptImage(f"corrupt repository: {self.path} at {position}: {what}")

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
