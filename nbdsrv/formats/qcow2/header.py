"""The header of a qcow2 image: read, bounded, and turned into types.

::

    0        72          104     header_length            backing_file_offset     cluster end
    | HEADER | FIELDS    | type  | extension | extension | END | backing file name |
      v2, v3   v3 only     v3      8 + length, padded to 8

Rule: nothing here is believed before it is bounded. After ``read_header`` the L1 table, the
refcount table and the snapshot table lie within the file and are aligned, and the L1 table
is large enough for the disk.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.structs import (
    DEFAULT_REFCOUNT_ORDER,
    EXTENSION,
    FEATURE_NAME,
    HEADER,
    HEADER_FIELDS,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    V2_LENGTH,
    V3_LENGTH,
    Autoclear,
    Compatible,
    Compression,
    Crypt,
    ExtensionType,
    Incompatible,
)
from protocol.terms import MAX_SIZE

__all__ = ["Extension", "Header", "read_header"]

MAX_EXTENSIONS = 64
"""Header extensions; QEMU writes at most five."""
NO_FEATURES = Incompatible(0)


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension, as it is.

    Attributes:
        position: of its data in the file.
    """

    type: int
    position: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What the first cluster says. Field names are the specification's where it has them.

    Attributes:
        size: of the disk, bytes.
        l1_size: entries.
        header_length: bytes; where the extensions begin.
        incompatible_features: known ones only, or the image would have been refused.
        compatible_features: as they are, unknown ones included.
        autoclear_features: likewise.
        extensions: by type; END is not among them.
        backing_file: name as it stands in the file, "" if there is none.
        backing_format: QEMU's name of its format, "" if it does not say.
        data_file: name of the external data file, "" if it does not say.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    header_length: int = V2_LENGTH
    incompatible_features: Incompatible = NO_FEATURES
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = DEFAULT_REFCOUNT_ORDER
    compression_type: Compression = Compression.ZLIB
    extensions: Mapping[int, Extension] = field(default_factory=dict)
    backing_file: str = ""
    backing_format: str = ""
    data_file: str = ""

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        """Are L2 entries two words, the second about subclusters?"""
        return Incompatible.EXTENDED_L2 in self.incompatible_features

    @property
    def entry_size(self) -> int:
        """Of an L2 entry, bytes."""
        return 16 if self.extended else 8

    @property
    def l2_bits(self) -> int:
        """An L2 table has ``1 << l2_bits`` entries."""
        return self.cluster_bits - (4 if self.extended else 3)

    @property
    def has_data_file(self) -> bool:
        """Does guest data lie in a file of its own?"""
        return Incompatible.DATA_FILE in self.incompatible_features

    @property
    def lazy_refcounts(self) -> bool:
        """May refcounts be out of date while the dirty bit is set?"""
        return bool(self.compatible_features & Compatible.LAZY_REFCOUNTS)

    def has_autoclear(self, feature: Autoclear) -> bool:
        """Is this autoclear feature set?"""
        return bool(self.autoclear_features & feature)

    def l1_entries_for(self, size: int) -> int:
        """L1 entries a disk of ``size`` bytes needs."""
        return -(-size >> (self.cluster_bits + self.l2_bits))

    def is_aligned(self, position: int) -> bool:
        """Does a cluster begin there?"""
        return not position & (self.cluster_size - 1)

    def check_l1(self, file: ImageFile, position: int, entries: int, size: int, at: int) -> None:
        """An L1 table, told of at ``at``, must lie within the file and suffice for ``size``.

        Raises:
            CorruptImage: it does not.
        """
        if entries * 8 > MAX_L1_BYTES:
            raise file.corrupt(at, f"an L1 table of {entries} entries")
        if entries < self.l1_entries_for(size):
            raise file.corrupt(at, f"an L1 table of {entries} entries is too small for {size}")
        check_table(file, self, "the L1 table", position, entries * 8, at)


