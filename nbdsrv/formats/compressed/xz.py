"""xz: the file's own index says where each block lies.

::

    file   |header|# block #|# block #|..|index|footer|pad|header|# block #|index|footer|
                                           <----------'         read from the end backwards

A block is decoded as a stream of one block, whose header is the stream's own; so liblzma applies
the block's filters and verifies its check. Nothing is decoded for the index.
"""

import lzma
import zlib
from array import array
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from construct import ConstructError

from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.compressed.source import MAX_BLOCK, MAX_BLOCKS, BlockSource
from nbdsrv.formats.compressed.structs import XzFooter, XzHeader
from nbdsrv.formats.image_file import MAX_METADATA, ImageFile

__all__ = ["MAX_XZ_MEMORY", "XzSource", "explained", "survey_xz"]

MAX_XZ_MEMORY = 192 << 20
"""Bytes liblzma may use; the dictionary of ``xz -9`` is 64 MiB."""
MAX_STREAMS = 1 << 16
"""Streams in a file; concatenating them is possible and rare."""
PIECE = 64 << 10
MAX_PADDING = 64 << 20
"""Bytes of zeroes behind a stream; tapes and devices leave some, a file with a tebibyte is odd."""
CHECKS = frozenset({0, 1, 4, 10})
"""None, CRC32, CRC64, SHA-256."""
LEAST_UNPADDED = 5
MAX_VARINT = 9
"""Bytes of an integer, 7 bits each."""
RECORDS_A_STEP = 1 << 14


class _Records(NamedTuple):
    """An index: what each block takes in the file, padding included, and in the disk."""

    padded: "array[int]"
    lengths: "array[int]"


