"""Which clusters of a piece of data are zeroes, and how small the others can be made.

Rule: comparing is done with ``bytes``; comparing a memoryview is forty times slower.
"""

import threading
import zlib
from collections.abc import Callable, Iterator

import zstandard
from isal import isal_zlib

from nbdsrv.formats.qcow2.structs import Compression
from nbdsrv.formats.qcow2.writer_shape import DEFAULT_LEVELS, Shape

__all__ = ["Compress", "compressor", "data_runs"]

Compress = Callable[[bytes | memoryview], bytes]

WINDOW_BITS = -12
"""Raw deflate with a window of 4 KiB: QEMU inflates with no more."""
MAX_ISAL_LEVEL = 3
MEMORY_LEVEL = 8
"""zlib's default."""


def data_runs(data: memoryview, cluster_size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in ``data`` of its clusters that are not all zero, neighbours joined."""
    zeroes = bytes(cluster_size)
    total = len(data)
    begin = end = 0
    for at in range(0, total, cluster_size):
        after = min(at + cluster_size, total)
        # Most data shows at a glance; what does not is copied, which costs microseconds.
        if (
            data[at] | data[after - 1] | data[(at + after) >> 1]
            or bytes(data[at:after]) != zeroes[: after - at]
        ):
            if end != at:
                if end > begin:
                    yield begin, end - begin
                begin = at
            end = after
    if end > begin:
        yield begin, end - begin


def compressor(shape: Shape) -> Compress:
    """A function that compresses one cluster; any number of threads may call it at once."""
    kind = shape.compression or Compression.ZLIB
    level = shape.level or DEFAULT_LEVELS[kind]
    if kind == Compression.ZSTD:
        return _zstd(level)
    return _isal(level) if level <= MAX_ISAL_LEVEL else _zlib(level)


def _isal(level: int) -> Compress:
    def compress(data: bytes | memoryview) -> bytes:
        stream = isal_zlib.compressobj(level, isal_zlib.DEFLATED, WINDOW_BITS)
        return b"".join((stream.compress(data), stream.flush()))

    return compress


def _zlib(level: int) -> Compress:
    def compress(data: bytes | memoryview) -> bytes:
        stream = zlib.compressobj(level, zlib.DEFLATED, WINDOW_BITS, MEMORY_LEVEL)
        return b"".join((stream.compress(data), stream.flush()))

    return compress


def _zstd(level: int) -> Compress:
    threads = threading.local()  # a ZstdCompressor is for one thread at a time

    def compress(data: bytes | memoryview) -> bytes:
        stream = getattr(threads, "stream", None)
        if stream is None:
            stream = threads.stream = zstandard.ZstdCompressor(level=level)
        return bytes(stream.compress(data))

    return compress
