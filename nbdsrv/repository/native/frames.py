"""A chunk in frames, so that a small read need not fetch and unpack all of it.

::

    payload |n x u16 length|frame|check|frame|check| ...        n = bytes of the chunk / 32 KiB, up
             0: not packed  |<- position + stored ->|

    frame   32 KiB of content, the last one what is left: one zstd frame of so many bytes, or, where
            that saves less than 5 % (length 0), the content as it is; encrypted, if the pack is
    check   16 bytes. Plain: XXH3-128 of the content, seeded by the chunk's id and the frame's
            number. Encrypted: AES-GCM's tag, which authenticates both

A chunk is what is stored once; a frame is what is read. Whoever has the lengths, and they stand in
the map's slots, gets a frame by *one* read: its check tells whose it is, so neither the entry's
header nor the table in front has to be looked at. A 4 KiB read of a chunk of 256 KiB unpacks an
eighth of it, and its check takes 1 us where hashing the chunk for its id takes 150. The id is
proven when chunks are verified or copied; a read proves the frame. (Checks find what time does to
bytes. What an enemy does is found in encrypted repositories.)
"""

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import zstandard
from xxhash import xxh3_128_digest

from nbdsrv.repository.native.sealing import TAG_SIZE, BrokenPayload, Seal
from nbdsrv.repository.native.zstd import compressor, decompressor, is_worth_it
from nbdsrv.store.store import Data

__all__ = [
    "FRAME",
    "Framed",
    "enclose_frames",
    "encode_frames",
    "expand_frames",
    "frame_count",
    "frame_span",
    "is_raw",
    "lengths_size",
    "open_frame",
    "open_frames",
    "table_of",
]

FRAME = 32 << 10
"""Bytes of content. Of 64 KiB ones zstd makes 2 to 3 % less; they take 49 us to unpack, these 27,
and twice as many bytes have to be fetched for a small read."""
SAMPLE = 4 << 10
"""Bytes of a frame that zstd tries after one that it could not pack: what is random, packed or
encrypted already seldom comes alone, and to find that out of all of it takes five times as long."""
CHECK_SIZE = TAG_SIZE
_NUMBER = struct.Struct("<I")
_SEED = struct.Struct("<Q")
_MASK = (1 << 64) - 1


class Framed(NamedTuple):
    """A chunk that is packed and not enclosed yet.

    Attributes:
        lengths: of its frames, as slots have them: without the zeroes at the end.
        frames: each packed, or as it is.
        checks: of each, for a pack that is not encrypted.
    """

    lengths: bytes
    frames: Sequence[Data]
    checks: Sequence[bytes]


@lru_cache
def _lengths_form(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}H")