def read_header(file: ImageFile) -> Header:
    """Read and check everything the first cluster says. Blocking.

    Raises:
        CorruptImage: it contradicts itself or the file.
        UnsupportedImage: encrypted, or a feature we do not know.
    """
    raw = HEADER.parse(_magic_checked(file))
    if raw.version not in {2, 3}:
        raise UnsupportedImage(f"{file.path}: qcow2 version {raw.version} is not served")
    _check_cluster_bits(file, raw.cluster_bits)
    cluster = file.read_up_to(0, 1 << raw.cluster_bits)
    fields = _version_3_fields(file, cluster) if raw.version == 3 else {}
    length = fields.get("header_length", V2_LENGTH)
    name_at = raw.backing_file_offset
    name = _backing_name(file, cluster, name_at, raw.backing_file_size, length)
    found = _extensions(file, cluster, length, name_at or len(cluster))
    extensions = {extension.type: extension for extension in found}
    _check_features(file, fields.get("incompatible_features", 0), extensions)
    _check_crypt(file, raw.crypt_method)
    header = Header(
        version=raw.version,
        cluster_bits=raw.cluster_bits,
        size=raw.size,
        l1_size=raw.l1_size,
        l1_table_offset=raw.l1_table_offset,
        refcount_table_offset=raw.refcount_table_offset,
        refcount_table_clusters=raw.refcount_table_clusters,
        nb_snapshots=raw.nb_snapshots,
        snapshots_offset=raw.snapshots_offset,
        header_length=length,
        incompatible_features=Incompatible(fields.get("incompatible_features", 0)),
        compatible_features=fields.get("compatible_features", 0),
        autoclear_features=fields.get("autoclear_features", 0),
        refcount_order=fields.get("refcount_order", DEFAULT_REFCOUNT_ORDER),
        compression_type=_compression(file, cluster, fields),
        extensions=extensions,
        backing_file=name,
        backing_format=_text(extensions, ExtensionType.BACKING_FORMAT),
        data_file=_text(extensions, ExtensionType.DATA_FILE),
    )
    _check(file, header)
    return header


def _magic_checked(file: ImageFile) -> bytes:
    start = file.read(0, V2_LENGTH, "the header")
    if start[:4] != MAGIC:
        raise file.corrupt(0, f"no qcow2 header, it begins with {start[:4]!r}")
    return start


def _check_cluster_bits(file: ImageFile, bits: int) -> None:
    if bits < MIN_CLUSTER_BITS:
        raise file.corrupt(20, f"clusters of 2^{bits} bytes; 2^{MIN_CLUSTER_BITS} is the least")
    if bits > MAX_CLUSTER_BITS:
        raise UnsupportedImage(f"{file.path}: clusters of 2^{bits} bytes; 2 MiB is the most")


def _version_3_fields(file: ImageFile, cluster: bytes) -> dict[str, int]:
    if len(cluster) < V3_LENGTH:
        raise file.corrupt(len(cluster), "the file ends within the header")
    fields = HEADER_FIELDS.parse(cluster[V2_LENGTH:V3_LENGTH])
    length = fields.header_length
    if not V3_LENGTH <= length <= len(cluster) or length % 8:
        raise file.corrupt(100, f"a header of {length} bytes")
    if fields.refcount_order > MAX_REFCOUNT_ORDER:
        raise file.corrupt(96, f"refcounts of 2^{fields.refcount_order} bits")
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def _backing_name(file: ImageFile, cluster: bytes, start: int, length: int, least: int) -> str:
    if not start:
        return ""
    if length > MAX_BACKING_NAME or start < least or start + length > len(cluster):
        raise file.corrupt(8, f"a backing file name of {length} bytes at {start}")
    return os.fsdecode(cluster[start : start + length])


def _extensions(file: ImageFile, cluster: bytes, start: int, end: int) -> Iterator[Extension]:
    at = start
    seen: set[int] = set()
    while at + EXTENSION.sizeof() <= end:
        head = EXTENSION.parse(cluster[at : at + EXTENSION.sizeof()])
        if head.type == ExtensionType.END:
            return
        position = at + EXTENSION.sizeof()
        if head.length > end - position:
            raise file.corrupt(at, f"a header extension of {head.length} bytes")
        if head.type in seen or len(seen) >= MAX_EXTENSIONS:
            raise file.corrupt(at, f"header extension {head.type:#x} appears twice")
        seen.add(head.type)
        yield Extension(head.type, position, cluster[position : position + head.length])
        at = position + (head.length + 7 & ~7)


