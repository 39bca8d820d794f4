"""A version of Benji's, read as a disk.

::

    guest    | block 0 | block 1 | block 2 | ...        4 MiB each
    map      |  uid    |   --    |  uid    |            in memory, 48 bytes a block
    runs     |BlockRun |ZeroRun  |BlockRun |
                 '--> object: decrypted, unpacked, its checksum compared; once, then cached

A block that is not what its checksum says is EIO for its bytes; all else is served.

``nbdsrv:changed-since:VERSION``: blocks differ where neither uid nor checksum are the same.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.paged import PagedDisk
from nbdsrv.repository.benji.hashing import BlockHash
from nbdsrv.repository.benji.objects import Objects, object_path
from nbdsrv.repository.benji.versions import BlockMap, Head
from nbdsrv.repository.comparing import announced
from nbdsrv.repository.repository import CHANGED_SINCE
from nbdsrv.store.store import ObjectMissing
from protocol.extents import ExtentList
from protocol.terms import BlockSizes

__all__ = ["BenjiDisk", "block_at"]

PAGE_BLOCKS = 1024
"""Blocks of a page: 4 GiB."""
MAX_PREFERRED = 1 << 16
MAX_FOUND = 1 << 16
"""Extents of an answer."""
MAX_LOOKED_AT = 1 << 18
"""Blocks compared for an answer: some hundred milliseconds."""


def block_at(objects: Objects, hashes: BlockHash, head: Head, blocks: BlockMap, row: int) -> bytes:
    """A block's content, proven. Blocking.

    Raises:
        CorruptImage: it is missing, or not what it was.
    """
    index = blocks.indexes[row]
    path = object_path("blocks", blocks.key(row))
    length = head.block_length(index)
    try:
        metadata, data = objects.read(path, head.block_size)
    except ObjectMissing as error:
        raise CorruptImage(f"corrupt repository: {error}; block {index} is lost") from error
    checksum = blocks.checksum(row)
    if metadata.checksum and metadata.checksum != checksum.hex():
        raise objects.corrupt(path, "is another block than the version says")
    if len(data) != length:
        raise objects.corrupt(path, f"a block of {len(data)} bytes in place of {length}")
    if not hashes.fits(data, checksum):
        raise objects.corrupt(path, "its content has not the checksum it had")
    return data


class BenjiDisk(PagedDisk):
    """The disk of a version, read-only."""

    format = "benji"

    def __init__(
        self,
        workers: Workers,
        name: str,
        objects: Objects,
        hashes: BlockHash,
        head: Head,
        blocks: BlockMap,
        others: Mapping[str, Callable[[], tuple[Head, BlockMap]]],
        release: Callable[[], Awaitable[None]],
        facts: Mapping[str, object],
    ) -> None:
        """Use ``BenjiRepository.open_disk``.

        Args:
            workers: for everything that blocks.
            name: for messages.
            objects: of the storage.
            hashes: what blocks are proven by.
            head: of the version.
            blocks: of the version.
            others: versions of the volume, from old to new; each reads its map, blocking.
            release: called once, when it is closed.
            facts: for ``info``.
        """
        super().__init__(workers, name)
        self.size = head.size
        self.page_span = PAGE_BLOCKS * head.block_size
        self.block_sizes = BlockSizes(preferred=_preferred(head.block_size))
        self.contexts = announced(others)
        self._objects = objects
        self._hashes = hashes
        self._head = head
        self._blocks = blocks
        self._others = others
        self._release = release
        self._facts = facts
        self._released = False

    @property
    def facts(self) -> Mapping[str, object]:
        """Volume, version, snapshot ..."""
        return self._facts

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        block_size, blocks = self._head.block_size, self._blocks
        at, end = offset, offset + length
        row = blocks.find(offset // block_size)
        while row < len(blocks):
            start = blocks.indexes[row] * block_size
            if start >= end:
                break
            if start > at:
                yield Segment(start - at, Kind.ABSENT)
            at = min(start + block_size, end)
            yield Segment(at - start, Kind.BLOCK, row)
            row += 1
        if at < end:
            yield Segment(end - at, Kind.ABSENT)

    def _decode(self, key: int) -> bytes:
        return block_at(self._objects, self._hashes, self._head, self._blocks, key)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation; its depth; and what differs from another version."""
        if not context.startswith(CHANGED_SINCE):
            return await super().status(context, offset, length)
        other = self._others.get(context.removeprefix(CHANGED_SINCE))
        if other is None:
            raise self._no_context(context)
        self._check(offset, length)
        if not length:
            raise DiskError(f"{self.name}: nothing lies at {offset}, its end")
        return ExtentList(offset, await self.workers.run(self._changes, other, offset, length))

    def _changes(
        self, other: Callable[[], tuple[Head, BlockMap]], offset: int, length: int
    ) -> Sequence[tuple[int, int]]:
        head, blocks = other()
        if head.block_size != self._head.block_size:
            return [(length, 1)]  # nothing can be compared
        size = self._head.block_size
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        index = offset // size
        mine, theirs = self._blocks.find(index), blocks.find(index)
        for _ in range(MAX_LOOKED_AT):
            if at >= end or len(found) >= MAX_FOUND:
                break
            # The next block that either has; none in between differ.
            next_mine = self._blocks.indexes[mine] if mine < len(self._blocks) else end
            next_theirs = blocks.indexes[theirs] if theirs < len(blocks) else end
            index = min(next_mine, next_theirs)
            start = min(index * size, end)
            if start > at:
                found.append((start - at, 0))
                at = start
            if at >= end:
                break
            both = next_mine == next_theirs
            same = both and _same(self._blocks, mine, blocks, theirs)
            stop = min((index + 1) * size, end)
            found.append((stop - at, 0 if same else 1))
            at = stop
            mine += next_mine == index
            theirs += next_theirs == index
        return _beyond(found, offset, head.size)

    async def close(self) -> None:
        """Give the storage back."""
        await super().close()
        if not self._released:
            self._released = True
            await self._release()


def _same(mine: BlockMap, row: int, theirs: BlockMap, other: int) -> bool:
    uids = mine.left[row] == theirs.left[other] and mine.right[row] == theirs.right[other]
    return uids or mine.checksum(row) == theirs.checksum(other)


def _beyond(found: Sequence[tuple[int, int]], offset: int, size: int) -> Sequence[tuple[int, int]]:
    """What lies behind the other's end has changed, zero or not."""
    told: list[tuple[int, int]] = []
    at = offset
    for length, flags in found:
        inside = max(0, min(length, size - at))
        told += [(inside, flags), (length - inside, 1)]
        at += length
    return told


def _preferred(block_size: int) -> int:
    return min(block_size & -block_size, MAX_PREFERRED)
