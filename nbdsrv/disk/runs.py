"""Where the bytes of a disk are: the answer of ``Disk.locate``.

A format translates addresses; one engine moves bytes (docs/architecture.md, "How bytes move")::

    guest   |---- FileRun ----|-- ZeroRun --|---- FileRun ----|
                 |                               |
    file    .....|====|.......................|==========|....
"""

from typing import NamedTuple

__all__ = ["NEVER", "FileRun", "Run", "ZeroRun"]

NEVER = -1
"""``FileRun.inline`` of a file that can only be read where blocking is allowed."""


class FileRun(NamedTuple):
    """``length`` bytes stored as they are.

    Attributes:
        fd: readable file descriptor, open as long as the Disk.
        position: bytes from the file's beginning.
        length: bytes, at least 1.
        inline: flags for a ``preadv`` that cannot block (RWF_NOWAIT, or 0 where reading
            memory is all it takes), or ``NEVER``.
    """

    fd: int
    position: int
    length: int
    inline: int


class ZeroRun(NamedTuple):
    """``length`` bytes that read as zeroes and are stored nowhere."""

    length: int


Run = FileRun | ZeroRun
