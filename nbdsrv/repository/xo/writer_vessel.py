"""What the blocks of a new disk are put into: a VHD directory, or one VHD.

::

    VHD directory    data/<stamp>.vhd/blocks/0/17     a file a block, packed, encrypted
                     bat, header, footer              when all blocks are there
                     <stamp>.alias.vhd                visible: last

    VHD              .nbdsrv-<random>.tmp             blocks one behind the other
                     BAT, header, footers             when all blocks are there
                     <stamp>.vhd                      visible: renamed

Rule: a vessel that is not published is garbage that our next backup of this disk removes.
"""

import os
import sys
import threading
from abc import ABC, abstractmethod
from array import array
from contextlib import suppress

from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.vhd.structs import ABSENT, MAX_SECTORS, SECTOR
from nbdsrv.repository.xo import filters
from nbdsrv.repository.xo.layout import ALIAS, BAT, DATA, FILTERS, FOOTER, HEADER, VHD, block_path
from nbdsrv.repository.xo.sealing import Sealing
from nbdsrv.repository.xo.vhd_directory import bat_file
from nbdsrv.repository.xo.writer_place import Place
from nbdsrv.repository.xo.writer_vhd import BITMAP, BLOCK, TABLE_AT, entries_of

__all__ = ["DIRECTORY", "FILE", "DirectoryVessel", "FileVessel", "Vessel"]

DIRECTORY = "vhd-directory"
FILE = "vhd"


class Vessel(ABC):
    """One disk being written. ``store`` from any number of threads; the rest by one, behind it.

    Attributes:
        path: what the point's metadata and children call it by.
        length: bytes stored so far.
        bat: as it was written, by ``finish``.
    """

    path: str
    length: int = 0
    bat: bytes = b""

    @abstractmethod
    def store(self, block: int, data: memoryview) -> int:
        """A block, 2 MiB; each once. Bytes it takes."""

    @abstractmethod
    def finish(self, header: bytes, footer: bytes) -> None:
        """All blocks are there: everything is durable, and still not visible."""

    @abstractmethod
    def publish(self) -> None:
        """Durably visible under ``path``."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what is there, as far as that can be, also what is published. Idempotent."""

    def close(self) -> None:
        """Give descriptors back; idempotent."""


class DirectoryVessel(Vessel):
    """A VHD directory and its alias."""

    def __init__(
        self, place: Place, sealing: Sealing, directory: str, stamp: str, packing: str, size: int
    ) -> None:
        """Make the directory; nothing is in it yet."""
        self.path = f"{directory}/{stamp}{ALIAS}"
        self._target = f"{DATA}/{stamp}{VHD}"
        self._directory = f"{directory}/{self._target}"
        self._place = place
        self._sealing = sealing
        self._packing = packing
        self._entries = entries_of(size)
        self._present: set[int] = set()
        self._made: set[str] = set()
        self._unsettled: set[str] = {directory}
        self._lock = threading.Lock()
        self._make(self._directory)
        listed = filters.filter_file(packing)
        if listed is not None:
            self._put(FILTERS, listed, filters.NONE)

    def store(self, block: int, data: memoryview) -> int:
        path = block_path(self._directory, block)
        with self._lock:
            self._make(path.rpartition("/")[0])
        packed = filters.pack(self._packing, b"".join((BITMAP, data)))
        sealed = self._sealing.seal(packed)
        self._place.write_new(path, sealed)
        with self._lock:
            self._present.add(block)
            self.length += len(sealed)
        return len(sealed)

    def finish(self, header: bytes, footer: bytes) -> None:
        self.bat = bat_file(self._present, self._entries)
        for name, content in ((BAT, self.bat), (HEADER, header), (FOOTER, footer)):
            self._put(name, content, self._packing)
        self._place.settle([*self._unsettled])

    def publish(self) -> None:
        # Text of one line, without an end of line.
        self._place.publish(self.path, self._sealing.seal(self._target.encode()))

    def discard(self) -> None:
        with suppress(DiskError):
            self._place.remove(self.path)
            self._place.remove_tree(self._directory)

    def _put(self, name: str, content: bytes, packing: str) -> None:
        packed = self._sealing.seal(filters.pack(packing, content))
        self._place.write_new(f"{self._directory}/{name}", packed)
        self.length += len(packed)

    def _make(self, directory: str) -> None:
        if directory not in self._made:
            self._unsettled.update(self._place.make_directory(directory))
            self._unsettled.add(directory)
            self._made.add(directory)


class FileVessel(Vessel):
    """A VHD in one file: at most 2040 GiB, and never encrypted."""

    def __init__(self, place: Place, directory: str, stamp: str, size: int) -> None:
        """Make the file.

        Raises:
            UnsupportedImage: the disk is too large.
        """
        if size > MAX_SECTORS * SECTOR:
            raise UnsupportedImage(
                f"{place.full(directory)}: a VHD has at most 2040 GiB, this disk has"
                f" {size / (1 << 30):.0f}; use --layout vhd-directory"
            )
        self.path = f"{directory}/{stamp}{VHD}"
        self._place = place
        self._directory = directory
        self._temporary = place.temporary(directory)
        self._table = array("I", [ABSENT]) * (-(-entries_of(size) * 4 // SECTOR) * SECTOR // 4)
        self._next = TABLE_AT + 4 * len(self._table)
        self._lock = threading.Lock()
        self._fd = place.create(self._temporary)

    def store(self, block: int, data: memoryview) -> int:
        with self._lock:
            position = self._next
            self._next += len(BITMAP) + BLOCK
            self._table[block] = position // SECTOR
        self._place.append(self._fd, self._temporary, position, BITMAP, data)
        return len(BITMAP) + BLOCK

    def finish(self, header: bytes, footer: bytes) -> None:
        table = array("I", self._table)
        if sys.byteorder == "little":
            table.byteswap()
        self.bat = table.tobytes()
        place, fd = self._place, self._fd
        place.append(fd, self._temporary, 0, footer, header, self.bat)
        self.length = place.append(fd, self._temporary, self._next, footer)
        place.sync(fd, self._temporary)

    def publish(self) -> None:
        self._place.rename(self._temporary, self.path)
        self._place.settle([self._directory])
        self.close()

    def discard(self) -> None:
        with suppress(DiskError):
            self._place.remove(self._temporary)
            self._place.remove(self.path)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
