r"""Where each extent of a stream lies in its file.

::

    meta data ============ data === zero data ====== stop [sizes] comp
              ^ position        ^              ^                         one walk, a seek per frame
    starts    0x000000          0x200000       0x900000                  ascending: looked up by
    lengths   ...                                                        bisection

Extents that were packed in several LZ4 frames (those as large as a request could be) have an entry
for each of these. A stream that is cut short or broken somewhere is known up to there.

Rule: the walk reads frames, never payloads; entries are 28 bytes each, and bounded.
"""

from array import array
from bisect import bisect_right
from collections.abc import Generator
from dataclasses import dataclass, field

import msgspec

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.repository.virtnbdbackup.lz4_frame import MAX_CONTENT, content_size
from nbdsrv.repository.virtnbdbackup.stream import (
    FRAME_LENGTH,
    TERMINATOR,
    Frame,
    Meta,
    parse_frame,
    read_frame,
    read_tail,
)

__all__ = ["MAX_ENTRIES", "PLAIN", "ZEROES", "Index", "index_of", "whole"]

MAX_ENTRIES = 1 << 22
"""Entries of one file: 112 MiB; alternating 64 KiB extents of half a tebibyte."""
MAX_TRAILER = 16 << 20
"""Bytes of the list of packed sizes: some nine for each extent."""
PLAIN = 0
"""``packed`` of an extent that lies in the file as it is."""
ZEROES = -1
"""``packed`` of a zero frame: nothing lies in the file."""
_STEP = 512
"""Frames read between two turns: a millisecond, or a few seconds of a cold hard disk."""

_Sizes = list[int | dict[str, list[int]]]


@dataclass(slots=True)
class Index:
    """The entries of a file, by disk offset.

    Attributes:
        starts: on the disk, bytes.
        lengths: bytes of the disk.
        positions: in the file.
        packed: bytes in the file, or ``PLAIN``, or ``ZEROES``.
        end: how far on the disk all is known; the disk's size unless something is broken.
        fault: what is broken there.
        zero_frames: how many there are.
        data_size: bytes of all extents.
    """

    starts: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    positions: "array[int]" = field(default_factory=lambda: array("q"))
    packed: "array[int]" = field(default_factory=lambda: array("i"))
    end: int = 0
    fault: CorruptImage | None = None
    zero_frames: int = 0
    data_size: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def first(self, offset: int) -> int:
        """The first entry that ends behind ``offset``."""
        index = bisect_right(self.starts, offset) - 1
        if index >= 0 and self.starts[index] + self.lengths[index] > offset:
            return index
        return index + 1

    def add(self, start: int, length: int, position: int, packed: int) -> None:
        """One more entry, behind all others."""
        self.starts.append(start)
        self.lengths.append(length)
        self.positions.append(position)
        self.packed.append(packed)


def whole(size: int) -> Index:
    """The index of a plain image."""
    index = Index(end=size, data_size=size)
    if size:
        index.add(0, size, 0, PLAIN)
    return index


def index_of(file: ImageFile, meta: Meta) -> Generator[None, None, Index]:
    """Walk through a file, a few frames at a time; blocking. Not to be repeated: keep it.

    Raises:
        DiskError: the file cannot be read. What is broken in it is ``Index.fault``.
    """
    index = Index()
    try:
        sizes = _packed_sizes(file) if meta.packed else None
        yield from _walk(file, meta, index, sizes)
    except CorruptImage as error:
        index.fault = error
    else:
        index.end = meta.size
    return index


