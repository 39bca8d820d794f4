"""zstd: frames are found by the seek table, or by going from block header to block header.

::

    file   |#### frame ####|## frame ##|skippable|### frame ###|seek table|
                                        ignored                 size of each frame, and of what
    disk   |     block 0     | block 1 |         |   block 2   |           it unpacks to

A frame is a block. Without a seek table every frame's header has to tell its content's size; pzstd,
t2sz and ``zstd`` given a file write that. zstd verifies a frame's checksum where it has one.
"""

import sys
from array import array
from collections.abc import Generator, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import zstandard
from construct import ConstructError

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.compressed.source import MAX_BLOCK, MAX_BLOCKS, BlockSource
from nbdsrv.formats.compressed.structs import (
    SKIPPABLE_MAGIC,
    ZSTD_MAGIC,
    SeekTableFooter,
    ZstdBlock,
)
from nbdsrv.formats.image_file import MAX_METADATA, ImageFile

__all__ = ["MAX_WINDOW", "Frame", "ZstdSource", "frames", "survey_zstd"]

MAX_WINDOW = 128 << 20
"""Bytes of history a frame may need: that of ``--long=27``, and what zstd itself accepts."""
MAX_FRAME_HEADER = 18
MAX_ZSTD_BLOCK = 128 << 10
HEADERS_A_STEP = 256
MAX_EMPTY = 1 << 12
"""Blocks of nothing in a row: a flush makes one. A hole in the file looks like any number."""
SKIPPABLE_HEADER = 8
RAW, RLE, COMPRESSED, RESERVED = range(4)


class Frame(NamedTuple):
    """A frame in the file; ``length`` is CONTENTSIZE_UNKNOWN where it does not tell."""

    begin: int
    end: int
    length: int


