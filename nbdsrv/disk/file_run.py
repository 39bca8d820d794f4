"""A range of a file, and what the kernel can be asked and told about it.

::

    file     ....|==========|......
                 |  in the page cache?   ``resident``
                 └─ soon to be read      ``announce``: the disk begins, nobody waits
"""

import os
from contextlib import suppress
from typing import NamedTuple

from nbdsrv.disk.residency import NEVER, Residency

__all__ = ["FileRun"]


class FileRun(NamedTuple):
    """``length`` bytes stored as they are.

    Attributes:
        fd: readable file descriptor, open as long as the Disk.
        position: bytes from the file's beginning.
        length: bytes, at least 1.
        residency: what is known of how warm the file is, and how it may be read on the loop.
    """

    fd: int
    position: int
    length: int
    residency: Residency

    def resident(self) -> bool:
        """Can all of it be read now without blocking? For the loop."""
        return self.residency.resident(self.fd, self.position, self.length)

    def heeds(self) -> bool:
        """Does ``announce`` do anything? Not on file systems that know nothing of reading ahead,
        nor in memory, nor on what cannot be read on the loop.
        """
        return self.residency.inline not in {NEVER, 0}

    def announce(self, length: int) -> None:
        """The first ``length`` bytes will be read: the disk fetches them while others are read.

        For threads: looking up where they lie may block.
        """
        with suppress(OSError):
            os.posix_fadvise(self.fd, self.position, length, os.POSIX_FADV_WILLNEED)
