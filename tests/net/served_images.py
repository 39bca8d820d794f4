"""The images the tests serve.

::

    disk   1 MiB data | 1 MiB hole | 1 MiB + 777 B data                             odd size
    huge   64 KiB data | ... hole ... | 64 KiB data at 4 GiB + 1 MiB | ... hole     6 GiB
    big    40 MiB data
    scratch  8 MiB, random again for each test                                      writable
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving import ServerProcess

MIB = 1 << 20
DISK_SIZE = 3 * MIB + 777
HUGE_SIZE = 6 << 30
HUGE_FAR = (4 << 30) + MIB
SCRATCH_SIZE = 8 * MIB

Serve = Callable[..., ServerProcess]


@dataclass(frozen=True, slots=True)
class Images:
    """The read-only images and what is in them."""

    disk: Path
    huge: Path
    big: Path
    golden: bytes
    golden_big: bytes
    huge_block: bytes


@dataclass(slots=True)
class Scratch:
    """The writable image, and what it holds at the start of the test."""

    path: Path
    golden: bytes

    def bytes(self) -> bytes:
        """What the file holds now."""
        return self.path.read_bytes()

    def allocated(self) -> int:
        """Bytes the file takes on its disk."""
        return os.stat(self.path).st_blocks * 512


def write_sparse(path: Path, size: int, pieces: dict[int, bytes]) -> None:
    """A file with holes between ``pieces``."""
    with path.open("wb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)
