"""Opening datastores in tests."""

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.repository.repository import Repository
from nbdsrv.repository.selector import select
from tests.repository.pbs.encoder import CHUNK

__all__ = ["T0", "golden", "open_disk", "opened", "rewritten"]

T0 = 1767225600
"""2026-01-01T00:00:00Z."""


def golden(seed: int = 1, chunks: int = 9, tail: int = 5 * 512) -> bytes:
    """A disk with data of both kinds, zero chunks, and a short last chunk."""
    chance = random.Random(seed)
    pieces = []
    for number in range(chunks):
        kind = number % 3
        if kind == 0:
            pieces.append(chance.randbytes(CHUNK))
        elif kind == 1:
            pieces.append((b"%d words " % seed * CHUNK)[:CHUNK])
        else:
            pieces.append(bytes(CHUNK))
    return b"".join(pieces) + chance.randbytes(tail)


def rewritten(content: bytes, *chunks: int) -> bytes:
    """The same with another first byte in these chunks."""
    changed = bytearray(content)
    for number in chunks:
        changed[number * CHUNK] ^= 0xFF
    return bytes(changed)


@asynccontextmanager
async def opened(root: Path, workers: Workers, scheme: str = "pbs") -> AsyncIterator[Repository]:
    """The repository until the end of the block."""
    source = parse_source(f"{scheme}:{root}")
    repository = await open_repository(source, workers, lambda: passphrase_of(os.environ))
    try:
        yield repository
    finally:
        await repository.close()


async def open_disk(root: Path, workers: Workers, selector: str = "", scheme: str = "pbs") -> Disk:
    """What a selector means; the repository is closed, the disk is not."""
    async with opened(root, workers, scheme) as repository:
        selected = await select(repository, selector)
        return await repository.open_disk(selected.point, selected.disk)
