"""Opening repositories in tests as programs do."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.repository import Point
from nbdsrv.repository.selector import select
from nbdsrv.repository.xo.repository import XoRepository, open_xo
from tests.disk.reading import content
from tests.repository.xo.made import KEY

__all__ = ["contents", "digest", "opened", "opener"]

STEP = 3 << 20


@asynccontextmanager
async def opened(root: Path | str, workers: Workers, key: str = KEY) -> AsyncIterator[XoRepository]:
    """The repository in a directory, or of a whole SOURCE."""
    text = root if isinstance(root, str) else f"xo:{root}"
    repository = await open_xo(parse_source(text), workers, lambda: key)
    try:
        yield repository
    finally:
        await repository.close()


async def digest(disk: Disk, size: int | None = None) -> str:
    """SHA-256 of the disk, or of its first ``size`` bytes; closes it."""
    found = hashlib.sha256()
    end = disk.size if size is None else size
    try:
        for at in range(0, end, STEP):
            found.update(await content(disk, at, min(STEP, end - at)))
    finally:
        await disk.close()
    return found.hexdigest()


async def contents(repository: XoRepository, selector: str) -> bytes:
    """All of the disk a selector means."""
    chosen = await select(repository, selector)
    disk = await repository.open_disk(chosen.point, chosen.disk)
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


def opener(repository: XoRepository, point: Point, name: str) -> Callable[[], Awaitable[Disk]]:
    """For ``check_disk``."""
    return lambda: repository.open_disk(point, name)
