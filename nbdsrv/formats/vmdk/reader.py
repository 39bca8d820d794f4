"""VMDK images as Disks.

::

    descriptor ── extent ── extent ── extent ...         size: their sum
        |
        parentCID ──> the parent, whose CID must be that

===================== ======================================= ===============
createType            extents                                 Disk
===================== ======================================= ===============
monolithicSparse      KDMV, the descriptor within             VmdkDisk
streamOptimized       KDMV, the same, compressed              VmdkDisk
twoGbMaxExtentSparse  KDMV files beside the descriptor        VmdkDisk
vmfsSparse, seSparse  COWD or cafebabe beside it, and parent  VmdkDisk
monolithicFlat, vmfs  raw files beside it                     FlatVmdk
twoGbMaxExtentFlat
===================== ======================================= ===============

Rule: a parent is proven by its CID before a byte of it is served.
"""

import ntpath
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping

from nbdsrv.disk.concat import Concat
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Segment
from nbdsrv.formats.raw import RawDisk
from nbdsrv.formats.vmdk.compressed import KEY_BITS
from nbdsrv.formats.vmdk.descriptor import Descriptor
from nbdsrv.formats.vmdk.extents import FlatExtent, SparseExtent
from nbdsrv.formats.vmdk.hosted import HostedExtent
from nbdsrv.formats.vmdk.layout import Layout, local_name, read_layout
from nbdsrv.formats.vmdk.structs import SECTOR
from protocol.terms import BlockSizes

__all__ = ["FlatVmdk", "VmdkDisk", "open_vmdk"]

MAX_PREFERRED = 64 << 10
"""Bytes; larger grains are no reason to ask for more at a time."""
MIN_PREFERRED = 4096
QUICK = 64 << 10
"""Bytes of a grain that unpacks within a tenth of a millisecond."""


class VmdkDisk(MappedDisk):
    """A disk with at least one sparse extent."""

    format = "vmdk"

    def __init__(
        self,
        workers: Workers,
        file: ImageFile,
        layout: Layout,
        opened: Iterable[ImageFile],
        parent: "Disk | None",
    ) -> None:
        """Becomes the owner of ``file``, ``opened`` and ``parent``."""
        super().__init__(workers, file, parent)
        self.descriptor = layout.descriptor
        self.size = layout.size
        self.page_span = max(extent.page_span for extent in layout.extents)
        self._layout = layout
        self._opened = tuple(opened)
        self.further_files = tuple(each.path for each in self._opened)
        self._extents = tuple(layout.extents)
        self._starts: list[int] = []
        start = 0
        for extent in layout.extents:
            self._starts.append(start)
            start += extent.size
        grain = max(extent.grain for extent in layout.extents)
        preferred = max(MIN_PREFERRED, min(grain, MAX_PREFERRED))
        self.block_sizes = BlockSizes(preferred=preferred)

    @property
    def facts(self) -> Mapping[str, object]:
        """See ``_facts``; and what the sparse extents say."""
        sparse = [extent for extent in self._extents if isinstance(extent, SparseExtent)]
        facts = {**_facts(self._layout, self.backing), "grain_size": sparse[0].grain}
        hosted = [extent.header for extent in sparse if isinstance(extent, HostedExtent)]
        if hosted:
            facts["version"] = hosted[0].version
            facts["compressed"] = any(header.compressed for header in hosted)
            facts["unclean_shutdown"] = any(header.unclean for header in hosted)
        return facts

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        index = bisect_right(self._starts, offset) - 1
        while length:
            extent, start = self._extents[index], self._starts[index]
            count = min(length, extent.size - (offset - start))
            yield from extent.segments(offset - start, count, start)
            offset, length, index = offset + count, length - count, index + 1

    def _decode(self, key: int) -> bytes:
        sector, disk_sector = key >> KEY_BITS, key & ((1 << KEY_BITS) - 1)
        index = bisect_right(self._starts, disk_sector * SECTOR) - 1
        first_sector = disk_sector - self._starts[index] // SECTOR
        return self._extents[index].decode(sector, first_sector, disk_sector)

    def _packed(self, key: int) -> tuple[int, int] | None:
        if len(self._extents) > 1 or self._extents[0].file is not self.file:
            return None
        grain = self._extents[0].grain
        return ((key >> KEY_BITS) * SECTOR, grain) if grain <= QUICK else None

    def _close_files(self) -> None:
        for file in (self.file, *self._opened):
            file.close()


