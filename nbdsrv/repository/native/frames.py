"""A chunk in frames, so that a small read need not unpack all of it.

::

    body    |crc u32| n x (clen u32, check[16]) |frame|frame|frame|frame|
                                                64 KiB of content each; the last one what is left

    frame   one zstd frame, or the content as it is where that saves less than 5 %
    check   XXH3-128 of the frame's content
    crc     CRC-32 of the chunk's id and the table: whose frames these are

A chunk is what is stored once; a frame is what is read. A 4 KiB read of a chunk of 256 KiB unpacks
a quarter of it, and its check takes 3 us where hashing the chunk for its id takes 150. The id is
proven when chunks are verified or copied; a read proves the frame. (Checks find what time does to
bytes. What an enemy does is found in encrypted repositories, where the cipher authenticates.)
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import zstandard
from xxhash import xxh3_128_digest

from nbdsrv.repository.native.zstd import WORTH, BrokenPayload, compressor, decompressor
from nbdsrv.store.store import Data

__all__ = [
    "FRAME",
    "Frame",
    "encode_frames",
    "expand_frames",
    "frame_table",
    "open_frame",
    "table_size",
]

FRAME = 64 << 10
"""Bytes of content: what qcow2 made the habit, and where zstd loses 2 % against 256 KiB."""
_CRC = struct.Struct("<I")
_ROW = struct.Struct("<I16s")


class Frame(NamedTuple):
    """One row of the table.

    Attributes:
        position: where it begins in the body, bytes.
        clen: bytes as it is stored.
        ulen: bytes of its content.
        check: of its content.
    """

    position: int
    clen: int
    ulen: int
    check: bytes


def table_size(ulen: int) -> int:
    """Bytes in front of the first frame of a chunk of ``ulen`` bytes."""
    return _CRC.size + -(-ulen // FRAME) * _ROW.size


def encode_frames(content: memoryview, id_: bytes, level: int) -> bytes:
    """The body for a chunk; ``level`` is zstd's, 0 is not to try."""
    rows: list[bytes] = []
    frames: list[Data] = []
    compress = compressor(level).compress if level else None
    for start in range(0, len(content), FRAME):
        part = content[start : start + FRAME]
        frame: Data = part
        if compress is not None:
            packed = compress(part)
            if len(packed) < len(part) - len(part) // WORTH:
                frame = packed
        rows.append(_ROW.pack(len(frame), xxh3_128_digest(part)))
        frames.append(frame)
    table = b"".join(rows)
    return b"".join((_CRC.pack(zlib.crc32(table, zlib.crc32(id_))), table, *frames))


def frame_table(head: Data, id_: bytes, ulen: int, length: int) -> list[Frame]:
    """The table of a chunk.

    Args:
        head: the body, or at least ``table_size`` bytes of it.
        id_: of the chunk.
        ulen: bytes of its content.
        length: of the body.

    Raises:
        BrokenPayload: it is damaged, or another chunk's.
    """
    size = table_size(ulen)
    if len(head) < size or length < size:
        raise BrokenPayload("it is too short for its table of frames")
    table = bytes(head[_CRC.size : size])
    if _CRC.unpack_from(head)[0] != zlib.crc32(table, zlib.crc32(id_)):
        raise BrokenPayload("its table of frames is damaged")
    found = []
    position, left = size, ulen
    for clen, check in _ROW.iter_unpack(table):
        part = min(left, FRAME)
        if not 0 < clen <= part or position + clen > length:
            raise BrokenPayload("its table of frames names impossible lengths")
        found.append(Frame(position, clen, part, check))
        position += clen
        left -= part
    if position != length:
        raise BrokenPayload("its frames do not fill it")
    return found


def open_frame(frame: Frame, data: Data) -> bytes:
    """The content of a frame; ``data`` is what is stored of it.

    Raises:
        BrokenPayload: it is not what its check says.
    """
    if frame.clen == frame.ulen:
        content = bytes(data)
    else:
        try:
            # The frame's own word for its size is what would be allocated: ask before.
            if zstandard.frame_content_size(data) != frame.ulen:
                raise BrokenPayload("a frame of another length")
            content = decompressor().decompress(data)
        except zstandard.ZstdError as error:
            raise BrokenPayload(f"zstd: {error}") from error
    if xxh3_128_digest(content) != frame.check:
        raise BrokenPayload("a frame is not what its check says")
    return content


def expand_frames(body: Data, id_: bytes, ulen: int) -> bytes:
    """All of a chunk, frame by frame proven.

    Raises:
        BrokenPayload: a frame or the table is damaged.
    """
    return b"".join(_frames(body, id_, ulen))


def _frames(body: Data, id_: bytes, ulen: int) -> Iterator[bytes]:
    view = memoryview(body)
    for frame in frame_table(view, id_, ulen, len(view)):
        yield open_frame(frame, view[frame.position : frame.position + frame.clen])
