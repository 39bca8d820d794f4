"""The chunks of a datastore: one file each, named by the digest of its content.

::

    .chunks/bb9f/bb9f8df6...            read as a whole, CRC checked, opened, and hashed to its name
    .chunks/bb9f/bb9f8df6....0.bad      what the server's own verification has put aside

A chunk is proven before any of it is served: its name is the SHA-256 of the content, or of content
and key. Hashing 4 MiB takes longer than all else together, so it is done once for a file: as long
as that is the same (inode, size, times of modification and change), what has been proven is its
content still, unless the medium has changed it. That is what the CRC over all that is stored is
for, and, where it is encrypted, GCM's tag: these are checked at every read.
"""

import errno as os_errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.pbs.blob import check_blob, open_blob
from nbdsrv.repository.pbs.keys import CryptKey
from nbdsrv.repository.pbs.layout import CHUNKS
from nbdsrv.repository.pbs.structs import ENCRYPTED_HEADER
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Tree

__all__ = ["Chunks", "chunk_path", "zero_digest"]

AT_ONCE = 4
"""Chunks being opened at a time; each takes two or three times its size for that."""
MAX_BAD = 10
"""Broken copies of one chunk the server keeps."""
MAX_PROVEN = 1 << 16
"""Files remembered to be proven: 256 GiB of chunks, some 20 MiB of memory."""
SETTLED_NS = 2_000_000_000
"""Age of a change after which the next one is sure to have another time."""

_State = tuple[int, int, int, int, int]
"""Device, inode, size, times of modification and change: another one, and it is another file."""


def chunk_path(digest: bytes) -> str:
    """Where a chunk lies."""
    text = digest.hex()
    return f"{CHUNKS}/{text[:4]}/{text}"


@lru_cache(maxsize=256)
def zero_digest(length: int, key: CryptKey | None = None) -> bytes:
    """The digest of so many zeroes: some 10 ms for 4 MiB, once."""
    zeroes = bytes(length)
    return hashlib.sha256(zeroes).digest() if key is None else key.digest(zeroes)


class Chunks:
    """Chunks of a datastore. Its methods block; any thread may call them."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._buffers: list[bytearray] = []
        self._proven: dict[bytes, _State] = {}
        self._remembering = threading.Lock()

    def read(self, digest: bytes, length: int, key: CryptKey | None) -> bytes:
        """Content of a chunk, proven.

        Args:
            digest: names it.
            length: bytes it must have.
            key: of encrypted ones; None for plain ones.

        Raises:
            CorruptImage: it is missing, broken, or not what its name says.
            StoreError: it cannot be read.
        """
        return self._opened(digest, length, key, anew=False)[0]

    def prove(self, digest: bytes, length: int, key: CryptKey | None) -> int:
        """Read it for the proof alone, whatever is known of it; returns the bytes read for that.

        Raises:
            CorruptImage, StoreError: as ``read``.
        """
        return self._opened(digest, length, key, anew=True)[1]

    def _opened(
        self, digest: bytes, length: int, key: CryptKey | None, *, anew: bool
    ) -> tuple[bytes, int]:
        """Content, and bytes stored."""
        where = self._tree.full(chunk_path(digest))
        with self._turns:
            with self._stored(digest, length) as (raw, state):
                stored = len(raw)
                data = open_blob(where, raw, length, key, sealed=key is not None)
            if anew or state is None or self._proven.get(digest) != state:
                found = hashlib.sha256(data).digest() if key is None else key.digest(data)
                if found != digest:
                    raise _corrupt(where, "its content does not have the digest that is its name")
                self._remember(digest, state)
        if len(data) != length:
            raise _corrupt(where, f"holds {len(data)} bytes, the index wants {length}")
        return data, stored

    def _remember(self, digest: bytes, state: _State | None) -> None:
        if state is None or time.time_ns() - state[-1] < SETTLED_NS:
            return
        proven = self._proven
        with self._remembering:
            proven[digest] = state
            if len(proven) > MAX_PROVEN:
                del proven[next(iter(proven))]

    def check(self, digest: bytes, length: int) -> int:
        """Check what is stored without opening it: its CRC. Returns the bytes read.

        Raises:
            CorruptImage, StoreError: as ``read``.
        """
        with self._turns, self._stored(digest, length) as (raw, _):
            check_blob(self._tree.full(chunk_path(digest)), raw)
            return len(raw)

    def find(self, digest: bytes) -> int:
        """Is it there? Returns 0: nothing is read.

        Raises:
            CorruptImage: it is not, or no bytes are in it.
            StoreError: that cannot be found out.
        """
        node = self._tree.find(chunk_path(digest))
        if node is None or node.directory:
            raise self._missing(digest)
        if not node.size:
            raise _corrupt(self._tree.full(chunk_path(digest)), "is empty")
        return 0

    @contextmanager
    def _stored(
        self, digest: bytes, length: int
    ) -> Iterator[tuple[bytes | memoryview, _State | None]]:
        """As it lies there, at most what ``length`` bytes may take, and the state of its file.

        Raises:
            CorruptImage: it is missing.
            StoreError: it cannot be read, or is much too long.
        """
        path = chunk_path(digest)
        limit = length + length // 8 + ENCRYPTED_HEADER.size + (1 << 12)
        try:
            fd = self._tree.open_file(path)
            if fd is None:
                yield self._tree.read(path, limit), None
                return
        except ObjectMissing as error:
            raise self._missing(digest) from error
        # Megabytes that are allocated for each chunk anew would cost twice the memory.
        buffer = self._buffers.pop() if self._buffers else bytearray()
        if len(buffer) < limit:
            buffer = bytearray(limit)
        try:
            yield self._filled(path, fd, limit, buffer)
        finally:
            os.close(fd)
            self._buffers.append(buffer)

    def _filled(
        self, path: str, fd: int, limit: int, buffer: bytearray
    ) -> tuple[memoryview, _State]:
        where = self._tree.full(path)
        try:
            info = os.fstat(fd)
            size = info.st_size
            if size > limit:
                raise StoreError(f"{where}: {size} bytes, more than {limit}", os_errno.EFBIG)
            done = 0
            view = memoryview(buffer)[:size]
            while done < size:
                count = os.preadv(fd, [view[done:]], done)
                if not count:
                    raise StoreError(f"{where}: ends at {done}, was it truncated?")
                done += count
        except OSError as error:
            number = error.errno or os_errno.EIO
            raise StoreError(f"{where}: {os.strerror(number)}", number) from error
        # As it was before it was read: a change meanwhile makes the next state another one.
        return view, (info.st_dev, info.st_ino, size, info.st_mtime_ns, info.st_ctime_ns)

    def _missing(self, digest: bytes) -> CorruptImage:
        path = chunk_path(digest)
        where = self._tree.full(path)
        for number in range(MAX_BAD):
            if self._tree.find(f"{path}.{number}.bad") is not None:
                what = f"the server found it broken and put it aside as .{number}.bad"
                return _corrupt(where, f"{what}; the next backup stores it anew")
        return _corrupt(where, "is missing")


def _corrupt(where: str, what: str) -> CorruptImage:
    return CorruptImage(f"corrupt repository: {where}: {what}")
