"""What has become of blocks since the map was written: frames behind it, one or more a flush.

::

    map | frame 1 | frame 2 | frame 3 | torn ...            what follows a bad frame is not believed
          magic count number chain crc | record record ...
                                |          first block, blocks << 8 | state
                                '-- crc of the frame before: a frame left over from another time
                                    does not fit behind one that replaced its neighbour

The crc covers the frame and begins with the map's own identity, so that no frame counts in
another overlay or behind another map.

Rule: what a power cut has torn is the end, since a flush is answered once its frames are on the
disk, and the next one's come behind them; and who opens a journal syncs it first. So a bad frame
with a later flush's behind it (``goes_on``) is no torn end but a damaged file, and what follows
must not be cut off.
"""

import zlib
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

__all__ = [
    "FRAME_SIZE",
    "MAX_RECORDS",
    "Frame",
    "Record",
    "frame",
    "frame_size",
    "goes_on",
    "read_frame",
]

MAGIC = b"OVFR"
_HEAD = Struct("<4sIQI")
_CRC = Struct("<I")
_RECORD = Struct("<QQ")

FRAME_SIZE = _HEAD.size + _CRC.size
"""Bytes of a frame without records."""
MAX_RECORDS = 1 << 16
"""Of one frame, a megabyte; a flush with more of them writes several."""
FULL_SIZE = FRAME_SIZE + MAX_RECORDS * _RECORD.size
MAX_TRIES = 1000
"""Places that look like a frame and are none, of which each may cost a megabyte's crc."""

Record = tuple[int, int, int]
"""First block, end (the block behind the last), state."""


class Frame(NamedTuple):
    """One that is whole.

    Attributes:
        records: in the order they count in.
        crc: that the next frame names.
        size: bytes.
    """

    records: list[Record]
    crc: int
    size: int


def frame(records: Sequence[Record], number: int, chain: int, seed: int) -> tuple[bytes, int]:
    """Encode one frame.

    Args:
        records: at most ``MAX_RECORDS``.
        number: of the frame, from 1 on behind each map.
        chain: crc of the one before, 0 for the first.
        seed: of all crcs behind this map.

    Returns:
        The frame and its crc.
    """
    pack = _RECORD.pack
    body = b"".join([pack(first, end - first << 8 | state) for first, end, state in records])
    head = _HEAD.pack(MAGIC, len(records), number, chain)
    crc = zlib.crc32(body, zlib.crc32(head, seed))
    return head + _CRC.pack(crc) + body, crc


def frame_size(head: bytes) -> int:
    """Bytes of the frame that begins like this; 0 if none does."""
    if len(head) < FRAME_SIZE:
        return 0
    magic, count, _, _ = _HEAD.unpack_from(head)
    if magic != MAGIC or not 0 < count <= MAX_RECORDS:
        return 0
    return FRAME_SIZE + int(count) * _RECORD.size


def read_frame(data: bytes, number: int, chain: int, seed: int) -> Frame | None:
    """The frame that ``data`` is, if it is the one expected here, whole and unharmed."""
    if not _is_whole(data, seed):
        return None
    _, _, its_number, its_chain = _HEAD.unpack_from(data)
    if (its_number, its_chain) != (number, chain):
        return None
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    return Frame(list(_records(data)), crc, len(data))


def goes_on(tail: bytes, number: int, seed: int) -> bool:
    """Has the journal been written to after frame ``number``, which ``tail`` begins with, was on
    the disk?

    That is proven by any later frame that is whole, unless all from ``number`` up to it are full:
    those of one flush are, but for its last, and have been on their way together.
    """
    at, tries = tail.find(MAGIC, 1), 0
    while at >= 0 and tries < MAX_TRIES:
        size = frame_size(tail[at : at + FRAME_SIZE])
        data = tail[at : at + size]
        if not size or not _is_whole(data, seed):
            at, tries = tail.find(MAGIC, at + 1), tries + 1
            continue
        its_number = _HEAD.unpack_from(data)[2]
        if its_number > number and at != (its_number - number) * FULL_SIZE:
            return True
        at = tail.find(MAGIC, at + size)
    return False


def _is_whole(data: bytes, seed: int) -> bool:
    """Is it one frame, and unharmed?"""
    size = frame_size(data)
    if not size or size != len(data):
        return False
    view = memoryview(data)
    right = zlib.crc32(view[FRAME_SIZE:], zlib.crc32(view[: _HEAD.size], seed))
    return bool(_CRC.unpack_from(data, _HEAD.size)[0] == right)


def _records(data: bytes) -> Iterator[Record]:
    for first, word in _RECORD.iter_unpack(memoryview(data)[FRAME_SIZE:]):
        yield first, first + (word >> 8), word & 0xFF
