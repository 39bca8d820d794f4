"""A disk in casync's chunks, as every other Disk.

::

    guest    |      page      |      page      | ...
    chunks   |c0 | c1 |zero|  c3   |c4| c5 | ...     of any length: the index is searched for them
    blocks   |  0|   2|hole| 6 | 7 |...              twice the number; odd: the rest of a chunk that
                           '---'---' one file        began in the page before

A chunk of zeroes of the largest size, which is what casync makes of a hole, is known by its id.
``nbdsrv:changed-since:POINT`` calls unchanged what lies in the same chunk at the same place.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.repository.casync.index import MAX_SPREAD, BlobIndex, Item, chunk_id
from nbdsrv.repository.casync.stores import ChunkStores
from nbdsrv.repository.casync.structs import ITEM
from nbdsrv.repository.comparing import CHANGED, UNCHANGED
from nbdsrv.repository.indexed_disk import IndexedDisk

__all__ = ["CasyncDisk", "Zeroes", "changes", "page_span"]

PAGE_CHUNKS = 2048
"""Chunks translated at a time, on average: 80 KiB of index, a millisecond."""
MAX_COMPARED = 64
"""Blocks of chunks compared for one answer: some ten milliseconds. An answer may stop short."""

OpenOther = Callable[[], BlobIndex]


def page_span(index: BlobIndex) -> int:
    """Bytes of the disk in a page: no chunk is longer, and no page has too many of them."""
    wanted = max(index.max_size, PAGE_CHUNKS * index.avg_size)
    return max(index.max_size, min(wanted, MAX_SPREAD * index.min_size))


@lru_cache(maxsize=64)
def _zero_id(digest: str, length: int) -> bytes:
    return chunk_id(digest, bytes(length))


class Zeroes:
    """Which chunks of an index are known to hold zeroes: of the largest size, or the last."""

    def __init__(self, index: BlobIndex) -> None:
        """Hashes up to two chunks."""
        lengths = {index.max_size}
        if index.count:
            with suppress(CorruptImage):  # whoever reads there is told
                _, start, end, _ = index.item(index.count - 1)
                lengths.add(end - start)
        self._known = {(length, _zero_id(index.digest, length)) for length in lengths}
        self._max_size = index.max_size
        self.id = _zero_id(index.digest, index.max_size)
        """Of the largest chunk."""

    def has(self, item: Item) -> bool:
        """Is it one of them, or several in a row?"""
        _, start, end, id_ = item
        if id_ == self.id and end - start > self._max_size:
            return True  # ``BlobIndex.items`` makes such of the largest ones only
        return (end - start, id_) in self._known


class CasyncDisk(IndexedDisk[BlobIndex]):
    """A disk, read-only."""

    format = "casync"

    def __init__(
        self,
        workers: Workers,
        name: str,
        index: BlobIndex,
        zeroes: Zeroes,
        stores: ChunkStores,
        others: Mapping[str, OpenOther],
        facts: Mapping[str, object],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Use ``CasyncRepository.open_disk``.

        Args:
            workers: for everything that blocks.
            name: for messages.
            index: open; becomes ours.
            zeroes: of the index.
            stores: where its chunks are.
            others: what ``changed-since`` can compare with by point, from old to new; blocking.
            facts: for ``info``.
            release: called once, when it is closed.
        """
        super().__init__(workers, name, index, others, facts, release)
        self.page_span = page_span(index)
        self._zeroes = zeroes
        self._stores = stores

    @property
    def facts(self) -> Mapping[str, object]:
        """What the index says."""
        index = self.index
        return {
            **self._facts,
            "chunk_size_min": index.min_size,
            "chunk_size_max": index.max_size,
            "stores": [place.name for place in self._stores.places],
        }

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        at, end = offset, offset + length
        for item in self.index.items(offset, end, self._zeroes.id):
            number, start, stop, _ = item
            stop = min(stop, end)
            if self._zeroes.has(item):
                yield Segment(stop - at, Kind.ABSENT)
            else:
                yield Segment(stop - at, Kind.BLOCK, 2 * number + (start < offset))
            at = stop

    def _decode(self, key: int) -> bytes:
        number, rest = divmod(key, 2)
        _, start, end, id_ = self.index.item(number)
        data, _ = self._stores.read(id_, end - start)
        if not rest:
            return data
        return data[(start // self.page_span + 1) * self.page_span - start :]

    def _changes(self, theirs: BlobIndex, offset: int, length: int) -> list[tuple[int, int]]:
        return changes(self.index, theirs, offset, length)


def changes(mine: BlobIndex, theirs: BlobIndex, offset: int, length: int) -> list[tuple[int, int]]:
    """(length, flags) from ``offset`` on: at least one, at most ``length`` bytes. Blocking.

    The same chunk at the same place is equal. Beyond the other disk's end all is changed.

    Raises:
        DiskError: an index cannot be read.
    """
    found: list[tuple[int, int]] = []
    if not length:
        return found
    at, end = offset, offset + length
    if mine.digest != theirs.digest:
        return [(length, CHANGED)]
    number = mine.find(at)
    for _ in range(MAX_COMPARED):
        block = mine.block(number)
        number += len(block[1]) // ITEM.size
        for until, flag in _compared(mine, theirs, number, block, at):
            until = min(until, end)  # noqa: PLW2901
            if until <= at:
                break
            if found and found[-1][1] == flag:
                found[-1] = (found[-1][0] + until - at, flag)
            else:
                found.append((until - at, flag))
            at = until
        if at >= end:
            break
    return found


def _compared(
    mine: BlobIndex, theirs: BlobIndex, behind: int, block: tuple[int, bytes], at: int
) -> Iterator[tuple[int, int]]:
    """(end, flag) of the chunks of a block of ours, ``behind`` being the number after it."""
    first = behind - len(block[1]) // ITEM.size
    stop = ITEM.unpack_from(block[1], len(block[1]) - ITEM.size)[0]
    others: dict[int, Item] = {}
    if at < theirs.size:
        place = theirs.find(at)
        if theirs.block(place) == block and at < stop <= mine.size:
            yield stop, UNCHANGED  # what has not changed is mostly a whole lot of chunks
            return
        upto = min(max(stop, at + 1), theirs.size)
        others = {item[1]: item for item in theirs.items(at, upto)}
    for item in mine.parse(first, *block):
        other = others.get(item[1])
        same = other is not None and other[1:] == item[1:]
        yield item[2], UNCHANGED if same else CHANGED
