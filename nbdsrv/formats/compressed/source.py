"""A compressed stream cut into blocks that can be decoded on their own, and how one is found.

::

    file   |## block 0 ##|# block 1 #|####### block 2 #######| ...
    disk   |      0      |     1     |           2           | ...     ``starts``

Each compression brings a *survey*: a generator that goes through the file, yields now and then so
that others get their turn and a cancellation is seen, and returns a BlockSource, or None where the
stream has no places to begin at.
"""

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

__all__ = ["MAX_BLOCK", "MAX_BLOCKS", "BlockSource", "Room", "Survey"]

MAX_BLOCK = 64 << 20
"""Decoded bytes of a block that is still worth decoding for a read; ``xz -T0`` makes 24 MiB at its
default level and 48 at -7. Streams with larger ones are unpacked once."""
MAX_BLOCKS = 1 << 21
"""Blocks of a file; each costs some 24 bytes of memory."""


class BlockSource(ABC):
    """The blocks of one file. ``decode`` is called in threads, several at a time.

    Attributes:
        size: of the disk, bytes.
        starts: where in the disk each block begins, ascending from 0; every block has a byte.
        zero: a byte for each block, 1 where it is known to hold zeroes only; empty if unknown.
        facts: what ``info`` tells.
    """

    size: int
    starts: Sequence[int]
    zero: bytes | bytearray = b""
    facts: Mapping[str, object]

    def end(self, number: int) -> int:
        """First byte of the disk behind a block."""
        following = number + 1
        return self.starts[following] if following < len(self.starts) else self.size

    def read(self, offset: int, length: int) -> bytes:
        """These bytes of the disk, fewer at its end. Blocking; for looking at what it is."""
        found, limit = b"", min(offset + length, self.size)
        while offset < limit:
            number = bisect_right(self.starts, offset) - 1
            begin = self.starts[number]
            found += self.decode(number)[offset - begin : limit - begin]
            offset = self.end(number)
        return found

    def memory(self, number: int) -> int:
        """Bytes that decoding this block takes while it lasts."""
        return 2 * (self.end(number) - self.starts[number])

    @abstractmethod
    def decode(self, number: int) -> bytes:
        """The whole block, verified by its checksum where it has one. Blocking.

        Raises:
            DiskError: it cannot be read, or is broken.
        """


Survey = Generator[None, None, BlockSource | None]


class Room:
    """Memory for decoding: whoever wants more than there is waits until others are done."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Have this much until the end of the block; all of it, if it is more than there is."""
        amount = min(amount, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()
