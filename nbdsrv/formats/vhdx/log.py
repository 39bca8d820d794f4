"""The log of a VHDX: found, checked and replayed, in memory only.

::

    ring   | entry 7 | entry 8 | torn | old ... | entry 5 | entry 6 |
                          |                          ^
                          '-------- tail ------------'     the active sequence is 5 6 7 8

Each entry says how far back the ones reach that may not have been written to their place yet. The
active sequence is the newest unbroken one that is there from its tail to its head. What was torn
in a crash has a wrong checksum and counts for nothing: nothing of it was written elsewhere.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vhdx.crc32c import crc32c
from nbdsrv.formats.vhdx.replayed import Patch, Replayed
from nbdsrv.formats.vhdx.structs import (
    CHECKSUM,
    DATA_DESCRIPTOR,
    DESCRIPTOR_SIZE,
    ENTRY_HEADER_SIZE,
    LOG_ENTRY,
    LOG_SECTOR,
    ZERO_DESCRIPTOR,
)

__all__ = ["MAX_LOG", "replay"]

MAX_LOG = 16 << 20
"""Bytes of a log that has to be replayed; Hyper-V and qemu make them 1 MiB."""
MAX_ZEROINGS = 1024
"""Ranges zeroed in a sequence; each is compared with every sector before it."""
MAX_FILE = 1 << 62
"""Bytes of a file; what a log entry speaks of lies below."""
CHECKED = 4
"""Times the log's length that is summed up at most; entries that lie about their length and
overlap would otherwise cost its square."""


@dataclass(frozen=True, slots=True)
class _Update:
    start: int
    end: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class _Entry:
    at: int
    length: int
    tail: int
    sequence: int
    flushed: int
    last: int
    updates: tuple[_Update, ...]


def replay(file: ImageFile, offset: int, length: int, guid: bytes) -> Replayed:
    """The file with its log applied. Blocking.

    Args:
        file: the image.
        offset: of the log.
        length: of the log, bytes.
        guid: what current entries carry.

    Raises:
        CorruptImage: it cannot be replayed, or the file lacks what the log relies on.
        UnsupportedImage: it is too large.
    """
    if length > MAX_LOG:
        text = (
            f"{file.path}: a log of {length} bytes to be replayed; open the image in Hyper-V once"
        )
        raise UnsupportedImage(text)
    ring = _Ring(file, offset, file.read(offset, length, "the log"), guid)
    entries = _active(ring)
    if not entries:
        if ring.signs:
            raise file.corrupt(offset, "no entry of the log is intact: it cannot be replayed")
        return Replayed(file, file.size, [])  # opened for writing, but nothing was written
    head = entries[-1]
    if file.size < head.flushed:
        text = f"the file was {head.flushed} bytes when this was logged; it is truncated"
        raise file.corrupt(offset + head.at, text)
    return Replayed(file, head.last, _patches(file, offset, entries))


class _Ring:
    """The log's bytes, and the entries in it. ``signs``: has anything been logged at all?"""

    def __init__(self, file: ImageFile, offset: int, data: bytes, guid: bytes) -> None:
        self._file = file
        self._offset = offset
        self._data = data
        self._guid = guid
        self._entries: dict[int, _Entry | None] = {}
        self._checked = 0
        self.size = len(data)
        self.signs = False

    def entry(self, at: int) -> _Entry | None:
        """The entry that begins at ``at``, None if there is none that is valid."""
        if at not in self._entries:
            self._entries[at] = self._look(at)
        return self._entries[at]

    def _look(self, at: int) -> _Entry | None:
        fields: Any = LOG_ENTRY.parse(self._data[at : at + ENTRY_HEADER_SIZE])
        if fields.signature != b"loge" or fields.log_guid != self._guid:
            return None
        self.signs = True
        length = fields.entry_length
        if length < LOG_SECTOR or length % LOG_SECTOR or length > self.size:
            return None
        if fields.tail % LOG_SECTOR or fields.tail >= self.size or not fields.sequence_number:
            return None
        raw = self._data[at : at + length]
        raw += self._data[: length - len(raw)]  # around the corner
        if fields.checksum != self._sum(raw):
            return None
        updates = _updates(raw, fields.descriptor_count, fields.sequence_number)
        if updates is None:
            return None
        return _Entry(
            at=at,
            length=length,
            tail=fields.tail,
            sequence=fields.sequence_number,
            flushed=fields.flushed_file_offset,
            last=fields.last_file_offset,
            updates=updates,
        )

    def _sum(self, raw: bytes) -> int:
        self._checked += len(raw)
        if self._checked > CHECKED * self.size:
            raise self._file.corrupt(self._offset, "the log is full of entries that overlap")
        return crc32c(raw[CHECKSUM + 4 :], crc32c(bytes(4), crc32c(raw[:CHECKSUM])))


