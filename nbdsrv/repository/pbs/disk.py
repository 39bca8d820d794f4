"""A disk of a snapshot, as every other Disk.

::

    guest    |  zeroes  | chunk 5 | chunk 6 |  zeroes  | ...      ``chunk_size`` each, mostly 4 MiB
    index    | zero     | digest  | digest  | zero     |          a page of them at a time
    runs     | hole     | BLOCK 5 | BLOCK 6 | hole     |
                            '-> one file: CRC, key, zstd, digest      threads, once

The digest of a chunk of zeroes is known, so holes cost nothing. Equal digests in two snapshots are
equal content: that is ``nbdsrv:changed-since:POINT``.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping

from nbdsrv.disk.workers import Workers
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.repository.comparing import CHANGED, UNCHANGED
from nbdsrv.repository.indexed_disk import IndexedDisk
from nbdsrv.repository.pbs.chunks import Chunks, zero_digest
from nbdsrv.repository.pbs.index import FixedIndex, others_than
from nbdsrv.repository.pbs.keys import CryptKey
from nbdsrv.repository.pbs.structs import DIGEST

__all__ = ["PbsDisk", "changes"]

PAGE_CHUNKS = 4096
"""Chunks translated at a time: 16 GiB, 128 KiB of index, half a millisecond."""
MAX_COMPARED = 1 << 18
"""Chunks compared for one answer, 1 TiB: some ten milliseconds. An answer may stop short."""
AT_ONCE = 256
"""Chunks compared at a time; 8 KiB of digests."""

OpenOther = Callable[[], FixedIndex]


class PbsDisk(IndexedDisk[FixedIndex]):
    """A disk of a snapshot, read-only."""

    format = "pbs"

    def __init__(
        self,
        workers: Workers,
        name: str,
        index: FixedIndex,
        chunks: Chunks,
        key: CryptKey | None,
        others: Mapping[str, OpenOther],
        facts: Mapping[str, object],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Use ``PbsRepository.open_disk``.

        Args:
            workers: for everything that blocks.
            name: for messages.
            index: open; becomes ours.
            chunks: of the datastore.
            key: of an encrypted disk, else None.
            others: what ``changed-since`` can compare with by point, from old to new; blocking.
            facts: for ``info``.
            release: called once, when it is closed.
        """
        super().__init__(workers, name, index, others, facts, release)
        self.page_span = PAGE_CHUNKS * index.chunk_size
        self._chunks = chunks
        self._key = key

    @property
    def facts(self) -> Mapping[str, object]:
        """What index and manifest say."""
        return {**self._facts, "chunk_size": self.index.chunk_size}

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        index, chunk = self.index, self.index.chunk_size
        first, count = offset // chunk, -(-length // chunk)
        raw = index.digests(first, count)
        last = count - 1
        at = 0
        for number in others_than(zero_digest(chunk, self._key), raw):
            size = index.length(first + number)
            if number == last and size < chunk and raw.endswith(zero_digest(size, self._key)):
                break
            if at < number * chunk:
                yield Segment(number * chunk - at, Kind.ABSENT)
            yield Segment(size, Kind.BLOCK, first + number)
            at = number * chunk + size
        if at < length:
            yield Segment(length - at, Kind.ABSENT)

    def _decode(self, key: int) -> bytes:
        digest = self.index.digests(key, 1)
        return self._chunks.read(digest, self.index.length(key), self._key)

    def _changes(self, theirs: FixedIndex, offset: int, length: int) -> list[tuple[int, int]]:
        return changes(self.index, theirs, offset, length)


def changes(
    mine: FixedIndex, theirs: FixedIndex, offset: int, length: int
) -> list[tuple[int, int]]:
    """(length, flags) from ``offset`` on: at least one, at most ``length`` bytes. Blocking.

    Chunks with equal digests are equal. Beyond the other disk's end all is changed.

    Raises:
        DiskError: an index cannot be read.
    """
    chunk = mine.chunk_size
    if theirs.chunk_size != chunk:
        return [(length, CHANGED)]
    end = offset + length
    first = offset // chunk
    stop = min(-(-end // chunk), first + MAX_COMPARED)
    found: list[tuple[int, int]] = []
    at = offset
    while first < stop:
        count = min(AT_ONCE, stop - first)
        ours = mine.digests(first, count)
        others = theirs.digests(first, max(0, min(count, theirs.count - first)))
        # What has not changed is mostly a whole lot of chunks.
        steps = (count,) if ours == others else range(1, count + 1)
        for number in steps:
            until = min((first + number) * chunk, end)
            here = slice((number - 1) * DIGEST, number * DIGEST)
            same = ours == others or ours[here] == others[here]
            if found and found[-1][1] == (not same):
                found[-1] = (found[-1][0] + until - at, found[-1][1])
            else:
                found.append((until - at, UNCHANGED if same else CHANGED))
            at = until
        first += count
    return found
