"""One program on the clock, until what it wrote is on the disk; and files made cold.

Rule: the clock runs from the start of the program until the file system of its directory is
synced. Some programs sync what they write, others leave that to the kernel: all are charged for
the same durability, and nobody for the dirty pages of the one before.
"""

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conformance.benchmark import image
from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.servers import stop

__all__ = ["Timed", "chill", "run", "size_of", "sync", "timed"]

TIMEOUT_S = 1800
STILL_RESIDENT = 0.01
"""The part of a cold directory that may stay in the page cache: pages somebody holds."""


@dataclass(frozen=True, slots=True)
class Timed:
    """How long a program took, and what it printed."""

    seconds: float
    output: str


def run(
    command: Sequence[str],
    *,
    directory: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a program prints; raises BenchmarkError when it fails."""
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BenchmarkError(f"{command[0]}: {error}") from error
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{command[0]}: {error}") from error
    finally:
        stop(process)  # gently: some have children of their own to stop
    if process.returncode:
        said = (err.strip() or out.strip())[-400:]
        raise BenchmarkError(f"{' '.join(command)[:200]}: exit code {process.returncode}: {said}")
    return out


def timed(
    command: Sequence[str],
    *,
    directory: str,
    environment: Mapping[str, str] | None = None,
) -> Timed:
    """Run a program; the time ends when the file system of ``directory`` is synced."""
    sync(directory)
    start = time.monotonic()
    output = run(command, directory=directory, environment=environment)
    sync(directory)
    return Timed(time.monotonic() - start, output)


def sync(directory: str) -> None:
    """syncfs(2), which Python does not have."""
    syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    fd = os.open(directory, os.O_RDONLY)
    try:
        if syncfs(fd):
            raise BenchmarkError(f"{directory}: syncfs: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


def chill(directory: str) -> None:
    """Drop all files below ``directory`` from the page cache.

    Raises BenchmarkError when they stay: the cell would not be cold.
    """
    sync(directory)  # dirty pages cannot be dropped
    for path in _files(directory):
        image.evict(path)
    sizes = {path: os.path.getsize(path) for path in _files(directory)}
    kept = sum(size * image.resident(path) for path, size in sizes.items() if size)
    if kept > STILL_RESIDENT * sum(sizes.values()):
        raise BenchmarkError(f"{directory}: {kept / 2**20:.1f} MiB stay in the page cache")


def size_of(directory: str) -> int:
    """Bytes in all files below ``directory``."""
    return sum(os.path.getsize(path) for path in _files(directory))


def _files(directory: str) -> Iterator[str]:
    for where, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(where, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield path
