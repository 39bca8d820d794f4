"""Looking at the blocks of one disk, its own only: what its parents have is theirs.

::

    table ── which blocks ──> is the file there, has it the right size?      structure
                              does it decrypt, has gzip's checksum?          packs
                              does it unpack to a block, is that the block?  chunks
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.damage import Check, Note
from nbdsrv.repository.xo import filters
from nbdsrv.repository.xo.checks import BlockChecks
from nbdsrv.repository.xo.layers import BlockLayer, DirectoryLayer, RemoteLayer
from nbdsrv.repository.xo.layout import BLOCKS
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.store.store import ObjectMissing

__all__ = ["CHUNKS", "PACKS", "Broken", "DiskExam"]

PACKS, CHUNKS = 1, 2
"""Places in ``repository.LEVELS``."""
THREADS = 4
"""Blocks looked at at a time, each some 4 MiB in memory."""
STEP = 4096
"""Blocks gone through by their names alone before others have their turn."""


class Broken(NamedTuple):
    """A block that cannot be read.

    Attributes:
        block: its number.
        key: the path of the file that is damaged.
        text: what is wrong.
    """

    block: int
    key: str
    text: str


@dataclass(slots=True)
class DiskExam:
    """One disk, looked at once. In threads.

    Attributes:
        remote: the repository.
        layer: the disk.
        fallback: where blocks are that a merge has taken away, or None.
        checks: our checksums of it, or None.
        deep: place in ``LEVELS``.
        check: where counts and notes go.
        proven: blocks that have been compared with a checksum of ours.
    """

    remote: Remote
    layer: BlockLayer
    fallback: BlockLayer | None
    checks: BlockChecks | None
    deep: int
    check: Check
    proven: int = 0

    def run(self, advanced: Callable[[int], None]) -> Generator[None, None, list[Broken]]:
        """Look at all blocks, step by step; the broken ones, ascending.

        Raises:
            CorruptImage: its table is damaged.
            StoreError: it cannot be read.
        """
        broken: list[Broken] = []
        there = yield from self._there(broken)
        if self._reads():
            yield from self._read_all(there, broken, advanced)
        broken.sort()
        return broken

    def _reads(self) -> bool:
        """Is there anything in the blocks to look at?"""
        if self.deep >= CHUNKS:
            return True
        packing = getattr(self.layer, "directory", None)
        packed = packing is not None and packing.filter == filters.GZIP
        return self.deep >= PACKS and (self.remote.encrypted or packed)

    def _there(self, broken: list[Broken]) -> Generator[None, None, list[int]]:
        """The blocks whose files are there, by names and sizes."""
        layer = self.layer
        sizes = self._files() if isinstance(layer, DirectoryLayer) else {}
        there: list[int] = []
        for number, block in enumerate(self._blocks()):
            self.check.objects += 1
            error = self._missing(block, sizes)
            if error is None:
                there.append(block)
            else:
                broken.append(error)
            if number % STEP == STEP - 1:
                yield
        if isinstance(layer, DirectoryLayer) and self.fallback is None:
            extra = len(sizes) - sum(block in sizes for block in there)
            if extra > 0:
                text = f"holds {extra} files of blocks that its table does not name"
                self.check.notes.append(Note(layer.directory.directory, text))
        yield
        return there

    def _blocks(self) -> Iterator[int]:
        for first, end in self.layer.present(0, self.layer.source.header.blocks):
            yield from range(first, end)

    def _files(self) -> dict[int, int]:
        """Block to size of its file, by listing."""
        assert isinstance(self.layer, DirectoryLayer)
        tree, top = self.remote.tree, f"{self.layer.directory.directory}/{BLOCKS}"
        found: dict[int, int] = {}
        for high in tree.entries(top):
            if not high.directory or not _is_number(high.name):
                continue
            for low in tree.entries(f"{top}/{high.name}"):
                if not low.directory and _is_number(low.name):
                    found[int(high.name) * 1000 + int(low.name)] = low.size
        return found

    def _missing(self, block: int, sizes: dict[int, int]) -> Broken | None:
        layer = self.layer
        if isinstance(layer, RemoteLayer):
            try:
                layer.place(block)
            except CorruptImage as error:
                return Broken(block, layer.source.place, str(error))
            return None
        assert isinstance(layer, DirectoryLayer)
        path = layer.directory.block_file(block)
        size = sizes.get(block)
        if size is None:
            if self.fallback is not None and self._taken(block):
                return None
            return Broken(block, path, "is missing, and the table says that it is there")
        if layer.directory.plain and size != layer.directory.block_length:
            text = f"has {size} bytes, should have {layer.directory.block_length}"
            return Broken(block, path, text)
        return None

    def _taken(self, block: int) -> bool:
        below = self.fallback
        if not isinstance(below, DirectoryLayer):
            return False
        return self.remote.tree.find(below.directory.block_file(block)) is not None

    def _read_all(
        self, blocks: list[int], broken: list[Broken], advanced: Callable[[int], None]
    ) -> Generator[None, None, None]:
        waiting: deque[tuple[int, Future[int]]] = deque()
        rest = iter(blocks)
        with ThreadPoolExecutor(THREADS, "nbdsrv-verify") as threads:
            try:
                while True:
                    for block in rest:
                        waiting.append((block, threads.submit(self._examine, block)))
                        if len(waiting) > 2 * THREADS:
                            break
                    if not waiting:
                        return
                    block, future = waiting.popleft()
                    self._account(block, future, broken)
                    advanced(self.layer.block_size)
                    yield
            finally:
                for _, future in waiting:  # it was given up
                    future.cancel()

    def _account(self, block: int, future: "Future[int]", broken: list[Broken]) -> None:
        try:
            self.check.read_bytes += future.result()
        except (CorruptImage, ObjectMissing) as error:
            broken.append(Broken(block, self._key(block), str(error)))
        except DiskError as error:
            self.check.unread.append(str(error))

    def _examine(self, block: int) -> int:
        """Bytes read. In a thread of our own."""
        try:
            raw = self.layer.fetch(block)
        except ObjectMissing:
            if self.fallback is None:
                raise
            raw = self.fallback.fetch(block)
        if self.checks is not None and self.deep >= CHUNKS:
            bitmap = self.layer.source.header.bitmap_size
            self.proven += self.checks.check(block, raw[bitmap:])
        return len(raw)

    def _key(self, block: int) -> str:
        layer = self.layer
        if isinstance(layer, DirectoryLayer):
            return layer.directory.block_file(block)
        return layer.source.place


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 8
