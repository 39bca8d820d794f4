"""Compressed clusters: one cluster of output, exactly, whatever the input claims.

::

    zlib   raw deflate, window of 4 KiB; what follows the stream's end is padding
    zstd   a frame; likewise

Rule: output never exceeds the cluster. A bomb is a stream that wants more room than it may have
and ends as an error, not as memory.
"""

import threading
from collections.abc import Callable
from typing import cast

import zstandard
from isal import isal_zlib

from nbdsrv.formats.qcow2.structs import Compression

__all__ = ["Decompress", "decompressor", "inflate"]

Decompress = Callable[[bytes, int], bytes]
"""(compressed bytes, size) to exactly ``size`` bytes; ValueError says what is wrong."""

RAW_DEFLATE = -15
"""zlib's ``wbits``: no header; the largest window reads what any smaller one wrote."""
MAX_WINDOW = 8 << 20
"""Bytes of history a zstd frame may ask for: what the format says every decoder should have."""


_IsalError = cast("type[Exception]", isal_zlib.error)


class _Decoder(threading.local):
    """Decompressor objects are not thread-safe, and costly to make."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)


_decoder = _Decoder()


def decompressor(kind: Compression) -> Decompress:
    """The function for one type of compression; any thread may call it."""
    return _unzstd if kind is Compression.ZSTD else inflate


def inflate(data: bytes, size: int) -> bytes:
    """Raw deflate."""
    try:
        found: bytes = isal_zlib.decompressobj(RAW_DEFLATE).decompress(data, size)
    except _IsalError as error:
        raise ValueError(f"deflate: {error}") from error
    return _exactly(found, size)


def _unzstd(data: bytes, size: int) -> bytes:
    try:
        # A frame that names its content's size is given that much memory, so look first.
        if zstandard.frame_content_size(data) > size:
            raise ValueError(f"more than {size} bytes in a cluster")
        found = _decoder.zstd.decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return _exactly(found, size)


def _exactly(found: bytes, size: int) -> bytes:
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes instead of {size}")
    return found