def _text(extensions: Mapping[int, Extension], kind: ExtensionType) -> str:
    found = extensions.get(kind)
    return os.fsdecode(found.data) if found else ""


def _check_features(file: ImageFile, bits: int, extensions: Mapping[int, Extension]) -> None:
    unknown = bits & ~sum(Incompatible)
    if not unknown:
        return
    table = extensions.get(ExtensionType.FEATURE_NAMES)
    names = _feature_names(table.data if table else b"")
    missing = [
        f"{names.get(bit, 'unnamed')} (bit {bit})" for bit in range(64) if unknown & 1 << bit
    ]
    raise UnsupportedImage(f"{file.path}: needs features we do not know: {', '.join(missing)}")


def _feature_names(table: bytes) -> dict[int, str]:
    """Names of incompatible features by bit."""
    size = FEATURE_NAME.sizeof()
    names = {}
    for at in range(0, len(table) - size + 1, size):
        entry = FEATURE_NAME.parse(table[at : at + size])
        if entry.type == 0:
            name = entry.name.partition(b"\0")[0].decode("ascii", "backslashreplace")
            names[entry.bit] = name if name.isprintable() else repr(name)
    return names


def _check_crypt(file: ImageFile, method: int) -> None:
    if method == Crypt.NONE:
        return
    if method > max(Crypt):
        raise file.corrupt(32, f"encryption method {method}")
    raise UnsupportedImage(
        f"{file.path}: encrypted ({Crypt(method).name}); decrypt it with qemu-img convert first"
    )


def _compression(file: ImageFile, cluster: bytes, fields: Mapping[str, int]) -> Compression:
    length = fields.get("header_length", 0)
    kind = cluster[V3_LENGTH] if length > V3_LENGTH else 0
    flagged = bool(fields.get("incompatible_features", 0) & Incompatible.COMPRESSION)
    if flagged != bool(kind):
        raise file.corrupt(V3_LENGTH, f"compression type {kind} contradicts the feature bit")
    if kind > max(Compression):
        raise UnsupportedImage(f"{file.path}: compression type {kind} is not known")
    return Compression(kind)


def _check(file: ImageFile, header: Header) -> None:
    if header.size > MAX_SIZE:
        raise file.corrupt(24, f"a disk of {header.size} bytes")
    if header.extended and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise file.corrupt(20, f"subclusters in clusters of 2^{header.cluster_bits} bytes")
    header.check_l1(file, header.l1_table_offset, header.l1_size, header.size, 36)
    refcounts = header.refcount_table_clusters << header.cluster_bits
    if not 0 < refcounts <= max(MAX_REFCOUNT_TABLE_BYTES, header.cluster_size):
        raise file.corrupt(56, f"a refcount table of {header.refcount_table_clusters} clusters")
    check_table(file, header, "the refcount table", header.refcount_table_offset, refcounts, 48)
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise file.corrupt(60, f"{header.nb_snapshots} snapshots")
    if header.nb_snapshots:
        least = header.nb_snapshots * 40
        check_table(file, header, "the snapshot table", header.snapshots_offset, least, 64)
    raw = header.has_autoclear(Autoclear.DATA_FILE_RAW)
    if raw and (not header.has_data_file or header.backing_file):
        raise file.corrupt(88, "a raw external data file where there can be none")
    if header.has_data_file and header.nb_snapshots:
        raise file.corrupt(60, "internal snapshots beside an external data file")


def check_table(
    file: ImageFile, header: Header, what: str, position: int, length: int, at: int
) -> None:
    """A table, told of at ``at``, begins with a cluster other than the first, within the file.

    Raises:
        CorruptImage: it does not.
    """
    if not header.is_aligned(position) or (length and position < header.cluster_size):
        raise file.corrupt(at, f"{what} at {position}")
    if position + length > file.size:
        raise file.corrupt(at, f"{what} at {position} reaches beyond the end of the file")
