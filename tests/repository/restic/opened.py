"""Opening a repository as every command does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.repository import Point, Repository
from tests.disk.reading import content

__all__ = ["everything", "opened", "point_of"]


@asynccontextmanager
async def opened(
    path: Path | str, workers: Workers, selector: str = "", scheme: str = "restic"
) -> AsyncIterator[Repository]:
    """A repository, until the end of the block."""
    text = f"{scheme}:{path}" + (f"#{selector}" if selector else "")
    repository = await open_repository(parse_source(text), workers)
    try:
        yield repository
    finally:
        await repository.close()


async def point_of(repository: Repository, id_: str) -> Point:
    """By its id."""
    return next(point for point in await repository.points() if point.id == id_)


async def everything(repository: Repository, point: Point, name: str) -> bytes:
    """The whole content of a disk."""
    disk = await repository.open_disk(point, name)
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()
