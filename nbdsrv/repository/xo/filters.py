"""How the files of a VHD directory are packed: not at all, by gzip or by brotli.

::

    chunk-filters.json   ["brotli"]      absent: as they are
    header footer bat blocks/0/0 ...     each packed by itself; then encrypted, if the repository is

Rule: whoever unpacks says how long the content may be. A packed file of some bytes can hold
gigabytes, and what is longer than it may be is damaged.
"""

import zlib
from collections.abc import Callable
from typing import Any, cast

import brotli  # type: ignore[import-untyped]
import msgspec
from isal import igzip, isal_zlib

from nbdsrv.errors import CorruptImage, UnsupportedImage

__all__ = ["BROTLI", "FILTERS", "GZIP", "NONE", "filter_file", "filter_of", "pack", "unpack"]

NONE = "none"
GZIP = "gzip"
BROTLI = "brotli"
FILTERS = (NONE, GZIP, BROTLI)

BROTLI_QUALITY = 0
"""As Xen Orchestra itself packs: a third of the time of quality 1."""
GZIP_LEVEL = 1
_GZIP_WINDOW = 31
"""zlib's word for 32 KiB and a gzip header."""
_SHOWN = 60
_BROTLI_ERROR = cast("type[Exception]", brotli.error)
_GZIP_ERROR = cast("type[Exception]", isal_zlib.error)


def filter_of(raw: bytes | None, where: str) -> str:
    """What ``chunk-filters.json`` says.

    Args:
        raw: its content, decrypted; None where there is none.
        where: its path, for messages.

    Raises:
        CorruptImage: it is no list of names.
        UnsupportedImage: a filter nobody here knows.
    """
    if raw is None:
        return NONE
    try:
        names = msgspec.json.decode(raw, type=list[str])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptImage(f"corrupt image: {where} at 0: no list of filters: {error}") from error
    if not names or names == [NONE]:
        return NONE
    if len(names) > 1 or names[0] not in FILTERS:
        shown = repr(names)[:_SHOWN]
        raise UnsupportedImage(f"{where}: blocks packed by {shown} are not read")
    return names[0]


def filter_file(name: str) -> bytes | None:
    """The content of ``chunk-filters.json``; None: there is to be none."""
    return None if name == NONE else msgspec.json.encode([name])


def pack(name: str, data: bytes) -> bytes:
    """Pack one file. Takes milliseconds for a block: for threads."""
    if name == BROTLI:
        return bytes(brotli.compress(data, quality=BROTLI_QUALITY))
    if name == GZIP:
        return bytes(igzip.compress(data, GZIP_LEVEL))
    return data


def unpack(name: str, data: bytes, limit: int, where: str, *, beginning: bool = False) -> bytes:
    """Unpack one file. Takes milliseconds for a block: for threads.

    Args:
        name: one of ``FILTERS``.
        data: decrypted.
        limit: bytes of content, at most.
        where: its path, for messages.
        beginning: the first ``limit`` bytes are wanted, whatever follows them.

    Raises:
        CorruptImage: it is damaged, cut short, or longer than that.
    """
    if name == NONE:
        content, whole = data[: limit + 1], True
    else:
        content, whole = _UNPACK[name](data, limit + 1, where)
    if beginning and len(content) > limit:
        return content[:limit]
    if len(content) > limit:
        raise _corrupt(where, f"it unpacks to more than {limit} bytes")
    if not whole:
        raise _corrupt(where, f"its {name} stream ends early")
    return content


def _gunzip(data: bytes, limit: int, where: str) -> tuple[bytes, bool]:
    """Up to ``limit`` bytes, and did the stream end?"""
    inflater: Any = isal_zlib.decompressobj(wbits=_GZIP_WINDOW)
    try:
        content = inflater.decompress(data, limit)
    except (_GZIP_ERROR, zlib.error, ValueError) as error:
        raise _corrupt(where, f"its gzip stream: {error}") from error
    return content, inflater.eof


def _unbrotli(data: bytes, limit: int, where: str) -> tuple[bytes, bool]:
    inflater: Any = brotli.Decompressor()
    parts: list[bytes] = []
    length = 0
    try:
        while length < limit:
            part = inflater.process(data, output_buffer_limit=limit - length)
            data = b""
            parts.append(part)
            length += len(part)
            if inflater.is_finished() or (not part and inflater.can_accept_more_data()):
                break
    except _BROTLI_ERROR as error:
        raise _corrupt(where, "its brotli stream is damaged") from error
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    return content, inflater.is_finished()


_UNPACK: dict[str, Callable[[bytes, int, str], tuple[bytes, bool]]] = {
    GZIP: _gunzip,
    BROTLI: _unbrotli,
}


def _corrupt(where: str, what: str) -> CorruptImage:
    return CorruptImage(f"corrupt image: {where} at 0: {what}")
