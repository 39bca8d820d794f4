"""A disk of a point of a Xen Orchestra repository, its whole chain at once.

::

    guest     |DATA|BLOCK|.......|DATA|ZERO..|         pages, from the layers' tables
    layer 0   |    |  #  |       |    |                newest: this point's own
    layer 1   | == |     |       | == |                what it was made from
    layer 2 ..

All layers are looked through for a page at once, so that a hole below a hundred deltas costs no
more to read than any other, and a block is read from the newest layer that has it.

``nbdsrv:changed-since:POINT`` is answered for the points this one was made from: the blocks of all
layers above theirs. That is never too little, and to the granularity of the blocks.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.page import Kind, Page, Segment
from nbdsrv.formats.paged import PagedDisk
from nbdsrv.formats.vhd.sectors import stretches
from nbdsrv.formats.vhd.structs import SECTOR
from nbdsrv.repository.comparing import announced
from nbdsrv.repository.repository import CHANGED_SINCE
from nbdsrv.repository.xo.chain import Chain
from nbdsrv.repository.xo.checks import BlockChecks
from nbdsrv.repository.xo.layers import PART, BlockLayer, FileLayer, Layer
from nbdsrv.repository.xo.watch import Watch
from nbdsrv.store.store import ObjectMissing
from protocol.extents import ExtentList
from protocol.terms import BlockSizes

__all__ = ["XoDisk"]

FILE_PAGE = 16
"""Blocks of a page where sector bitmaps must be read, one seek each."""
PART_PAGE = 256
PACKED_PAGE = 4096
MAX_PAGE = 16 << 30
PREFERRED = 1 << 16
"""What reads are best aligned to."""
MAX_EXTENTS = 1 << 16
"""Extents of changed-since looked up in one go; an answer may stop short."""
MAX_PAGES = 64
"""Pages looked at for one such answer."""
MAX_WHOLE = 1 << 20
"""Blocks remembered to have all their sectors."""

EMPTY_BLOCKS = 1024
"""Blocks that are remembered together to be in no layer."""

_LAYER, _BLOCK, _IS_PART = 48, 20, 1 << 19
"""A key: number of the layer, number of the block, a part or all from there on, first sector."""


class _Found(NamedTuple):
    start: int
    end: int
    kind: int
    layer: int
    where: int


class XoDisk(PagedDisk):
    """A disk of a point, read-only."""

    format = "xo"

    def __init__(
        self,
        workers: Workers,
        name: str,
        chain: Chain,
        layers: Sequence[Layer],
        checks: Mapping[int, BlockChecks],
        since: Mapping[str, int],
        facts: Mapping[str, object],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Use ``XoRepository.open_disk``.

        Args:
            workers: for everything that blocks.
            name: for messages.
            chain: becomes ours.
            layers: of the chain.
            checks: checksums of the disks' blocks, by number in the chain.
            since: points this one was made from to the number of their disk, newest first.
            facts: for ``info``.
            release: called once, when it is closed.
        """
        super().__init__(workers, name)
        self.size = chain.files[0].footer.size
        self.block_sizes = BlockSizes(preferred=PREFERRED)
        self.contexts = announced(reversed(list(since)))
        self._chain = chain
        self._layers = layers
        self._checks = checks
        self._since = since
        self._facts = facts
        self._release = release
        self._block_size = chain.files[0].header.block_size
        self.page_span = _page_span(layers, checks, self._block_size)
        self._watch = Watch(chain)
        self._whole: set[tuple[int, int]] = set()
        self._empty: set[int] = set()

    @property
    def facts(self) -> Mapping[str, object]:
        """What the point says, and how the disk is stored."""
        return self._facts

    async def close(self) -> None:
        """Close the files of the chain."""
        if not self._closed:
            await super().close()
            await self._release()

    def _close_files(self) -> None:
        self._chain.close()

    # --- pages, in threads ---------------------------------------------------------------------

    def _read_pages(
        self, wanted: Sequence[int], ahead: Sequence[int]
    ) -> Sequence[tuple[int, Page]]:
        # Sector bitmaps cost a seek each: only what is empty is looked at ahead.
        return super()._read_pages(wanted, list(takewhile(self._is_cheap, ahead)))

    def _is_cheap(self, number: int) -> bool:
        start = number * self.page_span
        end = min(start + self.page_span, self.size)
        if start >= end:
            return False
        if self._is_empty(start, end):
            return True
        first, stop = start // self._block_size, -(-end // self._block_size)
        try:
            return not any(
                isinstance(layer, FileLayer) and _has_any(layer, first, stop)
                for layer in self._layers
            )
        except DiskError:
            return False  # somebody who wants it will be told

    def _is_empty(self, start: int, end: int) -> bool:
        """Is it known that no layer has anything there?"""
        span = EMPTY_BLOCKS * self._block_size
        return start // span == (end - 1) // span and start // span in self._empty

    def _note_empty(self, offset: int) -> None:
        """Nothing is there; is there anything around it?"""
        window = offset // (EMPTY_BLOCKS * self._block_size)
        first = window * EMPTY_BLOCKS
        if not any(_has_any(layer, first, first + EMPTY_BLOCKS) for layer in self._layers):
            self._empty.add(window)

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        if self._is_empty(offset, offset + length):
            yield Segment(length, Kind.ABSENT)
            return
        found = self._find(0, offset, offset + length)
        if len(found) == 1 and found[0].kind == Kind.ABSENT:
            self._note_empty(offset)
        for start, end, kind, number, where in found:
            if kind == Kind.BLOCK:
                yield from self._block_segments(number, where, start, end)
            elif kind == Kind.DATA:
                yield Segment(end - start, kind, where, self._layers[number].file)
            else:
                yield Segment(end - start, Kind.ABSENT)

    def _find(self, first: int, start: int, end: int, stop: int | None = None) -> list[_Found]:
        """Where a range is, in the layers from ``first`` on, before ``stop``; in order."""
        found: list[_Found] = []
        pending = [(start, end)]
        for number in range(first, len(self._layers) if stop is None else stop):
            left: list[tuple[int, int]] = []
            pieces = self._layers[number].pieces
            for each in pending:
                for begin, upto, kind, where in pieces(*each):
                    if kind != Kind.ABSENT:
                        found.append(_Found(begin, upto, kind, number, where))
                    elif left and left[-1][1] == begin:
                        left[-1] = left[-1][0], upto
                    else:
                        left.append((begin, upto))
            pending = left
            if not pending:
                break
        found += [_Found(begin, upto, Kind.ABSENT, -1, 0) for begin, upto in pending]
        found.sort()
        return found

    def _block_segments(self, number: int, block: int, start: int, end: int) -> Iterator[Segment]:
        layer = self._layers[number]
        offset = block * self._block_size
        key = number << _LAYER | block << _BLOCK
        if not isinstance(layer, BlockLayer) or not layer.parts or number in self._checks:
            yield Segment(end - start, Kind.BLOCK, key | (start - offset) // SECTOR)
            return
        while start < end:
            # On multiples of PART, so that a read of the block always finds the same parts.
            upto = min((start // PART + 1) * PART, end)
            yield Segment(upto - start, Kind.BLOCK, key | _IS_PART | (start - offset) // SECTOR)
            start = upto

    # --- blocks, in threads --------------------------------------------------------------------

    def _decode(self, key: int) -> bytes:
        number, block = key >> _LAYER, key >> _BLOCK & (1 << _LAYER - _BLOCK) - 1
        skip = (key & _IS_PART - 1) * SECTOR
        if key & _IS_PART:
            return self._part(number, block, skip)
        try:
            data = self._block(number, block)
        except RecursionError as error:  # each layer's block lacks sectors: no merge leaves that
            text = f"block {block} is spread over too many layers"
            raise CorruptImage(f"corrupt image: {self.name}: {text}") from error
        return data[skip:] if skip else data

    def _part(self, number: int, block: int, skip: int) -> bytes:
        """Up to ``PART`` bytes of a block that is stored as it is."""
        layer = self._layers[number]
        assert isinstance(layer, BlockLayer)
        bitmap_size = layer.source.header.bitmap_size
        length = min((skip // PART + 1) * PART, self._block_size) - skip
        try:
            if self._is_whole(layer, number, block):
                data = layer.fetch_part(block, bitmap_size + skip, length)
                self._watch.check()
                return data
        except ObjectMissing:
            pass
        return self._block(number, block)[skip : skip + length]

    def _is_whole(self, layer: BlockLayer, number: int, block: int) -> bool:
        if (number, block) in self._whole:
            return True
        size = layer.source.header.bitmap_size
        bitmap = layer.fetch_part(block, 0, size)
        if not _all_here(bitmap, self._sectors(block)):
            return False
        if len(self._whole) >= MAX_WHOLE:
            self._whole.clear()
        self._whole.add((number, block))
        return True

    def _block(self, number: int, block: int) -> bytes:
        """All data of a block, what its bitmap denies filled in from the layers below."""
        layer = self._layers[number]
        assert isinstance(layer, BlockLayer)
        size = layer.source.header.bitmap_size
        raw, found_in = self._fetch(layer, number, block)
        bitmap, data = raw[:size], raw[size:]
        if number in self._checks:  # of the disk it was written for, wherever it is now
            self._checks[number].check(block, data)
        sectors = self._sectors(block)
        if _all_here(bitmap, sectors):
            return data
        return self._filled(found_in, block, bitmap, data, sectors)

    def _fetch(self, layer: BlockLayer, number: int, block: int) -> tuple[bytes, int]:
        """The block, and the number of the layer it was found in."""
        try:
            raw = layer.fetch(block)
            self._watch.check()
            return raw, number
        except ObjectMissing as error:
            last = self._watch.falls_to(number)
            if last is None:
                raise self._lost(error) from error
        below = self._layers[last]
        if not isinstance(below, BlockLayer):
            raise self._lost(DiskError(f"{layer.source.name}: block {block} is missing"))
        try:  # whatever its table says: that is written at the end of the merge
            raw = below.fetch(block)
            self._watch.check()
            return raw, last
        except ObjectMissing as error:
            raise self._lost(error) from error

    @staticmethod
    def _lost(error: DiskError) -> CorruptImage:
        return CorruptImage(f"corrupt image: {error}; the table says that the block is there")

    def _filled(self, number: int, block: int, bitmap: bytes, data: bytes, sectors: int) -> bytes:
        offset = block * self._block_size
        filled = bytearray(data)
        at = 0
        least_first = self._layers[number].source.footer.least_first
        for count, here in stretches(bitmap, 0, sectors, least_first=least_first):
            start, at = at * SECTOR, at + count
            end = min(at * SECTOR, self.size - offset)
            if not here:
                filled[start:end] = self._below(number + 1, offset + start, offset + end)
        return bytes(filled)

    def _below(self, number: int, start: int, end: int) -> bytes:
        """Bytes of the disk as the layers from ``number`` on have them."""
        parts: list[bytes] = []
        for begin, upto, kind, layer, where in self._find(number, start, end):
            length = upto - begin
            if kind == Kind.DATA:
                file = self._layers[layer].file
                assert isinstance(file, ImageFile)
                parts.append(file.read(where, length, "data"))
            elif kind == Kind.BLOCK:
                key = layer << _LAYER | where << _BLOCK
                skip = begin - where * self._block_size
                parts.append(self.blocks.get(key, length)[skip : skip + length])
            else:
                parts.append(bytes(length))
        return b"".join(parts)

    def _sectors(self, block: int) -> int:
        """Of a block, those within the disk."""
        used = min(self._block_size, self.size - block * self._block_size)
        return -(-used // SECTOR)

    # --- what has changed ----------------------------------------------------------------------

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation, its depth, and what has changed since the points this was made from."""
        number = self._since.get(context.removeprefix(CHANGED_SINCE))
        if number is None or not context.startswith(CHANGED_SINCE):
            return await super().status(context, offset, length)
        self._check(offset, length)
        if self._closed:
            raise DiskError(f"{self.name} is closed")
        changes = await self.workers.look_up(self._changes, number, offset, offset + length)
        return ExtentList(offset, changes)

    def _changes(self, number: int, start: int, end: int) -> list[tuple[int, int]]:
        """(length, changed?) of the disk against layer ``number``'s."""
        size, span = self._layers[number].size, self.page_span
        found: list[tuple[int, int]] = []
        for _ in range(MAX_PAGES):
            upto = min((start // span + 1) * span, end)
            for begin, stop, kind, *_ in self._find(0, start, upto, number):
                changed = kind != Kind.ABSENT
                if not changed and begin < size < stop:  # it has grown
                    _extend(found, size - begin, changed=False)
                    begin = size  # noqa: PLW2901 - the rest of it
                _extend(found, stop - begin, changed=changed or begin >= size)
            start = upto
            if start >= end or len(found) >= MAX_EXTENTS:
                break
        return found


def _has_any(layer: Layer, first: int, end: int) -> bool:
    return first < layer.blocks and layer.has_any(first, min(end, layer.blocks))


def _extend(found: list[tuple[int, int]], length: int, *, changed: bool) -> None:
    flag = int(changed)
    if found and found[-1][1] == flag:
        found[-1] = found[-1][0] + length, flag
    else:
        found.append((length, flag))


def _all_here(bitmap: bytes, sectors: int) -> bool:
    """Are all of the first sectors in this block? In either order of bits."""
    whole, rest = divmod(sectors, 8)
    if bitmap.count(0xFF, 0, whole) != whole:
        return False
    if not rest:
        return True
    return bitmap[whole] == 0xFF or bitmap[whole] >> 8 - rest == (1 << rest) - 1


def _page_span(layers: Iterable[Layer], checks: Mapping[int, BlockChecks], block_size: int) -> int:
    blocks = PACKED_PAGE
    for number, layer in enumerate(layers):
        if isinstance(layer, FileLayer):
            blocks = min(blocks, FILE_PAGE)
        elif isinstance(layer, BlockLayer) and layer.parts and number not in checks:
            blocks = min(blocks, PART_PAGE)
    return max(min(blocks * block_size, MAX_PAGE), block_size)
