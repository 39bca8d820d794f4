"""A compressed stream without places to begin at: unpacked once, into a file without a name.

::

    file ──> decoder, 1 MiB at a time ──> temporary file ── RawDisk
                                          zeroes stay holes

What it takes is stated by ``info``: it is the disk's own size, less its zeroes, in TMPDIR. The
file has no name, so whatever ends the process gives the room back.
"""

import lzma
import os
import tempfile
from collections.abc import Generator, Mapping
from typing import IO, cast

import zstandard

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.compressed.inflater import Inflater
from nbdsrv.formats.compressed.xz import MAX_XZ_MEMORY, explained
from nbdsrv.formats.compressed.zstd import MAX_WINDOW, Frame, frames
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.raw import RawDisk

__all__ = ["SpooledDisk", "unpack"]

PIECE = 64 << 10
"""Bytes of the file decoded at a time."""
MOST = 1 << 20
"""Bytes of the disk decoded at a time."""
HOLE = 4096
"""Zeroes are left out in pieces of this many bytes, a file system's blocks."""
FREE_PERCENT = 5
"""Of the temporary file system stay free: it is not ours alone."""
MAX_SIZE = (1 << 63) - 1
_NOTHING = bytes(MOST)


class SpooledDisk(RawDisk):
    """The unpacked disk. Read-only, like its source."""

    def __init__(self, workers: Workers, unpacked: ImageFile, kind: str) -> None:
        super().__init__(workers, unpacked)
        self.format = kind

    @property
    def facts(self) -> Mapping[str, object]:
        """That it lies in a temporary file, and in which folder."""
        return {
            "compression": self.format,
            "index": "none",
            "unpacked_into": tempfile.gettempdir(),
        }


Decoded = Generator[bytes, None, None]


def unpack(file: ImageFile, kind: str) -> Generator[None, None, ImageFile]:
    """Unpack all of it; the file it is in then, with ``file``'s name. Blocking, step by step.

    Raises:
        CorruptImage: the stream is broken, or cut short.
        DiskError: there is no room.
    """
    try:
        with tempfile.TemporaryFile(buffering=0) as temporary:
            size = 0
            for data in _DECODERS[kind](file):
                if size + len(data) > MAX_SIZE:
                    raise file.corrupt(0, "more than 2**63 bytes")
                _store(file, temporary.fileno(), size, data)
                size += len(data)
                yield
            os.ftruncate(temporary.fileno(), size)
            fd = os.dup(temporary.fileno())
    except OSError as error:
        raise DiskError.from_os(f"unpacking {file.path}", error) from error
    try:
        return ImageFile(file.path, fd, size=size, device=False, writable=False)
    except BaseException:
        os.close(fd)
        raise


def _store(file: ImageFile, fd: int, offset: int, data: bytes) -> None:
    if data == _NOTHING[: len(data)]:
        return
    free = os.statvfs(tempfile.gettempdir())
    if free.f_bavail * 100 < free.f_blocks * FREE_PERCENT:
        where = tempfile.gettempdir()
        raise DiskError(f"{file.path}: no room to unpack it in {where}; set TMPDIR")
    view, at = memoryview(data), 0
    while at < len(data):
        end = at
        while data[end : end + HOLE].strip(b"\0"):
            end += HOLE
        while at < min(end, len(data)):
            at += os.pwrite(fd, view[at:end], offset + at)
        at = end + HOLE


def _decode_gzip(file: ImageFile) -> Decoded:
    inflater = Inflater(file, 0, 0, None)
    while not (inflater.between_members and inflater.at_end()):
        yield inflater.more(MOST)


def _decode_xz(file: ImageFile) -> Decoded:
    at = 0
    while at < file.size:
        at = yield from _decode_xz_stream(file, at)
        while data := file.read_up_to(at, PIECE):
            at += (len(data) - len(data.lstrip(b"\0"))) // 4 * 4
            if data.strip(b"\0"):
                break
            yield b""


def _decode_xz_stream(file: ImageFile, at: int) -> Generator[bytes, None, int]:
    """Where the stream ends."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)
    while not decoder.eof:
        data = file.read_up_to(at, PIECE) if decoder.needs_input else b""
        if decoder.needs_input and not data:
            raise file.corrupt(at, "the file ends within an xz stream")
        at += len(data)
        try:
            yield decoder.decompress(data, MOST)
        except lzma.LZMAError as error:
            raise explained(file, at - len(data), error) from error
    return at - len(decoder.unused_data)


def _decode_zstd(file: ImageFile) -> Decoded:
    for frame in frames(file):
        if frame is None:
            yield b""
            continue
        decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        stored = cast("IO[bytes]", _Reader(file, frame))
        try:
            with decoder.stream_reader(stored, read_size=PIECE, closefd=False) as reader:
                while data := reader.read(MOST):
                    yield data
        except zstandard.ZstdError as error:
            raise file.corrupt(frame.begin, f"a broken zstd frame ({error})") from error


class _Reader:
    """A frame as zstandard wants to read it."""

    def __init__(self, file: ImageFile, frame: Frame) -> None:
        self._file = file
        self._at, self._end = frame.begin, frame.end

    def read(self, length: int) -> bytes:
        """The next bytes."""
        data = self._file.read_up_to(self._at, min(length, self._end - self._at))
        self._at += len(data)
        return data


_DECODERS = {"gzip": _decode_gzip, "xz": _decode_xz, "zstd": _decode_zstd}
