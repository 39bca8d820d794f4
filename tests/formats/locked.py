"""Images with QEMU's locks on them, as a running virtual machine takes them."""

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["relied_on"]


@contextmanager
def relied_on(path: Path) -> Iterator[None]:
    """It has the locks of the backing file of a running machine, which QEMU only reads."""
    with path.open("rb") as file:
        for position in 100, 201, 203:
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, position, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        yield
