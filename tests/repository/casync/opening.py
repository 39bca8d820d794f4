"""Opening casync's images in tests."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.repository import Repository
from nbdsrv.repository.selector import select

__all__ = ["golden", "open_disk", "opened"]


def golden() -> bytes:
    """Random data, text, and a long hole; an odd size."""
    chance = random.Random(9)
    words = b"the same words again and again " * 10_000
    return chance.randbytes(300_000) + bytes(1 << 20) + words + chance.randbytes(1001)


@asynccontextmanager
async def opened(path: Path, workers: Workers) -> AsyncIterator[Repository]:
    """The repository until the end of the block."""
    repository = await open_repository(parse_source(f"casync:{path}"), workers)
    try:
        yield repository
    finally:
        await repository.close()


async def open_disk(path: Path, workers: Workers, selector: str = "") -> Disk:
    """What a selector means; the repository is closed, the disk is not."""
    async with opened(path, workers) as repository:
        selected = await select(repository, selector)
        return await repository.open_disk(selected.point, selected.disk)
