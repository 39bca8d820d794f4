"""The file operations an overlay is made of, one method each.

::

    Overlay ── MapFile ── Place          all of them go through here and nowhere else,
                 │                       so that a test can write down the order of them
               Files ── the kernel       and replay what a power cut would have left

What is written directly (``Overlay.place``) is an overwrite of the data file and may land in any
order, as every ``write`` that has not been followed by a sync.

Rule: everything here blocks and raises OSError. Any thread may call it.
"""

import errno as os_errno
import os
from collections.abc import Sequence

from nbdsrv.formats.allocation import punch_hole

__all__ = ["Files"]


class Files:
    """The real thing."""

    def create(self, directory: int, name: str) -> int:
        """A new empty file, 0600, in an open directory; an old one of that name is emptied."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o600, dir_fd=directory)

    def open(self, directory: int, name: str, *, writable: bool) -> int:
        """A file that is there."""
        mode = os.O_RDWR if writable else os.O_RDONLY
        return os.open(name, mode | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)

    def write(self, fd: int, views: Sequence[memoryview | bytes], position: int) -> None:
        """All of ``views``, one behind the other. A failure may leave a part of it."""
        parts = [memoryview(view) for view in views if len(view)]
        while parts:
            count = os.pwritev(fd, parts, position)
            position += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if count:
                parts[0] = parts[0][count:]

    def punch(self, fd: int, position: int, length: int) -> None:
        """Deallocate."""
        punch_hole(fd, position, length)

    def truncate(self, fd: int, length: int) -> None:
        """Make the file that long."""
        os.ftruncate(fd, length)

    def sync_data(self, fd: int) -> None:
        """What was written to this file is on the disk, and so is what finds it again."""
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        """The same with all metadata; of a directory: its names, if its file system knows how."""
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != os_errno.EINVAL:  # some FUSE, 9p: they keep names as they can
                raise

    def rename(self, directory: int, old: str, new: str) -> None:
        """``old`` takes the place of ``new``, at once."""
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)

    def unlink(self, directory: int, name: str) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=directory)
