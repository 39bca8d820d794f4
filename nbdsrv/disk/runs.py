"""Where the bytes of a disk are: the answer of ``Disk.locate``.

A format translates addresses; one engine moves bytes (docs/architecture.md, "How bytes move")::

    guest   |---- FileRun ----|-- ZeroRun --|---- FileRun ----|
                 |                               |
    file    .....|====|.......................|==========|....
"""

from typing import NamedTuple

from nbdsrv.disk.residency import Residency

__all__ = ["FileRun", "Run", "ZeroRun"]


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


class ZeroRun(NamedTuple):
    """``length`` bytes that read as zeroes and are stored nowhere."""

    length: int


Run = FileRun | ZeroRun
