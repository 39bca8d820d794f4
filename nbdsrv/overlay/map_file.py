"""The map on the disk: a snapshot of all states, and behind it the journal of what changed since.

::

    map      header | page page page ... | frame frame frame ...         appended by every flush
    map.new  the next one: written, synced, renamed onto ``map``, the directory synced

    header   magic version block id size generation body-length body-crc header-crc
    page     number length | one state, or the states of all its blocks packed by zlib

A flush is: sync the data file, append frames, sync. When the frames outgrow the pages (and a
megabyte), the next flush writes a new map instead, so the file stays within some three times what
the states need.

Rule: everything here blocks. What raises OSError says by ``lost`` whether the kernel may have
dropped something it had accepted; then nothing may be promised any more.
"""

import contextlib
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import Struct

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.overlay.block_map import BLOCK, BLOCK_BITS, PAGE_BITS, PAGE_BLOCKS, BlockMap
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.journal import (
    FRAME_SIZE,
    MAX_RECORDS,
    Record,
    frame,
    frame_size,
    goes_on,
    read_frame,
)
from nbdsrv.overlay.states import COPIED, DATA, UNWATCH, WATCH

__all__ = ["DATA_NAME", "MAP_NAME", "MapFile", "Replayed", "read_map", "write_first_map"]

log = logging.getLogger(__name__)

MAP_NAME = "map"
NEXT_NAME = "map.new"
DATA_NAME = "data"
MAGIC = b"NBDSOVLY"
VERSION = 1
MIN_JOURNAL = 1 << 20
"""Bytes of frames that are no reason to write a new map."""
MAX_TAIL = 64 << 20
"""Bytes behind a bad frame that are looked at for good ones."""
MAX_SIZE = 1 << 62
"""Bytes of a disk."""
MAX_PACKED = PAGE_BLOCKS + 64
"""Bytes of a packed page: zlib makes what it cannot pack a little longer."""

_HEADER = Struct("<8sII16sQQQI")
_CRC = Struct("<I")
_PAGE = Struct("<II")
HEADER_SIZE = _HEADER.size + _CRC.size


@dataclass(slots=True)
class Replayed:
    """What a map file says.

    Attributes:
        states: of all blocks.
        doubts: stretches that were COPIED, on pages that were being watched: taken for DATA.
        watched: these pages.
        generation: of the map.
        pages_end: where the frames begin.
        end: of the last frame that counts; what follows is torn.
        frames: that count.
        crc: of the last of them, or 0.
    """

    states: BlockMap
    watched: set[int]
    generation: int
    pages_end: int
    end: int
    frames: int = 0
    crc: int = 0
    doubts: list[Record] = field(default_factory=list)


def _seed(id_: bytes, generation: int) -> int:
    return zlib.crc32(id_ + generation.to_bytes(8, "little"))


def read_map(fd: int, path: str, id_: bytes, size: int) -> Replayed:
    """Read a map and replay its journal. Changes nothing.

    Args:
        fd: the open file.
        path: for messages.
        id_: of the overlay, 16 bytes.
        size: of the disk.

    Raises:
        CorruptImage: the map is damaged, or another overlay's.
        UnsupportedImage: a later version's.
        OSError: it cannot be read.
    """
    length = os.fstat(fd).st_size
    head = _read(fd, 0, HEADER_SIZE)
    if len(head) < HEADER_SIZE or head[:8] != MAGIC:
        raise _corrupt(path, 0, "no map of an overlay begins like that")
    (crc,) = _CRC.unpack_from(head, _HEADER.size)
    if zlib.crc32(head[: _HEADER.size]) != crc:
        raise _corrupt(path, 0, "the header's checksum is wrong")
    _, version, block, its_id, its_size, generation, body, body_crc = _HEADER.unpack_from(head)
    if version != VERSION or block != BLOCK:
        text = f"{path}: a map of version {version} with blocks of {block}; use a newer nbdsrv"
        raise UnsupportedImage(text)
    if its_id != id_ or its_size != size:
        raise _corrupt(path, 16, "the map belongs to another overlay")
    pages = -(-size >> PAGE_BITS)
    if body > min(pages * (_PAGE.size + MAX_PACKED), length - HEADER_SIZE):
        raise _corrupt(path, 0, f"{body} bytes of pages do not fit")
    states = BlockMap()
    _read_pages(fd, path, body, body_crc, pages, states)
    found = Replayed(states, set(), generation, HEADER_SIZE + body, HEADER_SIZE + body)
    _replay(fd, path, length, found, _seed(id_, generation), -(-size >> BLOCK_BITS))
    return found


