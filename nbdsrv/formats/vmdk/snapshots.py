"""Sparse extents of ESX snapshots: vmfsSparse (magic COWD) and seSparse (magic cafebabe).

::

    vmfsSparse  | header | directory: 32 bits | tables of 4096 and grains ...           |
    seSparse    | header | volatile header | journal | directory: 64 bits | tables | ... | grains |

What 64-bit entries of seSparse say is in their highest four bits:

===== ============================== =========================
bits  of a directory's entry         of a table's entry
===== ============================== =========================
0     no table (the whole is 0)      not stored (the whole is 0)
1     table, its number below        unmapped by the guest: zeroes
2                                    zeroes
3                                    a grain, its number rotated
===== ============================== =========================

Facts relied on: VMware, "Virtual Disk Format 5.0"; for seSparse what QEMU documents.
"""

from collections.abc import Sequence
from struct import unpack
from typing import Any

from construct import ConstructError

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vmdk.extents import SparseExtent, check_grain
from nbdsrv.formats.vmdk.hosted import read_sectors
from nbdsrv.formats.vmdk.structs import (
    COWD_HEADER,
    COWD_TABLE_ENTRIES,
    SECTOR,
    SESPARSE_HEADER,
    SESPARSE_VERSION,
    SESPARSE_VOLATILE_HEADER,
)

__all__ = ["SeSparseExtent", "VmfsSparseExtent"]

SESPARSE_GRAIN_SECTORS = 8
SESPARSE_TABLE_SECTORS = 64
"""The only sizes VMware makes: 4 KiB grains, 4096 entries a table."""
MAX_SESPARSE_SECTORS = (64 << 40) // SECTOR
"""64 TiB, more than VMFS allows for a disk."""

_TABLE = 0x10000000
_GRAIN = 3
_TABLE_ENTRIES = SESPARSE_TABLE_SECTORS * SECTOR // 8