def frame_count(ulen: int) -> int:
    """Frames of a chunk of ``ulen`` bytes."""
    return -(-ulen // FRAME)


def lengths_size(ulen: int) -> int:
    """Bytes of the lengths of its frames."""
    return 2 * frame_count(ulen)


def encode_frames(content: memoryview, id_: bytes, level: int) -> Framed:
    """Pack a chunk; ``level`` is zstd's, 0 is not to try."""
    compress = compressor(level).compress if level else None
    hopeless = False
    seed = _SEED.unpack_from(id_)[0]
    lengths: list[int] = []
    frames: list[Data] = []
    checks: list[bytes] = []
    for number, start in enumerate(range(0, len(content), FRAME)):
        part = content[start : start + FRAME]
        frame: Data = part
        length = 0
        if compress is not None and not (hopeless and _is_noise(compress, part)):
            packed = compress(part)
            hopeless = not is_worth_it(packed, part)
            if not hopeless:
                frame, length = packed, len(packed)
        lengths.append(length)
        frames.append(frame)
        checks.append(xxh3_128_digest(part, (seed + number) & _MASK))
    table = _lengths_form(len(lengths)).pack(*lengths)
    return Framed(table.rstrip(b"\0"), frames, checks)


def _is_noise(compress: Callable[[memoryview], bytes], part: memoryview) -> bool:
    """Does its middle say that it is like the frame before, which was not worth packing?"""
    middle = len(part) // 2
    sample = part[middle : middle + SAMPLE]
    return not is_worth_it(compress(sample), sample)


def enclose_frames(framed: Framed, seal: Seal, offset: int, id_: bytes, ulen: int) -> bytes:
    """The payload of the entry at ``offset`` of a pack."""
    parts: list[Data] = [framed.lengths.ljust(lengths_size(ulen), b"\0")]
    for number, frame in enumerate(framed.frames):
        if seal.encrypts:
            parts.append(seal.close(offset, number, id_ + _NUMBER.pack(number), frame))
        else:
            parts += (frame, framed.checks[number])
    return b"".join(parts)


def frame_span(lengths: bytes, ulen: int, number: int) -> tuple[int, int]:
    """(position in the payload, bytes with its check) of a frame.

    Args:
        lengths: as slots have them.
        ulen: bytes of the chunk.
        number: of the frame.

    Raises:
        BrokenPayload: the lengths cannot be.
    """
    count = frame_count(ulen)
    if len(lengths) > 2 * count or not 0 <= number < count:
        raise BrokenPayload("more frames than it has content")
    sizes = _lengths_form(count).unpack(lengths.ljust(2 * count, b"\0"))
    own, part = sizes[number], min(FRAME, ulen - number * FRAME)
    before = sizes[:number]  # all of which have FRAME bytes of content
    if own >= part or (before and max(before) >= FRAME):
        raise BrokenPayload("a frame that is longer than its content")
    position = 2 * count + sum(before) + FRAME * before.count(0) + number * CHECK_SIZE
    return position, (own or part) + CHECK_SIZE


def is_raw(lengths: bytes, number: int) -> bool:
    """Is that frame stored as it is?"""
    return not any(lengths[2 * number : 2 * number + 2])


def table_of(payload: Data, ulen: int) -> bytes:
    """The lengths in front of a payload, as slots have them; b"" where it is too short."""
    size = lengths_size(ulen)
    return bytes(payload[:size]).rstrip(b"\0") if len(payload) >= size else b""


def open_frame(
    seal: Seal, offset: int, id_: bytes, ulen: int, number: int, piece: Data, *, raw: bool
) -> bytes:
    """The content of a frame.

    Args:
        seal: of its pack.
        offset: of its entry in the pack.
        id_: of its chunk.
        ulen: bytes of the chunk.
        number: of the frame.
        piece: what is stored of it, the check included.
        raw: is it not packed?

    Raises:
        BrokenPayload: it is not that frame of that chunk.
    """
    return _open(seal, offset, id_, ulen, number, piece, raw=raw)[0]


def _open(
    seal: Seal, offset: int, id_: bytes, ulen: int, number: int, piece: Data, *, raw: bool
) -> tuple[bytes, Data]:
    """The content, and the frame it was packed as."""
    frame: Data
    if seal.encrypts:
        frame = seal.open(offset, number, id_ + _NUMBER.pack(number), piece)
    else:
        frame = memoryview(piece)[:-CHECK_SIZE]
    length = min(FRAME, ulen - number * FRAME)
    if raw:
        content = bytes(frame)
    else:
        try:
            # The frame's own word for its size is what would be allocated: ask before.
            if zstandard.frame_content_size(frame) != length:
                raise BrokenPayload("a frame of another length")
            content = decompressor().decompress(frame)
        except zstandard.ZstdError as error:
            raise BrokenPayload(f"zstd: {error}") from error
    if len(content) != length:
        raise BrokenPayload("a frame of another length")
    if not seal.encrypts:
        seed = (_SEED.unpack_from(id_)[0] + number) & _MASK
        if xxh3_128_digest(content, seed) != piece[-CHECK_SIZE:]:
            raise BrokenPayload("a frame is not what its check says")
    return content, frame


def expand_frames(
    lengths: bytes, payload: Data, seal: Seal, offset: int, id_: bytes, ulen: int
) -> bytes:
    """All of a chunk, each frame proven; that they make the content of its id is not.

    Args:
        lengths: as slots have them; in the payload itself they are not looked at.
        payload: of the entry.
        seal: of the pack.
        offset: of the entry in the pack.
        id_: of the chunk.
        ulen: bytes of it.

    Raises:
        BrokenPayload: a frame is damaged, or the lengths cannot be.
    """
    return b"".join([part for part, _ in _walk(lengths, payload, seal, offset, id_, ulen)])


def open_frames(
    payload: Data, seal: Seal, offset: int, id_: bytes, ulen: int
) -> tuple[bytes, Framed]:
    """The content of a chunk, and what another pack can take, by the payload's own table.

    Raises:
        BrokenPayload: a frame or the table is damaged.
    """
    lengths = table_of(payload, ulen)
    found = _walk(lengths, payload, seal, offset, id_, ulen)
    seed = _SEED.unpack_from(id_)[0]
    checks = [xxh3_128_digest(part, (seed + n) & _MASK) for n, (part, _) in enumerate(found)]
    content = b"".join([part for part, _ in found])
    return content, Framed(lengths, [frame for _, frame in found], checks)


def _walk(
    lengths: bytes, payload: Data, seal: Seal, offset: int, id_: bytes, ulen: int
) -> list[tuple[bytes, Data]]:
    if len(payload) < lengths_size(ulen):  # before anything is made of ``ulen``
        raise BrokenPayload("it is too short for its frames")
    sizes = _sizes(lengths, ulen)
    at = 2 * len(sizes)
    if len(payload) != at + sum(sizes) + len(sizes) * CHECK_SIZE:
        raise BrokenPayload("its frames do not fill it")
    view, found = memoryview(payload), []
    for number, size in enumerate(sizes):
        piece = view[at : at + size + CHECK_SIZE]
        raw = is_raw(lengths, number)
        found.append(_open(seal, offset, id_, ulen, number, piece, raw=raw))
        at += size + CHECK_SIZE
    return found


def _sizes(lengths: bytes, ulen: int) -> list[int]:
    """Bytes of each frame as it is stored, without its check."""
    count = frame_count(ulen)
    if len(lengths) > 2 * count:
        raise BrokenPayload("more frames than it has content")
    found = list(_lengths_form(count).unpack(lengths.ljust(2 * count, b"\0")))
    for number, length in enumerate(found):
        part = min(FRAME, ulen - number * FRAME)
        if length >= part:
            raise BrokenPayload("a frame that is longer than its content")
        if not length:
            found[number] = part
    return found
