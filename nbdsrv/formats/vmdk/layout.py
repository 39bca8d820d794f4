"""From a VMDK file to its descriptor and its extents, all of them open.

::

    # Disk DescriptorFile   text      ──> extents beside it, by name
    KDMV                    sparse    ──> the descriptor within; the one extent is the file itself
    COWD, cafebabe          an extent of a snapshot, only readable through its descriptor

Rule: names of extents are file names, relative to the descriptor's directory; what looks like a URL
and what is a device is not followed, whoever wrote the image.
"""

import ntpath
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.opening import is_name
from nbdsrv.formats.vmdk.compressed import CompressedExtent
from nbdsrv.formats.vmdk.descriptor import (
    MAX_DESCRIPTOR,
    Descriptor,
    ExtentLine,
    read_descriptor,
)
from nbdsrv.formats.vmdk.extents import Extent, FlatExtent, ZeroExtent
from nbdsrv.formats.vmdk.hosted import HostedExtent, HostedHeader, read_header
from nbdsrv.formats.vmdk.snapshots import SeSparseExtent, VmfsSparseExtent, check_capacity
from nbdsrv.formats.vmdk.structs import COWD_MAGIC, SECTOR, SESPARSE_MAGIC, SPARSE_MAGIC

__all__ = ["Layout", "local_name", "read_layout"]

_BEGINNING = re.compile(rb"\s*#\s*Disk\s+DescriptorFile", re.IGNORECASE)
_FLAT = frozenset({"FLAT", "VMFS"})
_SPARSE = frozenset({"SPARSE", "VMFSSPARSE", "SESPARSE"})
_DEVICES = frozenset(
    {
        "fulldevice",
        "partitioneddevice",
        "vmfsraw",
        "vmfsrdm",
        "vmfsrdmp",
        "vmfsrawdevicemap",
        "vmfspassthroughrawdevicemap",
    }
)
"""createTypes of disks whose content is not in files."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True, slots=True)
class Layout:
    """What a VMDK is made of.

    Attributes:
        position: of the descriptor in its file, for messages.
        extents: in the order of the disk.
    """

    descriptor: Descriptor
    position: int
    extents: Sequence[Extent]

    @property
    def size(self) -> int:
        """Of the disk."""
        return sum(extent.size for extent in self.extents)


def read_layout(file: ImageFile, opened: list[ImageFile]) -> Layout:
    """Read the descriptor and open the extents. Blocking.

    Every file that is opened is added to ``opened`` at once, for the caller to close.

    Raises:
        DiskError: not a VMDK, a broken one, of a kind that is not served, or an extent is missing.
    """
    start = file.read_up_to(0, SECTOR)
    if start.startswith((COWD_MAGIC, SESPARSE_MAGIC)):
        raise _mere_extent(file, "of a snapshot")
    if start.startswith(SPARSE_MAGIC):
        return _embedded(file)
    if not _BEGINNING.match(start) or file.size > MAX_DESCRIPTOR:
        raise file.corrupt(0, "neither a VMDK descriptor nor a sparse extent")
    descriptor = read_descriptor(file, 0, file.size)
    _check_kind(file, descriptor)
    if not descriptor.extents:
        raise file.corrupt(0, "its descriptor names no extents")
    extents = [_open_extent(file, line, opened) for line in descriptor.extents]
    _check_grains(file, extents)
    _check_distinct(file, opened)
    return Layout(descriptor, 0, extents)


def _embedded(file: ImageFile) -> Layout:
    header = read_header(file)
    position, length = header.descriptor_offset, header.descriptor_size
    # Where the descriptor is a file beside it, the place for one is missing, or empty.
    if not position or not length or file.read(position, 1, "descriptor") == b"\0":
        raise _mere_extent(file, "of a split disk")
    descriptor = read_descriptor(file, position, length)
    _check_kind(file, descriptor)
    if len(descriptor.extents) != 1 or descriptor.extents[0].kind not in _SPARSE:
        raise file.corrupt(position, "its descriptor tells of other extents than the file itself")
    return Layout(descriptor, position, [_hosted(file, header, header.capacity)])


def _hosted(file: ImageFile, header: HostedHeader, size: int) -> HostedExtent:
    kind = CompressedExtent if header.compressed else HostedExtent
    return kind(file, header, size)


def _check_kind(file: ImageFile, descriptor: Descriptor) -> None:
    if descriptor.create_type.lower() in _DEVICES:
        raise UnsupportedImage(
            f"{file.path}: a {descriptor.create_type} disk; serve the device itself instead"
        )


def _open_extent(file: ImageFile, line: ExtentLine, opened: list[ImageFile]) -> Extent:
    size = line.sectors * SECTOR
    what = f"an extent of kind {line.kind}"
    if line.access == "NOACCESS":
        raise UnsupportedImage(f"{file.path}: {what} is marked NOACCESS; such disks are not served")
    if line.kind == "ZERO":
        return ZeroExtent(size)
    if line.kind not in _FLAT | _SPARSE:
        raise UnsupportedImage(f"{file.path}: {what} is not served")
    if not line.name:
        raise file.corrupt(0, f"{what} without a file")
    try:
        extent = _open_file(file, line.name)
    except DiskError as error:
        raise type(error)(f"{error} (an extent of {file.path})", error.errno) from error
    opened.append(extent)
    if line.kind in _SPARSE:
        return _open_sparse(extent, size)
    if (line.first * SECTOR) + size > extent.size:
        raise extent.corrupt(extent.size, f"the file ends within an extent of {size} bytes")
    opened[-1] = _narrowed(extent, line.first * SECTOR, size)
    return FlatExtent(opened[-1])


def _narrowed(file: ImageFile, base: int, size: int) -> ImageFile:
    """A part of ``file`` that takes its place and its descriptor."""
    try:
        return ImageFile(file.path, file.fd, size=size, base=base, device=False, writable=False)
    except OSError as error:
        raise DiskError.from_os(file.path, error) from error


def _open_sparse(file: ImageFile, size: int) -> Extent:
    """By its magic: the descriptor's SPARSE may be either kind."""
    magic = file.read_up_to(0, 8)
    if magic.startswith(COWD_MAGIC):
        return VmfsSparseExtent(file, size)
    if magic == SESPARSE_MAGIC:
        return SeSparseExtent(file, size)
    header = read_header(file)
    check_capacity(file, header.position + 12, header.capacity // SECTOR, size)
    return _hosted(file, header, size)


def _open_file(file: ImageFile, name: str) -> ImageFile:
    if not is_name(name):
        raise file.corrupt(0, f"an extent's name is {name[:60]!r}")
    name = local_name(name)
    if _URL.match(name):
        raise UnsupportedImage(f"{name!r} is not a plain file name; not followed")
    path = os.path.join(os.path.dirname(file.path), name)
    if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode):
        raise UnsupportedImage(f"{path} is a device; serve it itself instead")
    return open_image_file(path)


