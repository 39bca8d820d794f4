"""Compressed grains, as streams have them: each deflated by itself.

::

    entry ──> | first sector, size | zlib stream ..... | pad |      begins on a sector
                  GRAIN_MARKER       size bytes

The marker says which grain it is, which proves that the table has led to the right place. Files
without markers have the zlib stream alone.
"""

from collections.abc import Iterator, Sequence
from typing import cast

from isal import isal_zlib

from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.vmdk.hosted import HostedExtent
from nbdsrv.formats.vmdk.structs import GRAIN_MARKER, SECTOR

__all__ = ["CompressedExtent"]

KEY_BITS = 64
"""A block's key is its sector in the file above the disk's sector it is for."""
_InflateError = cast("type[Exception]", isal_zlib.error)  # its stub calls it an instance


class CompressedExtent(HostedExtent):
    """Grains are BLOCK segments, whose key is ``sector << KEY_BITS | disk sector``."""

    def _stored(
        self, begin: int, end: int, start: int, entry: int, grains: Sequence[int]
    ) -> Iterator[Segment]:
        used: set[int] = set()
        at = begin
        for index, sector in enumerate(grains):
            length = min(self.grain, end - at)
            if sector <= 1:
                yield Segment(length, Kind.ZERO if sector else Kind.ABSENT)
            else:
                where = entry + index * self.entry_size
                self._check_place(sector * SECTOR, 1, where, "a grain")
                if sector in used:
                    raise self.file.corrupt(where, f"two grains lie at {sector * SECTOR}")
                used.add(sector)
                key = sector << KEY_BITS | (start + at) // SECTOR
                yield Segment(length, Kind.BLOCK, key)
            at += length

    def decode(self, sector: int, first_sector: int, disk_sector: int) -> bytes:
        """Inflate one grain; its length is the grain's, or what is left of the extent."""
        position = sector * SECTOR
        packed = self._packed(position, first_sector, disk_sector)
        inflater = isal_zlib.decompressobj()
        try:
            grain = inflater.decompress(packed, self.grain + 1)
        except _InflateError as error:
            raise self.file.corrupt(position, f"a compressed grain is broken: {error}") from error
        if len(grain) > self.grain:
            raise self.file.corrupt(position, "a compressed grain is longer than a grain")
        if not inflater.eof:
            raise self.file.corrupt(position, "a compressed grain ends too early")
        if len(grain) < min(self.grain, self.size - first_sector * SECTOR):
            raise self.file.corrupt(position, f"a compressed grain gives {len(grain)} bytes only")
        return bytes(grain)

    def _packed(self, position: int, first_sector: int, disk_sector: int) -> bytes:
        limit = 2 * self.grain
        if not self.header.markers:
            return self.file.read_up_to(position, limit)
        header = self.file.read(position, GRAIN_MARKER.sizeof(), "grain marker")
        marked = int.from_bytes(header[:8], "little")
        size = int.from_bytes(header[8:], "little")
        if marked not in {first_sector, disk_sector}:
            text = f"the grain for sector {first_sector} is marked as for sector {marked}"
            raise self.file.corrupt(position, text)
        if not 0 < size <= limit:
            raise self.file.corrupt(position + 8, f"a compressed grain of {size} bytes")
        return self.file.read(position + len(header), size, "compressed grain")
