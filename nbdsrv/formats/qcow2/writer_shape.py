"""What a new qcow2 image is to look like, and the header that says so.

::

    0        72          104            112
    | HEADER | FIELDS    | type, 7 * 0  | backing format | END | backing file name | 0 ... cluster
"""

from dataclasses import dataclass

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import ConfigError, UnsupportedImage
from nbdsrv.formats.qcow2.structs import (
    DEFAULT_REFCOUNT_ORDER,
    EXTENSION,
    HEADER,
    HEADER_FIELDS,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    SECTOR,
    V3_LENGTH,
    Compression,
    Crypt,
    ExtensionType,
    Incompatible,
)

__all__ = ["Backing", "Places", "Shape", "encode_header", "rounded"]

LEVELS = {Compression.ZLIB: range(1, 10), Compression.ZSTD: range(1, 20)}
"""Levels there are; zstd's above 19 need memory by the hundred megabytes, for each thread."""
DEFAULT_LEVELS = {Compression.ZLIB: 2, Compression.ZSTD: 2}
"""zlib: isal's best for its speed; zstd: as small as level 3, and faster."""
QEMU_FORMATS = {"vhd": "vpc"}
"""Formats QEMU calls by another name."""
_LENGTH = V3_LENGTH + 8


@dataclass(frozen=True, slots=True)
class Backing:
    """What gives the bytes a new image leaves out.

    Attributes:
        name: as it will stand in the header; relative to the new image's directory, or absolute.
        format: ours of it, "raw", "qcow2", "vhd" ...
        disk: its content, open; for clusters that are zeroed in part. Not closed.
    """

    name: str
    format: str
    disk: Disk


@dataclass(frozen=True, slots=True)
class Shape:
    """How to lay out a new image.

    Attributes:
        cluster_bits: clusters are ``1 << cluster_bits`` bytes.
        compression: of every cluster that shrinks by it, None for none.
        level: zlib 1 to 9, zstd 1 to 19, 0 for the one that suits.
        backing: None where what is left out is zeroes.
    """

    cluster_bits: int = 16
    compression: Compression | None = None
    level: int = 0
    backing: Backing | None = None

    def __post_init__(self) -> None:
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise ConfigError(f"qcow2 clusters of 2^{self.cluster_bits} bytes: 2^9 to 2^21 exist")
        if self.compression is not None and self.level:
            levels = LEVELS[self.compression]
            if self.level not in levels:
                name = self.compression.name.lower()
                text = f"{name} level {self.level}: choose {levels.start} to {levels.stop - 1}"
                raise ConfigError(text)

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def l2_bits(self) -> int:
        """An L2 table has ``1 << l2_bits`` entries."""
        return self.cluster_bits - 3

    def clusters(self, length: int) -> int:
        """Clusters that hold ``length`` bytes."""
        return -(-length >> self.cluster_bits)

    def l1_size(self, size: int, name: str) -> int:
        """L1 entries for a disk of ``size`` bytes; ``name`` of the image is for the error.

        Raises:
            UnsupportedImage: more than QEMU would read.
        """
        entries = max(-(-size >> (self.cluster_bits + self.l2_bits)), 1)
        if entries * 8 > MAX_L1_BYTES:
            most = MAX_L1_BYTES // 8 << (self.cluster_bits + self.l2_bits)
            raise UnsupportedImage(
                f"{name}: with clusters of {self.cluster_size} bytes a qcow2 image holds at most "
                f"{most} bytes, not {size}; use larger clusters"
            )
        return entries

    def check_refcounts(self, clusters: int, name: str) -> None:
        """A refcount table of so many clusters must not be larger than QEMU would read.

        Raises:
            UnsupportedImage: it is.
        """
        if clusters << self.cluster_bits > max(MAX_REFCOUNT_TABLE_BYTES, self.cluster_size):
            raise UnsupportedImage(
                f"{name}: too much data for clusters of {self.cluster_size} bytes; use larger ones"
            )


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tables of a new image lie, and the size of its disk."""

    size: int
    l1_size: int
    l1_position: int
    refcount_position: int
    refcount_clusters: int


def encode_header(shape: Shape, places: Places) -> bytes:
    """The first cluster.

    Raises:
        ConfigError: the backing file's name is too long for it.
    """
    name = shape.backing.name.encode(errors="surrogateescape") if shape.backing else b""
    extensions = _extensions(shape)
    name_at = _LENGTH + len(extensions) if name else 0
    if len(name) > MAX_BACKING_NAME or name_at + len(name) > shape.cluster_size:
        raise ConfigError(f"the backing file's name of {len(name)} bytes is too long for qcow2")
    fixed = HEADER.build(
        {
            "magic": MAGIC,
            "version": 3,
            "backing_file_offset": name_at,
            "backing_file_size": len(name),
            "cluster_bits": shape.cluster_bits,
            "size": places.size,
            "crypt_method": Crypt.NONE,
            "l1_size": places.l1_size,
            "l1_table_offset": places.l1_position,
            "refcount_table_offset": places.refcount_position,
            "refcount_table_clusters": places.refcount_clusters,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
        }
    )
    kind = shape.compression or Compression.ZLIB
    fields = HEADER_FIELDS.build(
        {
            "incompatible_features": Incompatible.COMPRESSION if kind else 0,
            "compatible_features": 0,
            "autoclear_features": 0,
            "refcount_order": DEFAULT_REFCOUNT_ORDER,
            "header_length": _LENGTH,
        }
    )
    head = fixed + fields + bytes([kind]) + bytes(7) + extensions + name
    return bytes(head.ljust(shape.cluster_size, b"\0"))


def _extensions(shape: Shape) -> bytes:
    found = b""
    if shape.backing and shape.backing.format:
        name = QEMU_FORMATS.get(shape.backing.format, shape.backing.format).encode()
        found = EXTENSION.build({"type": ExtensionType.BACKING_FORMAT, "length": len(name)})
        found += name.ljust(-(-len(name) // 8) * 8, b"\0")
    end: bytes = EXTENSION.build({"type": ExtensionType.END, "length": 0})
    return found + end


def rounded(size: int) -> int:
    """A disk of whole sectors: QEMU would cut off the rest."""
    return -(-size // SECTOR) * SECTOR