def _walk(
    file: ImageFile, meta: Meta, index: Index, sizes: _Sizes | None
) -> Generator[None, None, None]:
    position = meta.end
    frame = read_frame(file, position)
    count = extents = 0
    while frame.kind != b"stop":
        _check(file, position, frame, meta, index)
        at = position + FRAME_LENGTH
        if frame.kind == b"zero":
            index.zero_frames += 1
            if meta.incremental:  # elsewhere nothing lies below that it could hide
                index.add(frame.start, frame.length, 0, ZEROES)
            gap = b""
        else:
            if sizes is None:
                if at + frame.length > file.size:
                    raise file.corrupt(position, f"{frame.length} bytes, but the file ends before")
                index.add(frame.start, frame.length, at, PLAIN)
                at += frame.length
            else:
                if extents >= len(sizes):
                    raise file.corrupt(position, "the list at the end has no size for this extent")
                at = _add_packed(file, index, frame, at, sizes[extents])
            extents += 1
            index.data_size += frame.length
            gap = TERMINATOR
        raw = file.read(at, len(gap) + FRAME_LENGTH, "a frame")
        if not raw.startswith(gap):
            raise file.corrupt(at, "an extent does not end there")
        # Only now: an extent whose end is not where it should be may be another's bytes.
        index.end = frame.start + frame.length
        position = at + len(gap)
        frame = parse_frame(file, position, raw[len(gap) :])
        count += 1
        if count % _STEP == 0:
            yield
    if index.data_size != meta.data_size:
        text = f"{index.data_size} bytes of data, the meta frame says {meta.data_size}"
        raise file.corrupt(position, text)
    if sizes is not None and extents != len(sizes):
        raise file.corrupt(position, f"{extents} extents, the list at the end has {len(sizes)}")


def _check(file: ImageFile, position: int, frame: Frame, meta: Meta, index: Index) -> None:
    if frame.kind not in {b"data", b"zero"}:
        raise file.corrupt(position, f"a {frame.kind.decode()} frame among the extents")
    if not frame.length or frame.start + frame.length > meta.size:
        text = f"an extent of {frame.length} bytes at {frame.start} of a disk of {meta.size}"
        raise file.corrupt(position, text)
    if frame.start < index.end:
        raise file.corrupt(position, f"an extent at {frame.start}, behind one of {index.end}")
    if len(index) >= MAX_ENTRIES:
        raise file.corrupt(position, f"more than {MAX_ENTRIES} extents")


def _add_packed(
    file: ImageFile, index: Index, frame: Frame, at: int, sizes: int | dict[str, list[int]]
) -> int:
    """Entries of one extent; the position behind it."""
    pieces = [sizes] if isinstance(sizes, int) else next(iter(sizes.values()), [])
    start, end = frame.start, frame.start + frame.length
    if len(pieces) + len(index) > MAX_ENTRIES or not pieces:
        raise file.corrupt(at, f"an extent of {len(pieces)} pieces")
    for packed in pieces:
        if not 0 < packed <= MAX_CONTENT or at + packed > file.size:
            raise file.corrupt(at, f"an extent of {packed} packed bytes")
        length = end - start if len(pieces) == 1 else content_size(file, at, packed)
        if not 0 < length <= min(end - start, MAX_CONTENT):
            text = f"an LZ4 frame of {length} bytes, for {end - start} of the disk"
            raise file.corrupt(at, text)
        index.add(start, length, at, packed)
        start += length
        at += packed
    if start != end:
        raise file.corrupt(at, f"an extent of {frame.length} bytes, {end - start} of them missing")
    return at


def _packed_sizes(file: ImageFile) -> _Sizes:
    frame = read_tail(file)
    if frame is None or frame.kind != b"comp":
        raise file.corrupt(file.size, "no list of packed sizes at the end, was it cut short?")
    position = file.size - FRAME_LENGTH - len(TERMINATOR) - frame.length
    if frame.length > MAX_TRAILER or position < 0:
        raise file.corrupt(file.size, f"a list of packed sizes of {frame.length} bytes")
    raw = file.read(position, frame.length, "the list of packed sizes")
    try:
        return msgspec.json.decode(raw, type=_Sizes)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise file.corrupt(position, f"the list of packed sizes, {error}") from error
