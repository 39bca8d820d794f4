"""Where the bytes of a disk are: the answer of ``Disk.locate``.

A format translates addresses; one engine moves bytes (docs/architecture.md, "How bytes move")::

    guest   |---- FileRun ----|-- ZeroRun --|-- BlockRun --|-- RemoteRun --|
                 |                               |                 |
    file    .....|====|..........................|##|       only ``read_into`` knows
                  as it is               encoded, decoded as a whole
"""

from collections.abc import Sequence
from typing import NamedTuple

from nbdsrv.disk.blocks import Blocks
from nbdsrv.disk.residency import Residency, Stored

__all__ = ["BlockRun", "FileRun", "RemoteRun", "Run", "ZeroRun", "in_files"]


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


class BlockRun(NamedTuple):
    """``length`` bytes of a block that must be decoded as a whole.

    Attributes:
        blocks: decodes and remembers; ``blocks.peek(key)`` is for the loop, ``blocks.get`` for
            threads.
        key: names the block among ``blocks``.
        skip: where in the decoded block the run begins, bytes.
        length: bytes, at least 1; the block is at least ``skip + length`` long.
    """

    blocks: Blocks
    key: int
    skip: int
    length: int


class RemoteRun(NamedTuple):
    """``length`` bytes that only the Disk's own ``read_into`` can give, for it must wait for them.

    Never beside runs of other kinds: a Disk answers with one RemoteRun or with none.
    """

    length: int


Run = FileRun | ZeroRun | BlockRun | RemoteRun


def in_files(runs: Sequence[Run], length: int) -> Sequence[Stored]:
    """Where the first ``length`` bytes lie in files, those of blocks packed and whole.

    Empty unless all of them do, in files that the kernel can be told to read ahead. Never blocks.
    """
    wanted: list[Stored] = []
    for run in runs:
        if isinstance(run, FileRun):
            stored: Stored | None = (run.fd, run.position, min(run.length, length), run.residency)
        else:
            stored = run.blocks.stored(run.key) if isinstance(run, BlockRun) else None
        if stored is None or not stored[3].reads_ahead:
            return ()
        wanted.append(stored)
        length -= run.length
    return wanted
