"""Reading a Disk the way every test does: which ranges, and through which buffers."""

import random

from nbdsrv.disk.disk import Disk

__all__ = ["POISON", "content", "some_ranges"]

POISON = 0xA5
"""What buffers are filled with; a zero would pass for a hole nobody wrote."""


async def content(disk: Disk, offset: int, length: int) -> bytes:
    """``length`` bytes of the disk at ``offset``."""
    buffer = bytearray([POISON]) * length
    await disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def some_ranges(size: int, count: int) -> list[tuple[int, int]]:
    """(offset, length) within ``size``: the corners first, then seeded random ones."""
    chance = random.Random(size)
    corners = [(0, 0), (size, 0), (0, size), (size // 2, size - size // 2), (size // 2, 0)]
    corners += [(max(size - n, 0), min(n, size)) for n in (1, 2, 511, 512, 513, 4096, 65537)]
    corners += [(0, min(n, size)) for n in (1, 511, 512, 4097)]
    while len(corners) < count and size:
        unit = chance.choice((1, 1, 512, 4096))
        offset = chance.randrange(size) // unit * unit
        length = chance.choice((1, 512, 4096, 5000, 65536, chance.randrange(1 << 20) + 1))
        corners.append((offset, min(length, size - offset)))
    return corners
