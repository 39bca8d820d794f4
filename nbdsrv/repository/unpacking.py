"""Unpacking what other tools have compressed, never to more than is expected.

::

    28 B5 2F FD   zstd      a frame may or may not tell its length: what it tells is not believed
    FD 37 7A 58   xz        LZMA2, with a bound on its dictionary
    1F 8B         gzip

Rule: the caller knows how long the result may be, from an index. A bomb costs that much memory and
no more.
"""

import lzma
import zlib

import zstandard

from nbdsrv.repository.native.zstd import BrokenPayload, decompressor

__all__ = ["BrokenPayload", "packed_as", "ungzip", "unpack", "unxz", "unzstd"]

MAX_DICTIONARY = 96 << 20
"""Bytes an xz stream may ask for; its highest preset asks for 65 MiB."""

_MAGICS = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz"}
_GZIP = b"\x1f\x8b"


def packed_as(data: bytes | memoryview) -> str:
    """``zstd``, ``xz``, ``gzip``, or "" for what begins like none of them."""
    return "gzip" if data[:2] == _GZIP else _MAGICS.get(bytes(data[:4]), "")


def unpack(data: bytes | memoryview, limit: int) -> bytes:
    """What ``data`` holds, whichever of the three it is. Blocking; any thread.

    Raises:
        BrokenPayload: it is none of them, broken, or longer than ``limit``.
    """
    kind = packed_as(data)
    if not kind:
        raise BrokenPayload("it is neither zstd nor xz nor gzip")
    return {"zstd": unzstd, "xz": unxz, "gzip": ungzip}[kind](data, limit)


def unzstd(data: bytes | memoryview, limit: int) -> bytes:
    """One zstd frame, whether or not it tells its length.

    Raises:
        BrokenPayload: as ``unpack``.
    """
    try:
        told = zstandard.get_frame_parameters(data).content_size
        if told in {0, zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR}:
            # Bounded by us; one byte more than allowed, so that too long is told from broken.
            found = decompressor().decompress(data, max_output_size=limit + 1)
        elif told > limit:
            raise BrokenPayload(f"it would unpack to {told} bytes, not {limit}")
        else:
            found = decompressor().decompress(data)
    except (zstandard.ZstdError, MemoryError) as error:
        if "full frame" in str(error):
            text = f"it is cut short, or unpacks to more than {limit} bytes"
            raise BrokenPayload(text) from error
        raise BrokenPayload(f"it does not unpack: {error}") from error
    return _bounded(found, limit)


def unxz(data: bytes | memoryview, limit: int) -> bytes:
    """One xz stream.

    Raises:
        BrokenPayload: as ``unpack``.
    """
    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_DICTIONARY)
        found = stream.decompress(data, limit + 1)
        while not stream.eof and not stream.needs_input and len(found) <= limit:
            more = stream.decompress(b"", limit + 1 - len(found))
            if not more:
                break
            found += more
    except (lzma.LZMAError, MemoryError) as error:
        raise BrokenPayload(f"it does not unpack: {error}") from error
    return _whole(found, limit, ended=stream.eof)


def ungzip(data: bytes | memoryview, limit: int) -> bytes:
    """One gzip member.

    Raises:
        BrokenPayload: as ``unpack``.
    """
    stream = zlib.decompressobj(31)
    try:
        found = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise BrokenPayload(f"it does not unpack: {error}") from error
    return _whole(found, limit, ended=stream.eof)


def _whole(found: bytes, limit: int, *, ended: bool) -> bytes:
    _bounded(found, limit)
    if not ended:
        raise BrokenPayload("it does not unpack: it is cut short")
    return found


def _bounded(found: bytes, limit: int) -> bytes:
    if len(found) > limit:
        raise BrokenPayload(f"it unpacks to more than {limit} bytes")
    return found
