"""A fixed index: the digest of each chunk of a disk, read where it lies.

::

    fidx   | header, 4096 | digest | digest | digest | ...      32 bytes for each ``chunk_size``
                            '------ index_csum: SHA-256 -------'

A disk of 1 TiB has 8 MiB of digests. They are hashed once at opening (5 to 15 ms), for a digest
that was changed into that of another chunk would be wrong content nobody notices; after that a page
of them at a time is read.
"""

import hashlib
from collections.abc import Iterator

from construct import ConstructError

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.repository.pbs.structs import DIGEST, INDEX_HEADER, FixedIndexHeader
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Tree

__all__ = ["FixedIndex", "open_index", "others_than"]

MIN_CHUNK, MAX_CHUNK = 64 << 10, 4 << 20
"""Bytes, by the format; powers of two."""
STEP = 1 << 20
"""Bytes of digests hashed at a time."""
AT_ONCE = 128
"""Digests compared at a time: most of a sparse disk's are those of zeroes."""


class FixedIndex:
    """An open index. Its methods block; any thread may call them.

    Attributes:
        path: for messages.
        size: of the disk, bytes.
        chunk_size: bytes.
        count: chunks.
        csum: of the digests.
        created: seconds since 1970.
    """

    __slots__ = (
        "_file",
        "_path",
        "_tree",
        "chunk_size",
        "count",
        "created",
        "csum",
        "path",
        "size",
    )

    def __init__(self, tree: Tree, path: str, size: int) -> None:
        """Use ``open_index``. ``size``: of the file."""
        self.path = tree.full(path)
        self._tree = tree
        self._path = path
        fd = tree.open_file(path)
        self._file = ImageFile.from_descriptor(self.path, fd) if fd is not None else None
        try:
            self._read_header(self._file.size if self._file else size)
        except BaseException:
            self.close()
            raise

    def _read_header(self, length: int) -> None:
        if length < INDEX_HEADER:
            raise self.corrupt(0, f"{length} bytes are no index, was it cut short?")
        try:
            header = FixedIndexHeader.parse(self._read(0, FixedIndexHeader.sizeof()))
        except ConstructError as error:
            raise self.corrupt(0, "no fixed index") from error
        self.size: int = header.size
        self.chunk_size: int = header.chunk_size
        self.csum: bytes = header.index_csum
        self.created: int = header.ctime
        chunk = self.chunk_size
        if not MIN_CHUNK <= chunk <= MAX_CHUNK or chunk & (chunk - 1):
            raise self.corrupt(72, f"chunks of {chunk} bytes")
        self.count = -(-self.size // chunk)
        wanted = INDEX_HEADER + DIGEST * self.count
        if length != wanted:
            what = f"{length} bytes, but a disk of {self.size} takes {wanted}; was it cut short?"
            raise self.corrupt(64, what)

    def digests(self, first: int, count: int) -> bytes:
        """Those of consecutive chunks, 32 bytes each.

        Raises:
            DiskError: they cannot be read.
        """
        return self._read(INDEX_HEADER + DIGEST * first, DIGEST * count) if count else b""

    def _read(self, position: int, length: int) -> bytes:
        if self._file is not None:
            return self._file.read(position, length, "the index")
        return self._tree.read_range(self._path, position, length)

    def prove(self) -> None:
        """Hash all digests.

        Raises:
            CorruptImage: they are not what was written.
        """
        found = hashlib.sha256()
        step = STEP // DIGEST
        for first in range(0, self.count, step):
            found.update(self.digests(first, min(step, self.count - first)))
        if found.digest() != self.csum:
            raise self.corrupt(INDEX_HEADER, "the digests do not have the checksum of the header")

    def length(self, number: int) -> int:
        """Bytes of the disk in a chunk: the last one may be shorter."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def corrupt(self, position: int, what: str) -> CorruptImage:
        """The error to raise."""
        return CorruptImage(f"corrupt repository: {self.path} at {position}: {what}")

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()


def others_than(zero: bytes, digests: bytes) -> Iterator[int]:
    """The numbers of all digests but those that are ``zero``."""
    zeroes = zero * AT_ONCE
    step = AT_ONCE * DIGEST
    for begin in range(0, len(digests), step):
        if digests.startswith(zeroes, begin):
            continue
        for at in range(begin, min(begin + step, len(digests)), DIGEST):
            if not digests.startswith(zero, at):
                yield at // DIGEST


def open_index(
    tree: Tree, path: str, *, size: int | None = None, csum: bytes | None = None
) -> FixedIndex:
    """Open an index, prove it, and compare it with what the manifest says of it. Blocking.

    Args:
        tree: the datastore.
        path: of the index in it.
        size: of the disk, as the manifest has it.
        csum: likewise.

    Raises:
        CorruptImage: it is missing, broken, or another one.
        StoreError: it cannot be read.
    """
    length = 0
    if tree.distant:
        node = tree.find(path)
        length = node.size if node is not None else 0
    try:
        index = FixedIndex(tree, path, length)
    except ObjectMissing as error:
        raise CorruptImage(f"corrupt repository: {tree.full(path)}: is missing") from error
    try:
        if size is not None and index.size != size:
            raise index.corrupt(64, f"a disk of {index.size} bytes, the manifest says {size}")
        if csum is not None and index.csum != csum:
            raise index.corrupt(32, "not the index whose checksum the manifest has")
        index.prove()
    except BaseException:
        index.close()
        raise
    return index
