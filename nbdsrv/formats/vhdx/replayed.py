"""A VHDX file as it would be if its log had been written to where it belongs.

::

    file       |..............................|      end of the file
    patches       |data 4K|    |  zeroes  |      |data 4K|
    replayed   |..|=======|....|0000000000|..|000|=======|     size

Rule: the file is never written. Everything that reads metadata reads it here, and guest data too:
a log should not contain any, but who knows.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from nbdsrv.formats.image_file import MAX_METADATA, ImageFile
from nbdsrv.formats.page import Kind, Segment

__all__ = ["Patch", "Replayed"]

Patch = tuple[int, int, bytes | None]
"""(start, end, what is there now: None for zeroes)."""


class Replayed:
    """Reads a file through patches. Any thread may call it; all methods block.

    Attributes:
        size: bytes of the file once the log is replayed; behind its real end there are zeroes.
    """

    def __init__(self, file: ImageFile, size: int, patches: Sequence[Patch]) -> None:
        """``patches`` are ascending and disjoint. The file stays its owner's."""
        assert all(low[1] <= high[0] for low, high in pairwise(patches))
        self._file = file
        self.size = max(size, file.size)
        self._patches = patches
        self._starts = [start for start, _, _ in patches]
        self.plain = not patches and self.size == file.size

    def read(self, position: int, length: int, what: str) -> bytes:
        """As ``ImageFile.read``."""
        if self.plain:
            return self._file.read(position, length, what)
        if not 0 <= length <= MAX_METADATA or not 0 <= position <= self.size - length:
            text = f"{what} of {length} bytes lies beyond the end of the file ({self.size})"
            raise self._file.corrupt(position, text)
        data = bytearray()
        for start, end, patch in self._walk(position, position + length):
            if patch is None:
                data += self._file.read_up_to(start, end - start).ljust(end - start, b"\0")
            else:
                data += self._patched(patch, start, end)
        return bytes(data)

    def segments(self, position: int, length: int) -> Iterator[Segment]:
        """Guest data that lies here; what the log holds of it becomes blocks for ``block``."""
        if self.plain:
            yield Segment(length, Kind.DATA, position)
            return
        for start, end, patch in self._walk(position, position + length):
            if patch is None:
                inside = max(min(end, self._file.size) - start, 0)
                if inside:
                    yield Segment(inside, Kind.DATA, start)
                if inside < end - start:
                    yield Segment(end - start - inside, Kind.ZERO)
            elif patch[2] is None:
                yield Segment(end - start, Kind.ZERO)
            else:
                yield Segment(end - start, Kind.BLOCK, start)

    def block(self, position: int) -> bytes:
        """What the log holds from ``position`` on, up to the end of that sector."""
        patch = self._patches[bisect_right(self._starts, position) - 1]
        return self._patched(patch, position, patch[1])

    def _walk(self, position: int, end: int) -> Iterator[tuple[int, int, Patch | None]]:
        """[position, end) in pieces that are patched, or not."""
        first = max(bisect_right(self._starts, position) - 1, 0)
        for index in range(first, len(self._patches)):
            patch = self._patches[index]
            if patch[0] >= end:
                break
            if patch[1] <= position:
                continue
            if patch[0] > position:
                yield position, patch[0], None
                position = patch[0]
            yield position, min(patch[1], end), patch
            position = min(patch[1], end)
        if position < end:
            yield position, end, None

    @staticmethod
    def _patched(patch: Patch, start: int, end: int) -> bytes:
        first, _, data = patch
        return bytes(end - start) if data is None else data[start - first : end - first]
