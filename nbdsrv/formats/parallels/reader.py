"""Reading Parallels images, old and new.

::

    disk    | cluster 0 | cluster 1 | cluster 2 |        ``tracks`` sectors each (1 MiB)
    table       5            0           9
                |          a hole
    file    | header | table |  ...  | cluster | cluster |  ...  | extension |

The format extension (dirty bitmaps) changes nothing in what is read, and neither does the mark of
an image that was not closed: its clusters are there before the table names them.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.parallels.bundle import find_parent
from nbdsrv.formats.parallels.header import Header, read_header
from nbdsrv.formats.parallels.structs import HEADER_SIZE
from protocol.terms import BlockSizes

__all__ = ["ParallelsDisk", "open_parallels"]

PAGE_ENTRIES = 4096
"""Table entries read at a time: 16 KiB of table, 4 GiB of disk."""
MAX_PREFERRED = 64 << 10
"""Bytes; a larger piece of a cluster is not cheaper to read."""


class ParallelsDisk(MappedDisk):
    """A Parallels image and, if it is a snapshot's delta, what lies below it."""

    format = "parallels"

    def __init__(
        self, workers: Workers, file: ImageFile, header: Header, backing: Disk | None
    ) -> None:
        super().__init__(workers, file, backing)
        self._header = header
        self.size = header.size
        self.page_span = header.cluster_size * PAGE_ENTRIES
        self.block_sizes = replace(BlockSizes(), preferred=MAX_PREFERRED)

    @property
    def facts(self) -> Mapping[str, object]:
        """Which of the two formats, cluster size, whether it was closed, and the parent."""
        header = self._header
        facts: dict[str, object] = {
            "magic": header.magic,
            "cluster_size": header.cluster_size,
            "in_use": header.in_use,
            "extension": header.extension,
        }
        if self.backing is not None:
            facts["parent"] = self.backing.name
        return facts

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        header = self._header
        first = offset // header.cluster_size
        count = -(-length // header.cluster_size)
        raw = self.file.read(HEADER_SIZE + 4 * first, 4 * count, "the cluster table")
        if not any(raw):
            return (Segment(length, Kind.ABSENT),)
        if header.empty:
            at = HEADER_SIZE + 4 * first
            raise self.file.corrupt(at, "the image is marked as empty, and its table is not")
        entries = array("I", raw)
        if sys.byteorder == "big":  # pragma: no cover
            entries.byteswap()
        self._check_page(entries, first)
        return self._translate(entries, length)

    def _translate(self, entries: "array[int]", left: int) -> Iterator[Segment]:
        cluster_size = self._header.cluster_size
        unit = self._header.unit
        for entry in entries:
            length = min(cluster_size, left)
            left -= length
            if entry:
                yield Segment(length, Kind.DATA, entry * unit)
            else:
                yield Segment(length, Kind.ABSENT)

    def _check_page(self, entries: "array[int]", first: int) -> None:
        """Every cluster is between table and end of file, and none of the page is used twice."""
        header, file = self._header, self.file
        cluster_size, unit = header.cluster_size, header.unit
        # Old clusters may begin at any sector: sorted, each must end before the next begins.
        stored = sorted((entry, index) for index, entry in enumerate(entries) if entry)
        lowest_end = header.table_end
        for entry, index in stored:
            position = entry * unit
            if position < lowest_end:
                what = "overlaps the table" if lowest_end == header.table_end else "is used twice"
                raise file.corrupt(
                    HEADER_SIZE + 4 * (first + index), f"the cluster at {position} {what}"
                )
            # The disk's last cluster may be stored as far as the disk goes.
            needed = min(cluster_size, header.size - (first + index) * cluster_size)
            lowest_end = position + needed
            if lowest_end > file.size:
                raise file.corrupt(
                    HEADER_SIZE + 4 * (first + index),
                    f"the cluster at {position} lies beyond the end of the file",
                )


async def open_parallels(file: ImageFile, opening: Opening) -> Disk:
    """Open a Parallels image; in a bundle that says it is a delta, with its parents.

    Raises:
        CorruptImage: broken.
        UnsupportedImage: another version, or a disk split into several files.
        DiskError: the parent is not there.
    """
    header = await opening.workers.look_up(read_header, file)
    parent = await opening.workers.look_up(find_parent, file)
    backing = await opening.below(file, *parent) if parent is not None else None
    return ParallelsDisk(opening.workers, file, header, backing)
