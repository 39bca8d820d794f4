"""Persistent dirty bitmaps, as meta contexts ``qemu:dirty-bitmap:NAME``.

::

    bitmap directory   | BITMAP_ENTRY | extra | name | pad to 8 | ...
                             |
    bitmap table             '--> | offset | 0: zeroes | 1: ones | ...    a cluster of bits each
                                     |
    bitmap data                      '--> bit n, lowest first: bytes [n << granularity, ...)

Rule: a bitmap that may be out of date is not offered. The autoclear bit must be set (somebody who
did not know of bitmaps wrote to the image otherwise), the bitmap not ``in_use`` (QEMU was killed).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.structs import (
    BITMAP_ENTRY,
    BITMAPS_EXTENSION,
    DIRTY_TRACKING,
    MAX_BITMAP_NAME,
    MAX_BITMAPS,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    OFFSET_MASK,
    Autoclear,
    BitmapFlag,
    ExtensionType,
)

__all__ = ["CONTEXT_PREFIX", "Bitmap", "dirty_extents", "read_bitmaps"]

CONTEXT_PREFIX = "qemu:dirty-bitmap:"
DIRTY = 1
MAX_DIRECTORY = 1 << 20
"""Bytes of directory, thousands of bitmaps; read whole when the image is opened."""
MAX_EXTENTS = 1 << 16
"""Extents in one answer; it may stop short."""
MAX_CLUSTERS = 256
"""Clusters of bits looked at for one answer."""

_STRETCHES = re.compile(rb"\x00+|\xff+|[^\x00\xff]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One entry of the directory.

    Attributes:
        granularity_bits: one bit stands for ``1 << granularity_bits`` bytes of the disk.
        table_position: of the bitmap table in the file.
        table_size: entries.
        flags: ``in_use`` and the like.
        usable: is it what it says, and do we know all about it?
    """

    name: str
    granularity_bits: int
    table_position: int
    table_size: int
    flags: BitmapFlag
    usable: bool

    @property
    def context(self) -> str:
        """The meta context it is told under."""
        return CONTEXT_PREFIX + self.name


def read_bitmaps(file: ImageFile, header: Header) -> tuple[Bitmap, ...]:
    """The directory; nothing of the bits. Blocking.

    Raises:
        CorruptImage: it contradicts itself or the file.
    """
    extension = header.extensions.get(ExtensionType.BITMAPS)
    if extension is None:
        if header.has_autoclear(Autoclear.BITMAPS):
            raise file.corrupt(88, "the bitmaps feature without the bitmaps extension")
        return ()
    if not header.has_autoclear(Autoclear.BITMAPS):
        return ()
    at = extension.position
    if len(extension.data) != BITMAPS_EXTENSION.sizeof():
        raise file.corrupt(at, f"a bitmaps extension of {len(extension.data)} bytes")
    fields = BITMAPS_EXTENSION.parse(extension.data)
    size, start = fields.bitmap_directory_size, fields.bitmap_directory_offset
    if not 1 <= fields.nb_bitmaps <= MAX_BITMAPS or size > MAX_DIRECTORY:
        raise file.corrupt(at, f"{fields.nb_bitmaps} bitmaps in a directory of {size} bytes")
    if not header.is_aligned(start) or start < header.cluster_size:
        raise file.corrupt(at, f"the bitmap directory at {start}")
    directory = file.read(start, size, "the bitmap directory")
    bitmaps = tuple(_entries(file, header, directory, start))
    if len(bitmaps) != fields.nb_bitmaps:
        raise file.corrupt(start, f"{len(bitmaps)} bitmaps instead of {fields.nb_bitmaps}")
    if len({bitmap.name for bitmap in bitmaps}) != len(bitmaps):
        raise file.corrupt(start, "two bitmaps of the same name")
    return bitmaps


