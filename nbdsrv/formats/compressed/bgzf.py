"""BGZF: gzip in members of at most 64 KiB, each of which tells its own size (bgzip).

::

    file   |m|m|m|m|m|m|m|m|m|m|m|m|         26 bytes are read of each: size, and what it unpacks to
    disk   |   block 0   |  block 1  |       members together until there are 256 KiB

Nothing is inflated for the index. Every member's checksum is verified when it is read. The last
member is an empty one; without it the file has been cut short.
"""

from array import array
from collections.abc import Generator
from struct import Struct
from typing import cast

from construct import ConstructError
from isal import isal_zlib

from nbdsrv.formats.compressed.source import MAX_BLOCKS, BlockSource
from nbdsrv.formats.compressed.structs import BgzfHeader
from nbdsrv.formats.image_file import ImageFile

__all__ = ["BgzfSource", "is_bgzf", "survey_bgzf"]

LEAST_BLOCK = 256 << 10
"""Bytes of the disk in a block at least; doubled where there would be too many blocks."""
MAX_MEMBER = 64 << 10
"""Bytes of the disk in a member: more would not be BGZF."""
HEADER_SIZE = BgzfHeader.sizeof()
LEAST_MEMBER = HEADER_SIZE + 8
"""A header and a trailer."""
MEMBERS_A_STEP = 256

_BROKEN = cast("type[Exception]", isal_zlib.error)
"""Its stubs take the class for an instance."""
_LOOK = Struct(f"<4s6x6sH{HEADER_SIZE - 18}x")
"""The same as BgzfHeader, for every one of millions of members."""
_FIRST, _EXTRA = b"\x1f\x8b\x08\x04", b"\6\0BC\2\0"


class BgzfSource(BlockSource):
    """Blocks of some BGZF members each."""

    def __init__(
        self, file: ImageFile, starts: "array[int]", positions: "array[int]", size: int
    ) -> None:
        """``positions`` has one more than ``starts``: the end of the last block."""
        self._file = file
        self.starts = starts
        self._positions = positions
        self.size = size
        self.facts = {"compression": "gzip", "blocks": len(starts), "index": "bgzf"}

    def decode(self, number: int) -> bytes:
        begin, end = self._positions[number], self._positions[number + 1]
        stored = memoryview(self._file.read(begin, end - begin, "a block"))
        parts, at = [], 0
        while at < len(stored):
            size = _member_size(stored[at : at + HEADER_SIZE])
            parts.append(self._inflate(stored[at : at + size], begin + at))
            at += size or len(stored)
        data = b"".join(parts)
        if len(data) != self.end(number) - self.starts[number]:
            raise self._file.corrupt(begin, f"a block that unpacks to {len(data)} bytes")
        return data

    def _inflate(self, member: memoryview, position: int) -> bytes:
        state = isal_zlib.decompressobj(wbits=31)
        try:
            data = state.decompress(member, MAX_MEMBER + 1)
        except _BROKEN as error:
            raise self._file.corrupt(position, f"a broken gzip member ({error})") from error
        if not state.eof:
            raise self._file.corrupt(position, "a gzip member that does not end where it says")
        return data


def is_bgzf(file: ImageFile) -> bool:
    """Does it begin like BGZF?"""
    try:
        BgzfHeader.parse(file.read_up_to(0, HEADER_SIZE))
    except ConstructError:
        return False
    return True


def survey_bgzf(file: ImageFile) -> Generator[None, None, BlockSource | None]:
    """Go from member to member; None if some member is not BGZF, or there are too many."""
    starts, positions = array("Q"), array("Q")
    least, at, offset, block_start = LEAST_BLOCK, 0, 0, -LEAST_BLOCK
    members, unpacked = 0, 1
    while at < file.size:
        size = _member_size(file.read_up_to(at, HEADER_SIZE))
        if size < LEAST_MEMBER or at + size > file.size:
            return None
        unpacked = int.from_bytes(file.read(at + size - 4, 4, "a member's size"), "little")
        if unpacked > MAX_MEMBER:
            return None
        if unpacked and offset - block_start >= least:
            if len(starts) >= MAX_BLOCKS:
                del starts[1::2], positions[1::2]
                least *= 2
            starts.append(offset)
            positions.append(at)
            block_start = offset
        at += size
        offset += unpacked
        members += 1
        if not members % MEMBERS_A_STEP:
            yield
    if unpacked:  # bgzip ends with a member of nothing, for whoever wonders
        raise file.corrupt(at, "no end marker, was the file cut short?")
    positions.append(at)
    return BgzfSource(file, starts, positions, offset)


def _member_size(header: bytes | memoryview) -> int:
    """Bytes of the member that begins so; 0 if it is not BGZF."""
    if len(header) < HEADER_SIZE:
        return 0
    first, extra, last = _LOOK.unpack(header)
    return last + 1 if first == _FIRST and extra == _EXTRA else 0
