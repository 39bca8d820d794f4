"""Opening and reading images with flipped bytes: whatever is wrong, only a DiskError may leave.

::

    good image ── (position, bytes) pairs ──> mutant ── open, read, map, close ──> fine or DiskError
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from tests.disk.reading import content
from tests.disk.threads import running_workers

__all__ = ["Mutation", "attempt", "everything", "mutations", "outcome", "threads"]

Mutation = tuple[int, bytes]

MAX_READ = 64 << 10
"""Bytes read at each of a few places; a mutant may claim to be of any size."""
PATIENCE_S = 20

_VALUES = [0, 1, 2, 0x7F, 0xFF, 0x1FF, 0x200, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE]
INTERESTING = [
    *(bytes([value & 0xFF]) for value in _VALUES),
    *(value.to_bytes(4, "little") for value in _VALUES),
    *(value.to_bytes(4, "big") for value in _VALUES),
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    bytes(8),
]


def mutations(size: int) -> strategies.SearchStrategy[list[Mutation]]:
    """A few changes to the first ``size`` bytes."""
    change = strategies.sampled_from(INTERESTING) | strategies.binary(min_size=1, max_size=4)
    place = strategies.integers(0, size - 1)
    return strategies.lists(strategies.tuples(place, change), min_size=1, max_size=4)


@contextmanager
def threads() -> Iterator[tuple[asyncio.Runner, Workers]]:
    """A loop with workers that outlives the many examples of one test."""
    with asyncio.Runner() as runner:
        manager = running_workers()
        workers = runner.run(manager.__aenter__())
        try:
            yield runner, workers
        finally:
            runner.run(manager.__aexit__(None, None, None))


async def everything(path: str, kind: str, workers: Workers) -> bytes:
    """The whole content."""
    disk = await open_image(path, kind, Opening(workers))
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


async def attempt(path: str, kind: str, workers: Workers) -> str:
    """Open and read here and there: "fine", or the DiskError's message."""
    try:
        disk = await open_image(path, kind, Opening(workers))
    except DiskError as error:
        return str(error)
    try:
        for offset in {0, disk.size // 2, max(disk.size - MAX_READ, 0)}:
            length = min(MAX_READ, disk.size - offset)
            await content(disk, offset, length)
            if length:
                await disk.extents(offset, length)
        return "fine"
    except DiskError as error:
        return str(error)
    finally:
        await disk.close()


async def outcome(
    path: Path, good: bytes, changes: list[Mutation], kind: str, workers: Workers
) -> str:
    """``attempt`` on a mutant of ``good``, within a bounded time; one line."""
    mutant = bytearray(good)
    for position, data in changes:
        mutant[position : position + len(data)] = data
    path.write_bytes(mutant)
    async with asyncio.timeout(PATIENCE_S):
        text = await attempt(str(path), kind, workers)
    assert "\n" not in text
    return text
