"""Golden raw images, made when they are needed.

::

    pieces   |== data ==|.. hole ..|= data =|........ hole ........|
             (offset, bytes)

Data is seeded random bytes, so that a wrong offset cannot look right.
"""

import os
import random
from dataclasses import dataclass, field

__all__ = ["IMAGES", "Image"]

MIB = 1 << 20


@dataclass(frozen=True)
class Image:
    """``size`` bytes, all hole but for ``data``: (offset, length) ranges."""

    name: str
    size: int
    data: tuple[tuple[int, int], ...] = field(default=())

    def golden(self) -> bytes:
        """What it reads as."""
        chance = random.Random(self.name)
        content = bytearray(self.size)
        for offset, length in self.data:
            content[offset : offset + length] = chance.randbytes(length)
        return bytes(content)

    def make(self, path: str) -> bytes:
        """Write it to ``path``, holes as holes; returns ``golden()``."""
        content = self.golden()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, self.size)
            for offset, length in self.data:
                assert os.pwrite(fd, content[offset : offset + length], offset) == length
        finally:
            os.close(fd)
        return content


IMAGES = (
    Image("empty", 0),
    Image("one-byte", 1, ((0, 1),)),
    Image("one-byte-hole", 1),
    Image("511", 511, ((0, 511),)),
    Image("513", 513, ((0, 513),)),
    Image("4097", 4097, ((0, 4097),)),
    Image("4097-hole-then-byte", 4097, ((4096, 1),)),
    Image("1MiB+3", MIB + 3, ((0, 65536), (300_000, 70_000), (MIB - 4096, 4099))),
    Image("1MiB+3-hole-tail", MIB + 3, ((131_072, 4096), (262_144, 1))),
    Image("allocated", MIB, ((0, MIB),)),
    Image("all-hole", MIB),
    Image("stripes", MIB, tuple((at, 4096) for at in range(0, MIB, 16384))),
)