def _read_pages(fd: int, path: str, body: int, body_crc: int, pages: int, states: BlockMap) -> None:
    crc, at, end, before = 0, HEADER_SIZE, HEADER_SIZE + body, -1
    while at < end:
        head = _read(fd, at, _PAGE.size)
        if len(head) < _PAGE.size:
            raise _corrupt(path, at, "the file ends within the map")
        number, length = _PAGE.unpack(head)
        if not before < number < pages or not 0 < length <= min(MAX_PACKED, end - at - _PAGE.size):
            raise _corrupt(path, at, f"page {number} of {length} bytes")
        data = _read(fd, at + _PAGE.size, length)
        if len(data) < length or not states.restore(number, data):
            raise _corrupt(path, at, f"page {number} cannot be unpacked")
        crc = zlib.crc32(data, zlib.crc32(head, crc))
        before, at = number, at + _PAGE.size + length
    if crc != body_crc:
        raise _corrupt(path, HEADER_SIZE, "the checksum of the pages is wrong")


def _replay(fd: int, path: str, length: int, found: Replayed, seed: int, blocks: int) -> None:
    states, watched = found.states, found.watched
    while found.end + FRAME_SIZE <= length:
        size = frame_size(_read(fd, found.end, FRAME_SIZE))
        data = _read(fd, found.end, size)
        whole = read_frame(data, found.frames + 1, found.crc, seed)
        if whole is None:
            if goes_on(_read(fd, found.end, MAX_TAIL), found.frames + 1, seed):
                raise _damaged(path, found.end)
            break
        for first, end, state in whole.records:
            if not 0 <= first < end:
                raise _corrupt(path, found.end, f"blocks {first} to {end}")
            if state in {WATCH, UNWATCH}:
                pages = range(first // PAGE_BLOCKS, -(-end // PAGE_BLOCKS))
                if len(pages) > -(-blocks // PAGE_BLOCKS):
                    raise _corrupt(path, found.end, f"blocks {first} to {end} of {blocks}")
                (watched.update if state == WATCH else watched.difference_update)(pages)
                continue
            if end > blocks or not DATA <= state <= COPIED:
                raise _corrupt(path, found.end, f"state {state} of blocks {first} to {end}")
            states.set(first, end, state)
        found.end += whole.size
        found.frames += 1
        found.crc = whole.crc
    for page in watched:  # what was in place when the power failed may differ from the base
        first, end = page * PAGE_BLOCKS, min((page + 1) * PAGE_BLOCKS, blocks)
        for start, stop, state in list(states.stretches(first, end)):
            if state == COPIED:
                states.set(start, stop, DATA)
                found.doubts.append((start, stop, DATA))


def _read(fd: int, position: int, length: int) -> bytes:
    data = os.pread(fd, length, position)
    while 0 < len(data) < length:
        more = os.pread(fd, length - len(data), position + len(data))
        if not more:
            break
        data += more
    return data


def _corrupt(path: str, position: int, what: str) -> CorruptImage:
    text = f"corrupt overlay: {path} at {position}: {what}; `nbdsrv overlay drop` gives it up"
    return CorruptImage(text)


def _damaged(path: str, position: int) -> CorruptImage:
    where = f"corrupt overlay: {path} at {position}: a frame of the journal is damaged"
    hint = f"bring the file back, or go back to what was flushed before: truncate -s {position}"
    return CorruptImage(f"{where}, and more was flushed behind it; {hint} (keep a copy)")


class MapFile:
    """The map of an overlay that is in use. One thread at a time.

    Attributes:
        lost: has a sync failed? What it was about may be on the disk or not, for good.
    """

    def __init__(
        self, files: Files, directory: int, path: str, id_: bytes, size: int, replayed: Replayed
    ) -> None:
        """Go on behind what was replayed; ``open`` must follow."""
        self.lost = False
        self._files = files
        self._directory = directory
        self._path = path
        self._id = id_
        self._size = size
        self._generation = replayed.generation
        self._pages_end = replayed.pages_end
        self._end = replayed.end
        self._frames = replayed.frames
        self._crc = replayed.crc
        self._limit = 0
        self._fd = -1

    @property
    def outgrown(self) -> bool:
        """Is it time for a new map? Any thread may ask."""
        journal = self._end - self._pages_end
        return journal > max(MIN_JOURNAL, 2 * self._pages_end, self._limit)

    def open(self) -> None:
        """Open the file and cut off what is torn, before anything is put behind it.

        It is synced: somebody who was killed may have written frames which are not on the disk yet,
        and what is put behind them must not get there before they do.

        Raises:
            OSError: it cannot be opened, cut or synced.
        """
        self._fd = self._files.open(self._directory, MAP_NAME, writable=True)
        torn = os.fstat(self._fd).st_size - self._end
        if torn > 0:
            log.warning("overlay.torn map=%s; cut off at %d: %d bytes", self._path, self._end, torn)
            self._files.truncate(self._fd, self._end)
        self._files.sync(self._fd)
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(self._directory, NEXT_NAME)

    def append(self, records: Sequence[Record]) -> None:
        """Put frames behind the journal and sync them.

        Raises:
            OSError: nothing of it counts; unless ``lost``, the same may be tried again.
        """
        seed = _seed(self._id, self._generation)
        frames, crc = _frames(records, self._frames, self._crc, seed)
        try:
            self._files.write(self._fd, frames, self._end)
        except OSError:
            self._cut()
            raise
        self._sync(self._fd)
        self._end += sum(map(len, frames))
        self._frames, self._crc = self._frames + len(frames), crc

    def _cut(self) -> None:
        """Give a part of a frame back: the disk is full."""
        try:
            self._files.truncate(self._fd, self._end)
        except OSError:
            self.lost = True

    def _sync(self, fd: int) -> None:
        try:
            self._files.sync_data(fd)
        except OSError:
            self.lost = True
            raise

    def renew(self, pages: Sequence[tuple[int, bytes]], records: Sequence[Record]) -> None:
        """Write a new map of these (number, packed page), and ``records`` behind it.

        Raises:
            OSError: the old map still counts.
        """
        generation = self._generation + 1
        head, body = _map(self._id, self._size, generation, pages)
        pages_end = len(head) + sum(map(len, body))
        frames, crc = _frames(records, 0, 0, _seed(self._id, generation))
        fd = self._files.create(self._directory, NEXT_NAME)
        try:
            end = _write_all(self._files, fd, [head, *body, *frames])
            self._files.sync(fd)
            self._files.rename(self._directory, NEXT_NAME, MAP_NAME)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                self._files.unlink(self._directory, NEXT_NAME)
            # Not at every flush: while the disk is full the journal goes on as long as it can.
            self._limit = 2 * (self._end - self._pages_end)
            raise
        os.close(self._fd)
        self._fd, self._generation, self._limit = fd, generation, 0
        self._pages_end, self._end = pages_end, end
        self._frames, self._crc = len(frames), crc
        try:  # until then a power cut may bring the old one back, and nothing may count here only
            self._files.sync(self._directory)
        except OSError:
            self.lost = True
            raise

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _frames(records: Sequence[Record], number: int, crc: int, seed: int) -> tuple[list[bytes], int]:
    """``records`` in frames behind frame ``number``, and the crc of the last."""
    frames: list[bytes] = []
    for at in range(0, len(records), MAX_RECORDS):
        number += 1
        data, crc = frame(records[at : at + MAX_RECORDS], number, crc, seed)
        frames.append(data)
    return frames, crc


def _map(
    id_: bytes, size: int, generation: int, pages: Sequence[tuple[int, bytes]]
) -> tuple[bytes, list[bytes]]:
    body: list[bytes] = []
    crc = 0
    for number, data in pages:
        body += [_PAGE.pack(number, len(data)), data]
        crc = zlib.crc32(data, zlib.crc32(body[-2], crc))
    length = sum(map(len, body))
    head = _HEADER.pack(MAGIC, VERSION, BLOCK, id_, size, generation, length, crc)
    return head + _CRC.pack(zlib.crc32(head)), body


def write_first_map(files: Files, directory: int, id_: bytes, size: int) -> None:
    """A map that says nothing yet, synced. Raises OSError."""
    head, _ = _map(id_, size, 1, ())
    fd = files.create(directory, MAP_NAME)
    try:
        files.write(fd, [head], 0)
        files.sync(fd)
    finally:
        os.close(fd)


def _write_all(files: Files, fd: int, parts: Sequence[bytes]) -> int:
    """Write ``parts`` from the file's beginning, some megabytes at a time; where they end."""
    at, batch, held = 0, [], 0
    for part in parts:
        batch.append(part)
        held += len(part)
        if len(batch) >= 512:
            files.write(fd, [b"".join(batch)], at)
            at, batch, held = at + held, [], 0
    if batch:
        files.write(fd, [b"".join(batch)], at)
    return at + held