def local_name(name: str) -> str:
    r"""A name as this system has it: ``C:\VMs\disk.vmdk`` was written elsewhere."""
    drive, _ = ntpath.splitdrive(name)
    return ntpath.basename(name) if drive or "\\" in name else name


def _check_grains(file: ImageFile, extents: Sequence[Extent]) -> None:
    """Compressed grains must not be cut by the pages of a disk of several extents."""
    start = 0
    for number, extent in enumerate(extents, 1):
        if isinstance(extent, CompressedExtent) and start % extent.grain:
            raise UnsupportedImage(
                f"{file.path}: extent {number} is compressed and begins within a grain"
            )
        start += extent.size


def _check_distinct(file: ImageFile, opened: Sequence[ImageFile]) -> None:
    """No byte of a file is in two places of the disk."""
    places = []
    for extent in opened:
        info = os.fstat(extent.fd)
        places.append((info.st_dev, info.st_ino, extent.base, extent.base + extent.size))
    places.sort()
    for (*low, _, low_end), (*high, start, _) in pairwise(places):
        if low == high and start < low_end:
            raise file.corrupt(0, f"two of its extents lie in the same place, at {start}")


def _mere_extent(file: ImageFile, of_what: str) -> UnsupportedImage:
    return UnsupportedImage(
        f"{file.path}: an extent {of_what}; open its descriptor, the small .vmdk beside it"
    )