class ZstdSource(BlockSource):
    """The frames of a file."""

    def __init__(self, file: ImageFile, index: str) -> None:
        self._file = file
        self.starts: array[int] = array("Q")
        self.size = 0
        self._positions = array("Q")
        self._lengths = array("Q")
        self.facts: dict[str, object] = {"compression": "zstd", "index": index}

    def add(self, frame: Frame) -> bool:
        """The next frame; False if it is more than can be had as a block."""
        position, stored, length = frame.begin, frame.end - frame.begin, frame.length
        if length > MAX_BLOCK or stored > MAX_METADATA * 2 or len(self.starts) >= MAX_BLOCKS:
            return False
        if length:
            self.starts.append(self.size)
            self._positions.append(position)
            self._lengths.append(stored)
            self.size += length
            self.facts["blocks"] = len(self.starts)
        return True

    def memory(self, number: int) -> int:
        """The frame, stored and decoded."""
        return self._lengths[number] + self.end(number) - self.starts[number]

    def decode(self, number: int) -> bytes:
        position, stored = self._positions[number], self._lengths[number]
        length = self.end(number) - self.starts[number]
        half = min(stored, MAX_METADATA)
        frame = self._file.read(position, half, "a zstd frame")
        if half < stored:
            frame += self._file.read(position + half, stored - half, "a zstd frame")
        try:
            # Where the header tells another size, zstd would make a buffer of that size.
            told = zstandard.get_frame_parameters(frame).content_size
            if told not in {length, zstandard.CONTENTSIZE_UNKNOWN}:
                raise self._file.corrupt(position, f"a zstd frame of {told} bytes, not {length}")
            decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
            data = decoder.decompress(frame, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._file.corrupt(position, f"a broken zstd frame ({error})") from error
        if len(data) != length:
            raise self._file.corrupt(position, f"a zstd frame of {len(data)} bytes, not {length}")
        return data


def survey_zstd(file: ImageFile) -> Generator[None, None, BlockSource | None]:
    """Find the frames; None if one does not tell its size, or they are too large or too many.

    Raises:
        CorruptImage: the file is cut short, or no frame begins where one should.
        UnsupportedImage: a dictionary is needed.
    """
    entries = _read_seek_table(file)
    source = ZstdSource(file, "frames" if entries is None else "seek table")
    for frame in frames(file) if entries is None else entries:
        if frame is None:
            yield
        elif frame.length == zstandard.CONTENTSIZE_UNKNOWN or not source.add(frame):
            return None
    return source


# --- the seek table --------------------------------------------------------------------------


def _read_seek_table(file: ImageFile) -> Iterator[Frame] | None:
    """The frames it lists; None if there is no table, or none that fits the file."""
    size = SeekTableFooter.sizeof()
    try:
        footer = SeekTableFooter.parse(file.read_up_to(max(file.size - size, 0), size))
    except ConstructError:
        return None
    words = 3 if footer.descriptor & 0x80 else 2
    length = footer.count * words * 4
    at = file.size - size - length - SKIPPABLE_HEADER
    if footer.descriptor & 0x7C or footer.count > MAX_BLOCKS or length > MAX_METADATA or at < 0:
        return None
    head = file.read(at, SKIPPABLE_HEADER, "the seek table")
    magic, told = (int.from_bytes(head[i : i + 4], "little") for i in (0, 4))
    if magic & ~0xF != SKIPPABLE_MAGIC or told != length + size:
        return None
    entries = array("I", file.read(at + SKIPPABLE_HEADER, length, "the seek table"))
    if sys.byteorder == "big":  # pragma: no cover
        entries.byteswap()
    stored, unpacked = entries[::words], entries[1::words]
    if sum(stored) != at:
        return None
    ends = accumulate(stored)
    return (Frame(end - s, end, u) for s, u, end in zip(stored, unpacked, ends, strict=True))


# --- without one -----------------------------------------------------------------------------


def frames(file: ImageFile) -> Iterator[Frame | None]:
    """Each frame, skippable ones left out; None now and then, to give others their turn.

    Raises:
        CorruptImage: the file is cut short, or no frame begins where one should.
        UnsupportedImage: a dictionary is needed.
    """
    at = 0
    if not file.size:
        raise file.corrupt(0, "an empty file, no zstd frame")
    while at < file.size:
        head = file.read_up_to(at, MAX_FRAME_HEADER)
        magic = int.from_bytes(head[:4], "little")
        if magic & ~0xF == SKIPPABLE_MAGIC and len(head) >= SKIPPABLE_HEADER:
            at += SKIPPABLE_HEADER + int.from_bytes(head[4:8], "little")
            if at > file.size:
                raise file.corrupt(file.size, "the file ends within a skippable frame")
            yield None
            continue
        parameters = _frame_parameters(file, at, head)
        end = yield from _frame_end(file, at, head, has_checksum=parameters.has_checksum)
        yield Frame(at, end, parameters.content_size)
        at = end


def _frame_parameters(file: ImageFile, at: int, head: bytes) -> Any:
    if not head.startswith(ZSTD_MAGIC):
        raise file.corrupt(at, "no zstd frame begins here")
    try:
        parameters = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError as error:
        raise file.corrupt(at, f"a broken zstd frame header ({error})") from error
    if parameters.dict_id:
        text = f"{file.path}: its zstd needs dictionary {parameters.dict_id}; unpack it first"
        raise UnsupportedImage(text)
    return parameters


def _frame_end(
    file: ImageFile, start: int, head: bytes, *, has_checksum: bool
) -> Generator[None, None, int]:
    """Where the frame ends, from the headers of its blocks."""
    at: int = start + zstandard.frame_header_size(head)
    count = empty = 0
    while True:
        word = ZstdBlock.sizeof()
        header = int.from_bytes(file.read(at, word, "a zstd block's header"), "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == RESERVED or (kind != RLE and size > MAX_ZSTD_BLOCK):
            raise file.corrupt(at, "a broken zstd block header")
        at += word + (1 if kind == RLE else size)
        if last:
            break
        count += 1
        empty = 0 if size else empty + 1
        if empty > MAX_EMPTY:
            raise file.corrupt(at, f"more than {MAX_EMPTY} empty zstd blocks")
        if not count % HEADERS_A_STEP:
            yield
    at += 4 if has_checksum else 0
    if at > file.size:
        raise file.corrupt(file.size, "the file ends within a zstd frame")
    return at
