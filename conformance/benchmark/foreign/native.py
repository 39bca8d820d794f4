"""The first byte of a point of our own repository, beside those of other tools.

A hundred backups of a sparse raw file of 1 TiB, 2 MiB of it changed between any two.
"""

import random
import shutil
import sys
from pathlib import Path

from conformance import process
from conformance.benchmark.foreign.rows import row
from conformance.benchmark.foreign.served import first_byte_of
from conformance.process import PROJECT
from conformance.server import server_environment

__all__ = ["first_byte"]

SIZE = 1 << 40
POINTS = 100
CHANGED = 2 << 20


@row("native: first byte, 1 TiB sparse, 100 points", "ms", bar=300)
def first_byte(cache: str) -> dict[str, float]:
    """A new server, and one read by a new client."""
    return first_byte_of(f"repo:{_repository(Path(cache))}", "vm/disk@latest")


def _repository(cache: Path) -> Path:
    root, done, disk = cache / "native-sparse", cache / "native-sparse.done", cache / "disk.raw"
    if done.exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    chance = random.Random(1)
    with disk.open("wb") as file:
        file.truncate(SIZE)
        file.write(chance.randbytes(CHANGED))
    _nbdsrv("init", f"repo:{root}")
    for _ in range(POINTS):
        with disk.open("r+b") as file:
            file.seek(chance.randrange(SIZE // CHANGED) * CHANGED)
            file.write(chance.randbytes(CHANGED))
        _nbdsrv("backup", f"raw:{disk}", "--to", f"repo:{root}", "--group", "vm", "--quiet")
    disk.unlink()
    done.touch()
    return root


def _nbdsrv(*words: str) -> None:
    command = [sys.executable, "-m", "nbdsrv", *words]
    process.run(command, directory=PROJECT, timeout_s=120, environment=server_environment())
