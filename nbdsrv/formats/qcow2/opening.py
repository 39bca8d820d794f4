"""Opening a qcow2 image: its header, and everything it names.

::

    image ── external data file   beside it, a plain file
      |   ── snapshot table, bitmap directory
      '───── backing file ── any format, through ``Opening.below``
"""

import os
from dataclasses import replace

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.qcow2.bitmaps import read_bitmaps
from nbdsrv.formats.qcow2.header import Header, read_header
from nbdsrv.formats.qcow2.reader import Layers, Qcow2Disk
from nbdsrv.formats.qcow2.snapshots import find_snapshot, read_snapshots
from nbdsrv.formats.qcow2.thin import is_thin

__all__ = ["open_layers", "open_qcow2"]

_FORMATS = {"vpc": "vhd", "file": "raw", "host_device": "raw"}
"""QEMU's names of formats where ours differ."""


async def open_qcow2(file: ImageFile, opening: Opening) -> Disk:
    """``file`` as a qcow2 image, the Disk owns it then.

    Raises:
        CorruptImage: it contradicts itself.
        UnsupportedImage: encrypted, or with features that are not known.
        DiskError: what it names cannot be opened, or has no such snapshot.
    """
    if opening.writable:
        from nbdsrv.formats.qcow2.writable import open_writable

        return await open_writable(file, opening)
    return Qcow2Disk(opening.workers, await open_layers(file, opening))


async def open_layers(file: ImageFile, opening: Opening) -> Layers:
    """Everything the image is made of; ``file`` stays the caller's until there is a Disk.

    Raises:
        DiskError: see ``open_qcow2``; what had been opened is closed again.
    """
    read = await opening.workers.look_up(_read, file, opening)
    if not read.header.backing_file:
        return read
    kind = read.header.backing_format
    try:
        backing = await opening.below(file, read.header.backing_file, _FORMATS.get(kind, kind))
    except BaseException:
        if read.data_file is not None:
            read.data_file.close()
        raise
    return replace(read, backing=backing)


def _read(file: ImageFile, opening: Opening) -> Layers:
    """All but the backing file. In a thread."""
    header = read_header(file)
    snapshots = read_snapshots(file, header)
    bitmaps = read_bitmaps(file, header)
    snapshot = None
    if opening.snapshot:
        snapshot = find_snapshot(file, header, snapshots, opening.snapshot)
    data_file = _open_data_file(file, header, opening) if header.has_data_file else None
    thin = not opening.writable and is_thin(file, header)
    return Layers(file, header, data_file, None, snapshots, snapshot, bitmaps, thin)


def _open_data_file(file: ImageFile, header: Header, opening: Opening) -> ImageFile:
    if not header.data_file:
        raise DiskError(f"{file.path}: it does not name the data file that it needs")
    path = opening.path_below(file, header.data_file)
    if os.path.realpath(path) == os.path.realpath(file.path):
        raise file.corrupt(header.header_length, "the image is its own data file")
    try:
        return open_image_file(path, writable=opening.writable)
    except DiskError as error:
        text = f"{error} (the external data file of {file.path})"
        raise type(error)(text, error.errno) from error
