"""Writing to a mutant that lets itself be opened for writing.

Its tables may lie: refcounts that call the header free, entries that point into tables. So::

    a write that succeeded    reads back at once (within one sector: clusters may be aliases)
    a zero that succeeded     reads as zeroes at once
    afterwards                the image still opens
"""

import errno
import random
from collections.abc import Sequence

from conformance.fuzz.examine import FoundError, check_message
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source

__all__ = ["change"]

CHANGES = 16
REACH = 4 << 20
"""Bytes from the beginning within which changes are made: all that the specimens have."""
SECTOR = 512
LARGE = 150_000


async def change(
    source: str, names: Sequence[str], workers: Workers, rng: random.Random
) -> tuple[int, str]:
    """Open for writing, change, close, open again.

    Returns:
        How many changes succeeded, and the first error of those that did not.

    Raises:
        FoundError: a finding; any other exception is one, too.
    """
    disk = await open_source(parse_source(source), workers, writable=True)
    problem, done = "", 0
    try:
        for _ in range(CHANGES):
            try:
                await _one(disk, rng)
                done += 1
            except DiskError as error:
                if error.errno == errno.EOPNOTSUPP:
                    continue  # what a fast zero may answer
                check_message(error, names)
                problem = problem or str(error)
    finally:
        await disk.close()
    try:
        again = await open_source(parse_source(source), workers)
    except DiskError as error:
        raise FoundError("destroyed", f"after {done} changes: {error}") from error
    await again.close()
    return done, problem


async def _one(disk: Disk, rng: random.Random) -> None:
    end = min(disk.size, REACH)
    kind = rng.choice(("small", "small", "small", "large", "zero", "zero", "trim", "flush"))
    if kind == "flush" or end < SECTOR:
        await disk.flush()
        return
    if kind == "small":
        offset = rng.randrange(end // SECTOR) * SECTOR
        data = rng.randbytes(SECTOR)
        await disk.write(offset, memoryview(data))
        await _expect(disk, offset, data)
        return
    offset = rng.randrange(end)
    length = min(rng.choice((1, SECTOR, 4096, LARGE)), end - offset)
    if kind == "large":
        await disk.write(offset, memoryview(rng.randbytes(length)))
    elif kind == "trim":
        await disk.trim(offset, length)
    else:
        await disk.zero(offset, length, punch=rng.random() < 0.5, fast=rng.random() < 0.2)
        length = min(length, SECTOR - offset % SECTOR)
        await _expect(disk, offset, bytes(length))


async def _expect(disk: Disk, offset: int, data: bytes) -> None:
    found = bytearray(len(data))
    await disk.read_into(offset, memoryview(found))
    if found != data:
        raise FoundError("lost", f"what was written at {offset} does not read back")