class XzSource(BlockSource):
    """The blocks of all streams of a file."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self.starts: array[int] = array("Q")
        self.size = 0
        self._positions = array("Q")
        self._lengths = array("Q")  # as stored, padding included
        self._streams: list[tuple[int, bytes]] = []  # first block, the stream's header
        self.facts: Mapping[str, object] = {}

    def add_stream(self, header: bytes, position: int, records: "_Records") -> None:
        """The next stream; its first block is at ``position``."""
        self._streams.append((len(self.starts), header))
        for padded, length in zip(records.padded, records.lengths, strict=True):
            if length:
                self.starts.append(self.size)
                self._positions.append(position)
                self._lengths.append(padded)
                self.size += length
            position += padded

    def finish(self) -> None:
        """No more streams."""
        self.facts = {
            "compression": "xz",
            "blocks": len(self.starts),
            "largest_block": max((self.end(n) - s for n, s in enumerate(self.starts)), default=0),
            "index": "xz",
        }

    def memory(self, number: int) -> int:
        """The block, stored and decoded, and as much again for the dictionary."""
        return self._lengths[number] + 2 * (self.end(number) - self.starts[number])

    def decode(self, number: int) -> bytes:
        position, length = self._positions[number], self.end(number) - self.starts[number]
        header = next(head for first, head in reversed(self._streams) if first <= number)
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)
        try:
            decoder.decompress(header)
            data = self._fill(decoder, number, length)
        except lzma.LZMAError as error:
            raise explained(self._file, position, error) from error
        if len(data) != length:
            raise self._file.corrupt(position, f"an xz block of {len(data)} bytes, not {length}")
        return data

    def _fill(self, decoder: lzma.LZMADecompressor, number: int, length: int) -> bytes:
        """Feed the decoder the block, its check included."""
        at, left = self._positions[number], self._lengths[number]
        parts, room = [], length
        while left and room >= 0 and not decoder.eof:
            stored = self._file.read(at, min(left, MAX_METADATA), "an xz block")
            at, left = at + len(stored), left - len(stored)
            parts.append(decoder.decompress(stored, room + 1))
            room -= len(parts[-1])
        if decoder.eof:
            raise self._file.corrupt(at, "the xz stream ends within a block")
        return b"".join(parts)


def survey_xz(file: ImageFile) -> Generator[None, None, BlockSource | None]:
    """Read the index of every stream; None if blocks are too large or too many.

    Raises:
        CorruptImage: the file is cut short, or its index wrong.
        UnsupportedImage: a check that liblzma does not know.
    """
    source = XzSource(file)
    streams: list[tuple[bytes, int, _Records]] = []
    end = file.size
    while end > 0:
        end = _without_padding(file, end)
        stream = yield from _read_stream(file, end)
        if stream is None or len(streams) >= MAX_STREAMS:
            return None
        streams.append(stream)
        end = stream[1] - XzHeader.sizeof()
    if not streams:
        raise file.corrupt(0, "no xz stream")
    if any(max(records.lengths, default=0) > MAX_BLOCK for _, _, records in streams):
        return None
    if sum(len(records.lengths) for _, _, records in streams) > MAX_BLOCKS:
        return None
    for header, position, records in reversed(streams):
        source.add_stream(header, position, records)
    source.finish()
    return source


def _without_padding(file: ImageFile, end: int) -> int:
    """Behind a stream there may be zeroes, four at a time."""
    at = end
    while at > 0:
        size = min(PIECE, at)
        kept = len(file.read(at - size, size, "the xz footer").rstrip(b"\0"))
        at -= size - kept
        if end - at > MAX_PADDING or (kept and (end - at) % 4):
            raise file.corrupt(at, f"{end - at} zeroes behind an xz stream")
        if kept:
            break
    return at


def _read_stream(
    file: ImageFile, end: int
) -> Generator[None, None, tuple[bytes, int, _Records] | None]:
    """Header, position of the first block and records of the stream that ends there."""
    footer_at = end - XzFooter.sizeof()
    if footer_at < XzHeader.sizeof():
        raise file.corrupt(max(end, 0), "no whole xz stream ends here, was the file cut short?")
    raw_footer = file.read(footer_at, XzFooter.sizeof(), "the xz footer")
    footer = _parse(XzFooter, raw_footer)
    if footer is None or zlib.crc32(raw_footer[4:10]) != footer.crc:
        raise file.corrupt(footer_at, "no xz footer, was the file cut short?")
    index_size = (footer.backward + 1) * 4
    index_at = footer_at - index_size
    if index_at < XzHeader.sizeof():
        raise file.corrupt(footer_at, f"an xz index of {index_size} bytes")
    if index_size > MAX_METADATA:
        return None
    index = file.read(index_at, index_size, "the xz index")
    records = yield from _parse_index(file, index_at, index)
    if records is None:
        return None
    position = index_at - sum(records.padded)
    header_at = position - XzHeader.sizeof()
    if header_at < 0:
        raise file.corrupt(index_at, "the xz index has more blocks than the file")
    raw_header = file.read(header_at, XzHeader.sizeof(), "the xz header")
    header = _parse(XzHeader, raw_header)
    if header is None or header.crc != zlib.crc32(header.flags) or header.flags != footer.flags:
        raise file.corrupt(header_at, "no xz header where the index says")
    if header.flags[0] or header.flags[1] not in CHECKS:
        raise UnsupportedImage(f"{file.path}: xz with check {header.flags.hex()} is not served")
    return raw_header, position, records


def _parse_index(file: ImageFile, at: int, index: bytes) -> Generator[None, None, _Records | None]:
    if zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little") or index[0]:
        raise file.corrupt(at, "the xz index does not match its checksum")
    count, where = _varint(file, at, index, 1)
    if count > len(index) // 2:
        raise file.corrupt(at, f"an xz index of {count} blocks in {len(index)} bytes")
    if count > MAX_BLOCKS:
        return None
    records = _Records(array("Q"), array("Q"))
    for done in range(count):
        unpadded, where = _varint(file, at, index, where)
        length, where = _varint(file, at, index, where)
        if unpadded < LEAST_UNPADDED or unpadded > file.size or length >= 1 << 62:
            raise file.corrupt(at + where, f"an xz block of {unpadded} and {length} bytes")
        records.padded.append(-(-unpadded // 4) * 4)
        records.lengths.append(length)
        if not done % RECORDS_A_STEP:
            yield
    if len(index) - 4 - where > 3 or any(index[where:-4]):
        raise file.corrupt(at + where, "something behind the records of the xz index")
    return records


def _varint(file: ImageFile, at: int, index: bytes, where: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * MAX_VARINT, 7):
        if where >= len(index) - 4:
            break
        byte = index[where]
        where += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, where
    raise file.corrupt(at + where, "a broken number in the xz index")


def _parse(kind: Any, raw: bytes) -> Any:
    try:
        return kind.parse(raw)
    except ConstructError:
        return None


def explained(file: ImageFile, position: int, error: lzma.LZMAError) -> DiskError:
    """What to raise for liblzma's error."""
    if "limit" in str(error):
        limit = MAX_XZ_MEMORY >> 20
        return UnsupportedImage(f"{file.path}: decoding its xz takes more than {limit} MiB")
    return file.corrupt(position, f"a broken xz block ({error})")
