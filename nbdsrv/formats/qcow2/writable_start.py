"""What is looked at before an image is written to, and what is marked before it changes."""

import os

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.reader import Layers
from nbdsrv.formats.qcow2.refcounts import Refcounts
from nbdsrv.formats.qcow2.structs import (
    BITMAP_ENTRY,
    BITMAPS_EXTENSION,
    OFFSET_MASK,
    Autoclear,
    BitmapFlag,
    ExtensionType,
    Incompatible,
)
from nbdsrv.formats.qcow2.writable_tables import Tables

__all__ = ["Start", "check_writable", "prepare"]

AUTOCLEAR_AT = 88
"""Of ``autoclear_features`` in the header."""
BITMAP_FLAGS_AT = 12
"""Of ``flags`` in a bitmap's directory entry."""

_REFUSED = {
    Incompatible.DIRTY: "was not closed, and its refcounts may be wrong; repair it first: "
    "qemu-img check -r all",
    Incompatible.CORRUPT: "is marked corrupt; repair it first: qemu-img check -r all",
    Incompatible.DATA_FILE: "has an external data file, and such images are served read-only",
    Incompatible.EXTENDED_L2: "has subclusters, and such images are served read-only",
}


def check_writable(layers: Layers) -> None:
    """Raises UnsupportedImage, in one line, for an image that is only read."""
    name, header = layers.file.path, layers.header
    for feature, reason in _REFUSED.items():
        if feature in header.incompatible_features:
            raise UnsupportedImage(f"{name} {reason}")
    if layers.snapshot is not None:
        raise UnsupportedImage(f"{name}: snapshots are served read-only; leave out --write")


class Start:
    """The tables of an image that is going to be written to. Blocks.

    Attributes:
        tables: L1 and L2.
        refcounts: which know of all tables, so that none is ever given away.
        prepared: is there nothing for ``prepare`` to do?
    """

    def __init__(self, layers: Layers) -> None:
        """Raises CorruptImage where tables lie on each other."""
        file, header = layers.file, layers.header
        self.tables = Tables(file, header)
        self.refcounts = Refcounts(file, header)
        self.prepared = not header.autoclear_features
        self._claim(file, header, header.l1_table_offset, header.l1_size * 8, 40)
        if header.nb_snapshots:
            start = header.snapshots_offset
            self._claim(file, header, start, layers.snapshots[-1].position + 1 - start, 64)
        for snapshot in layers.snapshots:
            size = snapshot.l1_size * 8
            self._claim(file, header, snapshot.l1_table_offset, size, snapshot.position)
        self._claim_bitmaps(layers)
        for number, word in enumerate(self.tables.l1):
            if word:
                at = header.l1_table_offset + number * 8
                self._claim(file, header, word & OFFSET_MASK, header.cluster_size, at)

    def _claim_bitmaps(self, layers: Layers) -> None:
        """Their directory and tables: refcounts that call them free must not cost them."""
        file, header = layers.file, layers.header
        if not layers.bitmaps:
            return
        extension = header.extensions[ExtensionType.BITMAPS]
        fields = BITMAPS_EXTENSION.parse(extension.data)
        start, size = fields.bitmap_directory_offset, fields.bitmap_directory_size
        self._claim(file, header, start, size, extension.position)
        for bitmap in layers.bitmaps:
            self._claim(file, header, bitmap.table_position, bitmap.table_size * 8, start)

    def _claim(self, file: ImageFile, header: Header, position: int, length: int, at: int) -> None:
        clusters = -(-length >> header.cluster_bits)
        if position + length > file.size:
            raise file.corrupt(at, f"a table at {position}, beyond the end of the file")
        self.refcounts.claim(position, clusters, at)


def prepare(file: ImageFile, header: Header) -> None:
    """Bitmaps become ``in_use``, since nobody keeps them; unknown features are cleared. Durably.

    Raises:
        OSError: it could not be written.
    """
    kept = header.autoclear_features & Autoclear.BITMAPS
    if kept:
        _mark_bitmaps(file, header)
    if header.autoclear_features != kept:
        os.pwrite(file.fd, kept.to_bytes(8, "big"), file.base + AUTOCLEAR_AT)
    os.fdatasync(file.fd)


def _mark_bitmaps(file: ImageFile, header: Header) -> None:
    extension = BITMAPS_EXTENSION.parse(header.extensions[ExtensionType.BITMAPS].data)
    start, size = extension.bitmap_directory_offset, extension.bitmap_directory_size
    directory = file.read(start, size, "the bitmap directory")
    at, fixed = 0, BITMAP_ENTRY.sizeof()
    while at + fixed <= size:
        entry = BITMAP_ENTRY.parse(directory[at : at + fixed])
        flags = (entry.flags | BitmapFlag.IN_USE).to_bytes(4, "big")
        os.pwrite(file.fd, flags, file.base + start + at + BITMAP_FLAGS_AT)
        at += fixed + entry.extra_data_size + entry.name_size + 7 & ~7
