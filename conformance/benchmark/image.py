"""The files under test: made once, warmed and proven resident, copied, evicted.

Rule: every plain cell measures servers, not disks. An image is therefore fully allocated
random data (no server can win by knowing a hole), and before every run it is brought into the
page cache and its residency checked with mincore(2), which, unlike a probe with RWF_NOWAIT,
starts no read-ahead of its own.
"""

import ctypes
import mmap
import os
import random
import shutil

from conformance.benchmark.report import BenchmarkError

__all__ = ["PIECE", "copy_of", "evict", "make", "require_space", "resident", "settle", "warm"]

PIECE = 4 << 20
"""Bytes written or read at a time while an image is made or warmed."""

ENOUGH = 0.999
"""The part of an image that has to be resident to call it warm; the rest is noise."""

PASSES = 3
"""Times an image is read to warm it; other work on the machine may push pages out meanwhile."""

SPARE = 256 << 20
"""Bytes of disk left free beside what an image needs."""


def make(directory: str, name: str, size: int, seed: int) -> str:
    """The path of a ``size`` bytes long file of seeded random data, made unless it is there.

    It is written under another name first, so an interrupted run leaves no short image.
    """
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, f"{name}-{size}.raw")
    if os.path.exists(path) and os.path.getsize(path) == size:
        return path
    require_space(directory, size)
    source = random.Random(seed)
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.writelines(
            source.randbytes(min(PIECE, size - offset)) for offset in range(0, size, PIECE)
        )
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    return path


def copy_of(path: str, directory: str) -> str:
    """A fully allocated copy of an image in ``directory``, for the cells that write."""
    os.makedirs(directory, exist_ok=True)
    target = os.path.join(directory, "written.raw")
    require_space(directory, os.path.getsize(path))
    with open(path, "rb") as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, PIECE)
    settle(target)
    return target


def settle(path: str) -> None:
    """Write a file's dirty pages out, so that their writeback disturbs no later cell."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def warm(path: str) -> None:
    """Bring a file into the page cache.

    Raises BenchmarkError when it does not stay there.
    """
    buffer = bytearray(PIECE)
    for _ in range(PASSES):
        if resident(path) >= ENOUGH:
            return
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    part = resident(path)
    if part < ENOUGH:
        raise BenchmarkError(
            f"{path}: only {part:.1%} of it stays in the page cache; use a smaller --size"
        )


def evict(path: str) -> None:
    """Drop a file's clean pages from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident(path: str) -> float:
    """The part of a file, 0 to 1, that is in the page cache now."""
    size = os.path.getsize(path)
    pages = -(-size // mmap.PAGESIZE)
    state = (ctypes.c_ubyte * pages)()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        failed = mincore(ctypes.addressof(first), size, state)
        del first  # mmap refuses to close while a buffer of it is exported
    if failed:
        raise BenchmarkError(f"{path}: mincore: {os.strerror(ctypes.get_errno())}")
    # Bit 0 says resident; the other bits are reserved.
    return bytes(state).translate(bytes(n & 1 for n in range(256))).count(1) / pages


def require_space(directory: str, size: int) -> None:
    """Raises BenchmarkError when ``size`` bytes more would fill the disk."""
    free = shutil.disk_usage(directory).free
    if free < size + SPARE:
        raise BenchmarkError(
            f"{directory}: {free >> 20} MiB free, {(size + SPARE) >> 20} MiB needed;"
            " use --cache DIR or a smaller --size"
        )
