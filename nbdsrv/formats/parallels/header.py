"""The header of a Parallels image, checked once.

::

    | header:64 | table: 4 bytes a cluster | ... | clusters
                                 table_end
"""

from dataclasses import dataclass

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.parallels.structs import (
    EMPTY_FLAG,
    EXTENSION_MAGIC,
    HEADER_SIZE,
    IN_USE,
    MAGIC,
    MAGIC_EXT,
    SECTOR,
    VERSION,
    ParallelsHeader,
)

__all__ = ["Header", "read_header"]

MAX_CLUSTER_SECTORS = (1 << 30) // SECTOR
"""A cluster of 1 GiB; Parallels makes 1 MiB, and formerly 63 to 1008 sectors."""
MAX_SECTORS = (1 << 63) // SECTOR - 1
"""So that the disk's size is a signed 64-bit number of bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the image says of itself.

    Attributes:
        size: of the disk, bytes.
        cluster_size: bytes.
        unit: bytes that a table entry counts in.
        table_end: first byte that may hold a cluster.
        empty: has nothing ever been written?
        in_use: was it not closed?
        extension: is there a format extension? The old format has random bytes there.
    """

    magic: str
    size: int
    cluster_size: int
    unit: int
    table_end: int
    empty: bool
    in_use: bool
    extension: bool


def read_header(file: ImageFile) -> Header:
    """Read and check the header. Blocking.

    Raises:
        CorruptImage: it contradicts itself, or the file.
        UnsupportedImage: another version.
    """
    raw = ParallelsHeader.parse(file.read(0, HEADER_SIZE, "the Parallels header"))
    if raw.magic not in {MAGIC, MAGIC_EXT}:
        raise file.corrupt(0, "no Parallels header")
    if raw.version != VERSION:
        raise UnsupportedImage(f"{file.path}: Parallels version {raw.version} is not served")
    extended = raw.magic == MAGIC_EXT
    sectors = raw.sectors if extended else raw.sectors & 0xFFFF_FFFF
    if not 1 <= raw.tracks <= MAX_CLUSTER_SECTORS:
        raise file.corrupt(28, f"clusters of {raw.tracks} sectors")
    if sectors > MAX_SECTORS or -(-sectors // raw.tracks) > raw.entries:
        what = f"{raw.entries} clusters of {raw.tracks} sectors for a disk of {sectors}"
        raise file.corrupt(32, what)
    table_end = HEADER_SIZE + 4 * raw.entries
    if table_end > file.size:
        raise file.corrupt(HEADER_SIZE, "the cluster table reaches beyond the end of the file")
    if extended and raw.extension:
        at = raw.extension * SECTOR
        if file.read(at, len(EXTENSION_MAGIC), "the format extension") != EXTENSION_MAGIC:
            raise file.corrupt(at, "no format extension where the header says")
    cluster_size = raw.tracks * SECTOR
    return Header(
        magic=raw.magic.decode(),
        size=sectors * SECTOR,
        cluster_size=cluster_size,
        unit=cluster_size if extended else SECTOR,
        table_end=table_end,
        empty=bool(raw.flags & EMPTY_FLAG),
        in_use=raw.in_use == IN_USE,
        extension=extended and bool(raw.extension),
    )
