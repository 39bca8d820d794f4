"""Bases for the overlays of these tests: a raw file with holes, and what was written into it."""

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.raw import open_raw
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.opening import open_overlay
from nbdsrv.overlay.overlay import Overlay

__all__ = ["Opener", "Remote", "make_base", "opener"]

Opener = Callable[[], Awaitable[Overlay]]


def make_base(path: Path, size: int, *, seed: int = 1) -> bytes:
    """A sparse raw file of random data; every fourth 64 KiB a hole. Returns its content."""
    content = bytearray(random.Random(seed).randbytes(size))
    for at in range(0, size, 1 << 18):
        length = len(content[at : at + (1 << 16)])
        content[at : at + length] = bytes(length)
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 1 << 16):
            part = content[at : at + (1 << 16)]
            if any(part):
                os.pwrite(file.fileno(), part, at)
    return bytes(content)


class Remote(Passthrough):
    """A base that only ``read_into`` can read, as another server's export."""


def opener(
    workers: Workers,
    base: Path,
    directory: Path,
    *,
    export: str = "disk",
    wrap: type[Passthrough] | None = None,
    files: Files | None = None,
) -> Opener:
    """Opens the overlay of ``export`` in ``directory`` over a raw file."""

    async def open_() -> Overlay:
        below: Disk = await open_raw(str(base), workers, writable=False)
        if wrap is not None:
            below = wrap(workers, below)
        return await open_overlay(below, str(directory), export, str(base), files=files)

    return open_
