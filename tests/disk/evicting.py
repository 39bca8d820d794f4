"""Files that are in memory no more."""

import os
from pathlib import Path


def evict(path: Path) -> None:
    """What should be on the disk is written there first, and what is busy may stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