class VmfsSparseExtent(SparseExtent):
    """``SPARSE`` as ESX(i) has it."""

    def __init__(self, file: ImageFile, size: int) -> None:
        """Read the header, blocking; ``size`` is what the descriptor says.

        Raises:
            CorruptImage: it contradicts itself or the descriptor.
        """
        raw = COWD_HEADER.parse(file.read(0, COWD_HEADER.sizeof(), "vmfsSparse header"))
        if raw.version != 1:
            raise UnsupportedImage(f"{file.path}: vmfsSparse version {raw.version} is not served")
        check_capacity(file, 12, raw.capacity, size)
        grain = check_grain(file, 16, raw.grain_size)
        needed = -(-size // (grain * COWD_TABLE_ENTRIES))
        if raw.gd_entries < needed:
            raise file.corrupt(24, f"{raw.gd_entries} grain tables, the disk takes {needed}")
        self._directory = raw.gd_offset * SECTOR
        directory_end = self._directory + needed * 4
        if directory_end > file.size:
            raise file.corrupt(20, f"its grain directory at {self._directory} lies beyond the end")
        super().__init__(
            file,
            size=size,
            grain=grain,
            table_entries=COWD_TABLE_ENTRIES,
            reserved=((0, COWD_HEADER.sizeof()), (self._directory, directory_end)),
        )

    def _tables(self, first: int, count: int) -> Sequence[int]:
        data = self.file.read(self._directory + first * 4, count * 4, "grain directory")
        return read_sectors(data, SECTOR)

    def _grains(self, position: int, data: bytes) -> Sequence[int]:
        grains = read_sectors(data)
        if 1 in grains:
            raise self.file.corrupt(position + grains.index(1) * 4, "a grain within the header")
        return grains


class SeSparseExtent(SparseExtent):
    """``SESPARSE``: space-efficient, with grains the guest has given back."""

    entry_size = 8

    def __init__(self, file: ImageFile, size: int) -> None:
        """Read the headers, blocking; ``size`` is what the descriptor says.

        Raises:
            CorruptImage: they contradict each other, the descriptor or the size of the file.
            UnsupportedImage: a version we do not know, or a journal that was not replayed.
        """
        raw = SESPARSE_HEADER.parse(file.read(0, SECTOR, "seSparse header"))
        _check_sesparse(file, raw)
        check_capacity(file, 16, raw.capacity, size)
        self._directory = raw.gd_offset * SECTOR
        self._tables_at = raw.tables_offset * SECTOR
        self._tables_end = (raw.tables_offset + raw.tables_size) * SECTOR
        self._grains_sector = raw.grains_offset
        grain = SESPARSE_GRAIN_SECTORS * SECTOR
        needed = -(-size // (grain * _TABLE_ENTRIES)) * 8
        if raw.gd_size * SECTOR < needed:
            raise file.corrupt(136, f"a grain directory of {raw.gd_size} sectors is too short")
        directory_end = self._directory + needed
        if directory_end > file.size:
            raise file.corrupt(128, f"its grain directory at {self._directory} lies beyond the end")
        super().__init__(
            file,
            size=size,
            grain=grain,
            table_entries=_TABLE_ENTRIES,
            reserved=((0, SECTOR), (self._directory, directory_end)),
        )

    def _tables(self, first: int, count: int) -> Sequence[int]:
        position = self._directory + first * 8
        data = self.file.read(position, count * 8, "grain directory")
        tables = []
        for index, entry in enumerate(unpack(f"<{count}Q", data)):
            if not entry:
                tables.append(0)
                continue
            number = entry & 0xFFFFFFFF
            table = self._tables_at + number * SESPARSE_TABLE_SECTORS * SECTOR
            if entry >> 32 != _TABLE or table >= self._tables_end:
                raise self.file.corrupt(position + index * 8, f"no place of a table: {entry:#x}")
            tables.append(table)
        return tables

    def _grains(self, position: int, data: bytes) -> Sequence[int]:
        base = self._grains_sector
        grains = []
        for index, entry in enumerate(unpack(f"<{len(data) // 8}Q", data)):
            kind = entry >> 60
            if kind == _GRAIN:
                number = (entry >> 48 & 0xFFF) | (entry & 0xFFFFFFFFFFFF) << 12
                grains.append(base + number * SESPARSE_GRAIN_SECTORS)
            elif kind in {1, 2}:
                grains.append(1)
            elif not entry:
                grains.append(0)
            else:
                raise self.file.corrupt(position + index * 8, f"no place of a grain: {entry:#x}")
        return grains


def _check_sesparse(file: ImageFile, raw: Any) -> None:
    if raw.version != SESPARSE_VERSION or raw.flags:
        raise UnsupportedImage(
            f"{file.path}: seSparse version {raw.version:#x} with flags {raw.flags:#x} is not known"
        )
    sizes = (raw.grain_size, raw.table_size)
    if sizes != (SESPARSE_GRAIN_SECTORS, SESPARSE_TABLE_SECTORS):
        raise file.corrupt(24, f"grains and tables of {sizes[0]} and {sizes[1]} sectors")
    for place in ("gd", "tables", "grains"):
        for what in (f"{place}_offset", f"{place}_size"):
            if raw[what] >= 2 * MAX_SESPARSE_SECTORS:
                raise file.corrupt(0, f"its {what} is {raw[what]} sectors")
    if not raw.grains_offset or not raw.tables_offset:
        raise file.corrupt(0, "its tables or grains lie where the header is")
    position = raw.volatile_header_offset * SECTOR
    try:
        volatile = SESPARSE_VOLATILE_HEADER.parse(file.read(position, SECTOR, "volatile header"))
    except ConstructError as error:
        raise file.corrupt(position, "no volatile header") from error
    if volatile.replay_journal:
        raise UnsupportedImage(
            f"{file.path}: its journal was never replayed; power the VM on once, or consolidate"
        )


def check_capacity(file: ImageFile, position: int, sectors: int, size: int) -> None:
    """An extent's own header must cover what the descriptor says of it.

    Raises:
        CorruptImage: it is shorter.
    """
    if sectors * SECTOR < size:
        raise file.corrupt(position, f"an extent of {sectors} sectors, described as {size} bytes")
