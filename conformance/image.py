"""Raw disk images whose every byte and every hole is known beforehand.

::

    0        1M          8M        10M    10.5M   11M                  size
    | random | hole      | random  | zero | hole | ...           | tail |
      data     hole,zero   data      data   hole                   data

``zero`` is written as zeroes: allocated, so a map has to call it data. All edges are multiples
of 64 KiB, so that no file system's block size blurs them; only the size may be odd.
"""

import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from conformance.outcome import CheckFailedError

__all__ = ["KIB", "MIB", "Image", "Span", "standard_layout"]

KIB = 1024
MIB = 1024 * KIB

_SEED = 20260710


@dataclass(frozen=True, slots=True)
class Span:
    """A written part of an image; ``random`` False means written zeroes."""

    offset: int
    length: int
    random: bool = True


def standard_layout(size: int) -> tuple[Span, ...]:
    """The layout in the module's picture, for sizes above 12 MiB."""
    tail = (size - 1) // (64 * KIB) * (64 * KIB)
    return (
        Span(0, MIB),
        Span(8 * MIB, 2 * MIB),
        Span(10 * MIB, MIB // 2, random=False),
        Span(tail, size - tail),
    )


@dataclass(slots=True)
class Image:
    """A sparse raw file and what was put into it."""

    path: Path
    size: int
    spans: tuple[Span, ...]
    seed: int = _SEED
    _made: bool = field(default=False, init=False)

    def create(self) -> "Image":
        """Write the file and make sure that the file system kept its holes.

        Raises:
            CheckFailedError: it did not; every check of maps would be meaningless here.
        """
        source = random.Random(self.seed)
        with self.path.open("wb") as file:
            file.truncate(self.size)
            for span in self.spans:
                file.seek(span.offset)
                data = source.randbytes(span.length) if span.random else bytes(span.length)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if self.extents_on_disk() != self.extents():
            raise CheckFailedError(f"{self.path.parent} does not keep holes where they were made")
        return self

    def extents(self) -> list[tuple[int, int, bool]]:
        """(offset, length, is data) from the layout: ascending, merged, complete."""
        found: list[tuple[int, int, bool]] = []
        position = 0
        for span in self.spans:
            if span.offset > position:
                found.append((position, span.offset - position, False))
            if found and found[-1][2]:
                offset, length, _ = found.pop()
                found.append((offset, length + span.length, True))
            else:
                found.append((span.offset, span.length, True))
            position = span.offset + span.length
        if position < self.size:
            found.append((position, self.size - position, False))
        return found

    def extents_on_disk(self) -> list[tuple[int, int, bool]]:
        """The same from SEEK_DATA and SEEK_HOLE, as the file is now."""
        found: list[tuple[int, int, bool]] = []
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            position = 0
            while position < size:
                end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
                is_data = end > position
                if not is_data:
                    try:
                        end = os.lseek(file.fileno(), position, os.SEEK_DATA)
                    except OSError:
                        end = size
                found.append((position, end - position, is_data))
                position = end
        return found

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of the file as it is now."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(self.size - offset if length is None else length)

    def digest(self) -> str:
        """SHA-256 of the file as it is now, in hex."""
        return file_digest(self.path)

    def allocated(self) -> int:
        """Bytes the file occupies on disk."""
        return self.path.stat().st_blocks * 512


def file_digest(path: Path) -> str:
    """SHA-256 of a file or block device, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