def _updates(raw: bytes, count: int, sequence: int) -> tuple[_Update, ...] | None:
    """What an entry says, None if it contradicts itself."""
    sector = -(-(ENTRY_HEADER_SIZE + count * DESCRIPTOR_SIZE) // LOG_SECTOR) * LOG_SECTOR
    if sector > len(raw):
        return None
    updates = []
    for at in range(
        ENTRY_HEADER_SIZE, ENTRY_HEADER_SIZE + count * DESCRIPTOR_SIZE, DESCRIPTOR_SIZE
    ):
        descriptor = raw[at : at + DESCRIPTOR_SIZE]
        if descriptor[:4] == b"zero":
            update = _zeroing(descriptor, sequence)
        else:
            update = _sector(descriptor, raw[sector : sector + LOG_SECTOR], sequence)
            sector += LOG_SECTOR
        if update is None or update.start % LOG_SECTOR or update.end > MAX_FILE:
            return None
        updates.append(update)
    return tuple(updates)


def _zeroing(descriptor: bytes, sequence: int) -> _Update | None:
    fields: Any = ZERO_DESCRIPTOR.parse(descriptor)
    if fields.sequence_number != sequence or fields.zero_length % LOG_SECTOR:
        return None
    return _Update(fields.file_offset, fields.file_offset + fields.zero_length, None)


def _sector(descriptor: bytes, raw: bytes, sequence: int) -> _Update | None:
    fields: Any = DATA_DESCRIPTOR.parse(descriptor)
    if fields.signature != b"desc" or fields.sequence_number != sequence:
        return None
    if len(raw) < LOG_SECTOR or raw[:4] != b"data":
        return None
    if int.from_bytes(raw[-4:] + raw[4:8], "little") != sequence:
        return None
    data = fields.leading_bytes + raw[8:-4] + fields.trailing_bytes
    return _Update(fields.file_offset, fields.file_offset + LOG_SECTOR, data)


def _active(ring: _Ring) -> Sequence[_Entry]:
    """The newest complete sequence, from its tail on; empty if there is none (MS-VHDX 2.3.3)."""
    best: list[_Entry] = []
    start = 0
    while start < ring.size:
        sequence = list(_sequence(ring, start))
        tail = sequence[-1].tail if sequence else None
        first = next((n for n, entry in enumerate(sequence) if entry.at == tail), None)
        if first is None:
            start += LOG_SECTOR
            continue
        start += sum(entry.length for entry in sequence)
        if not best or sequence[-1].sequence > best[-1].sequence:
            best = sequence[first:]
    return best


def _sequence(ring: _Ring, at: int) -> Iterator[_Entry]:
    """Entries that follow each other, at most once around."""
    before, left = 0, ring.size
    while (entry := ring.entry(at)) is not None and entry.length <= left:
        if before and entry.sequence != before + 1:
            return
        yield entry
        before = entry.sequence
        left -= entry.length
        at = (at + entry.length) % ring.size


def _patches(file: ImageFile, offset: int, entries: Sequence[_Entry]) -> Sequence[Patch]:
    """What the entries leave behind, ascending and disjoint."""
    sectors: dict[int, bytes] = {}
    zeroings: list[tuple[int, int]] = []
    for update in (update for entry in entries for update in entry.updates):
        if update.data is not None:
            sectors[update.start] = update.data
        elif update.end > update.start:
            zeroings.append((update.start, update.end))
            if len(zeroings) > MAX_ZEROINGS:
                text = f"more than {MAX_ZEROINGS} ranges to be zeroed in the log"
                raise file.corrupt(offset, text)
            for start in [at for at in sectors if update.start <= at < update.end]:
                del sectors[start]
    starts = sorted(sectors)
    patches: list[Patch] = [(at, at + LOG_SECTOR, sectors[at]) for at in starts]
    for start, end in _merged(zeroings):
        inside = starts[bisect_left(starts, start) : bisect_left(starts, end)]
        # A sector in the middle was written after it was zeroed.
        for low, high in pairwise([start - LOG_SECTOR, *inside, end]):
            if low + LOG_SECTOR < high:
                patches.append((low + LOG_SECTOR, high, None))
    return sorted(patches, key=lambda patch: patch[0])


def _merged(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for low, high in sorted(ranges):
        if low > end:
            if start >= 0:
                yield start, end
            start, end = low, high
        end = max(end, high)
    if start >= 0:
        yield start, end