def _entries(file: ImageFile, header: Header, directory: bytes, start: int) -> Iterator[Bitmap]:
    at = 0
    fixed = BITMAP_ENTRY.sizeof()
    while at < len(directory):
        if at + fixed > len(directory):
            raise file.corrupt(start + at, "the bitmap directory ends within an entry")
        entry = BITMAP_ENTRY.parse(directory[at : at + fixed])
        name_at = at + fixed + entry.extra_data_size
        end = name_at + entry.name_size
        if not 1 <= entry.name_size <= MAX_BITMAP_NAME or end > len(directory):
            raise file.corrupt(start + at, f"a bitmap's name of {entry.name_size} bytes")
        name = _name(file, directory[name_at:end], start + name_at)
        flags = BitmapFlag(entry.flags & sum(BitmapFlag))
        known = not entry.extra_data_size or BitmapFlag.EXTRA_DATA_COMPATIBLE in flags
        usable = known and entry.flags == flags and entry.type == DIRTY_TRACKING
        bits = entry.granularity_bits
        if usable:
            if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
                raise file.corrupt(start + at, f"a bitmap of granularity 2^{bits}")
            # While a bitmap is in use its size may lag behind the disk's.
            usable = BitmapFlag.IN_USE not in flags
        position, count = entry.bitmap_table_offset, entry.bitmap_table_size
        if usable:
            _check_table(file, header, position, count, bits, start + at)
        yield Bitmap(name, bits, position, count, flags, usable)
        at = end + 7 & ~7


def _name(file: ImageFile, raw: bytes, position: int) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise file.corrupt(position, f"a bitmap named {raw[:40]!r}") from error
    if not name.isprintable():
        raise file.corrupt(position, f"a bitmap named {name[:40]!r}")
    return name


def _check_table(
    file: ImageFile, header: Header, position: int, count: int, bits: int, at: int
) -> None:
    covered = bits + 3 + header.cluster_bits  # bits of the disk that a cluster of bits tells of
    if count != -(-header.size >> covered):
        raise file.corrupt(at, f"a bitmap table of {count} entries")
    if not header.is_aligned(position) or (count and position < header.cluster_size):
        raise file.corrupt(at, f"a bitmap table at {position}")
    if position + count * 8 > file.size:
        raise file.corrupt(at, f"a bitmap table at {position} reaches beyond the end of the file")


def dirty_extents(
    file: ImageFile, bitmap: Bitmap, cluster_size: int, offset: int, length: int
) -> list[tuple[int, int]]:
    """(length, 1 if dirty) from ``offset`` on; may stop short. Blocking.

    Raises:
        CorruptImage: the bitmap points outside the file.
    """
    shift = bitmap.granularity_bits
    covered = cluster_size << shift + 3
    found: list[tuple[int, int]] = []
    at, end = offset, offset + length
    for _ in range(MAX_CLUSTERS):
        if at >= end or len(found) >= MAX_EXTENTS:
            break
        index = at // covered
        start, stop = index * covered, min((index + 1) * covered, end)
        data = _cluster(file, bitmap, index, cluster_size)
        if isinstance(data, int):
            found.append((stop - at, data))
            at = stop
            continue
        first, last = at - start >> shift + 3, (stop - start - 1 >> shift + 3) + 1
        where = start + (first << shift + 3)
        for count, flag in _runs(data[first:last]):
            upto = min(where + (count << shift), stop)
            if upto > at:
                found.append((upto - at, flag))
                at = upto
            where += count << shift
    return found


def _cluster(file: ImageFile, bitmap: Bitmap, index: int, cluster_size: int) -> bytes | int:
    """A cluster of bits, or the flag that all of them have."""
    where = bitmap.table_position + index * 8
    word = int.from_bytes(file.read(where, 8, "a bitmap table"), "big")
    position = word & OFFSET_MASK
    if word & ~OFFSET_MASK & ~1 or (position and word & 1) or position % cluster_size:
        raise file.corrupt(where, "a bitmap table entry with reserved bits set")
    if not position:
        return DIRTY if word else 0
    return file.read(position, cluster_size, "a bitmap's data")


def _runs(bits: bytes) -> Iterator[tuple[int, int]]:
    """(count, flag) of consecutive equal bits, not merged across bytes."""
    for match in _STRETCHES.finditer(bits):
        stretch = match[0]
        byte = stretch[0]
        if byte in {0, 0xFF}:
            yield len(stretch) * 8, byte & DIRTY
        else:
            yield from _MIXED[byte]


def _runs_of(byte: int) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for bit in range(8):
        flag = byte >> bit & 1
        if runs and runs[-1][1] == flag:
            runs[-1] = (runs[-1][0] + 1, flag)
        else:
            runs.append((1, flag))
    return tuple(runs)


_MIXED = tuple(_runs_of(byte) for byte in range(256))