class FlatVmdk(Concat):
    """A disk of flat extents alone; holes of their files are holes of the disk."""

    format = "vmdk"

    def __init__(self, workers: Workers, file: ImageFile, layout: Layout) -> None:
        """Becomes the owner of ``file`` and of the extents' files."""
        files = [extent.file for extent in layout.extents if extent.file is not None]
        super().__init__(workers, file.path, [RawDisk(workers, part) for part in files])
        self.descriptor = layout.descriptor
        self.further_files = tuple(part.path for part in files)
        self._file = file
        self._layout = layout

    @property
    def facts(self) -> Mapping[str, object]:
        """See ``_facts``."""
        return _facts(self._layout, None)

    async def close(self) -> None:
        """Close the extents and the descriptor."""
        await super().close()
        self._file.close()


def _facts(layout: Layout, parent: Disk | None) -> dict[str, object]:
    descriptor = layout.descriptor
    facts: dict[str, object] = {
        "create_type": descriptor.create_type,
        "content_id": f"{descriptor.content_id:08x}",
        "extents": len(layout.extents),
    }
    if parent is not None:
        facts["parent"] = parent.name
        facts["parent_content_id"] = f"{descriptor.parent_content_id:08x}"
    for key, name in _DATABASE_FACTS.items():
        if value := descriptor.database.get(key):
            facts[name] = value
    return facts


_DATABASE_FACTS = {
    "adaptertype": "adapter_type",
    "virtualhwversion": "hardware_version",
    "toolsversion": "tools_version",
    "longcontentid": "long_content_id",
    "uuid": "uuid",
    "uuid.image": "uuid",
    "comment": "comment",
}
"""Of the disk data base, to what ``info`` calls it."""


async def open_vmdk(file: ImageFile, opening: Opening) -> Disk:
    """Open a VMDK by its descriptor or the file that holds one; becomes the owner of ``file``.

    Raises:
        DiskError: it is broken or not of a kind we serve, an extent or the parent is missing, or
            the parent is not the one it was.
    """
    workers = opening.workers
    opened: list[ImageFile] = []
    parent: Disk | None = None
    try:
        layout = await workers.look_up(read_layout, file, opened)
        if layout.descriptor.has_parent:
            parent = await _open_parent(file, layout, opening)
        elif all(isinstance(extent, FlatExtent) for extent in layout.extents):
            return FlatVmdk(workers, file, layout)
        return VmdkDisk(workers, file, layout, opened, parent)
    except BaseException:
        for extent in opened:
            extent.close()
        if parent is not None:
            await parent.close()
        raise


async def _open_parent(file: ImageFile, layout: Layout, opening: Opening) -> Disk:
    """The parent, proven."""
    descriptor, position = layout.descriptor, layout.position
    wanted = f"{descriptor.parent_content_id:08x}"
    if not descriptor.parent_name:
        raise file.corrupt(position, f"its parent has CID {wanted}, but it does not say where")
    name = await opening.workers.look_up(_find, file, descriptor.parent_name)
    parent = await opening.below(file, name, "vmdk")
    try:
        _prove(file, position, descriptor, parent)
    except DiskError:
        await parent.close()
        raise
    return parent


def _find(file: ImageFile, name: str) -> str:
    """Where the child says its parent is, or beside the child: both may have moved."""
    name = local_name(name)
    directory = os.path.dirname(file.path)
    beside = ntpath.basename(name)
    if "\0" in name or os.path.lexists(os.path.join(directory, name)):
        return name
    return beside if os.path.lexists(os.path.join(directory, beside)) else name


def _prove(file: ImageFile, position: int, descriptor: Descriptor, parent: Disk) -> None:
    assert isinstance(parent, (VmdkDisk, FlatVmdk))
    found, wanted = parent.descriptor.content_id, descriptor.parent_content_id
    if found != wanted:
        raise file.corrupt(
            position,
            f"its parent had CID {wanted:08x}, but {parent.name} has CID {found:08x}: "
            "a wrong one, or changed since",
        )
