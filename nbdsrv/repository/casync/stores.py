"""Chunk stores: where the chunks of an index are looked for.

::

    <store>/e8f7/e8f7ed89....cacnk     zstd, xz or gzip: its beginning says   casync, desync
    <store>/e8f7/e8f7ed89...           as it is                               desync, uncompressed

    NBDSRV_CASYNC_STORE=/a:/b          these and no others; or, beside an index ``d/vm1.caibx``:
    d/vm1.castr  d/default.castr  d/*.castr  then default.castr and *.castr at the root

A chunk that is broken in one store may be intact in the next.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.casync.index import chunk_id
from nbdsrv.repository.unpacking import BrokenPayload, unpack
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Tree

__all__ = ["STORE", "SUFFIX", "ChunkStores", "Place", "beside", "named_stores"]

STORE = "NBDSRV_CASYNC_STORE"
"""Chunk stores, divided by colons."""
SUFFIX = ".castr"
PACKED = ".cacnk"
MAX_STORES = 16
LARGE = 4 << 20
"""Bytes of a chunk; of larger ones only two are unpacked at a time."""


@dataclass(frozen=True, slots=True)
class Place:
    """A store: a tree, and a directory in it."""

    tree: Tree
    path: str

    @property
    def name(self) -> str:
        """For messages."""
        return self.tree.full(self.path)

    def file(self, id_: bytes, suffix: str) -> str:
        """Where a chunk would lie in the tree."""
        text = id_.hex()
        return "/".join(filter(None, (self.path, text[:4], text + suffix)))


def named_stores(environment: Mapping[str, str] = os.environ) -> Sequence[Place]:
    """The stores the environment names; each a tree of its own, to be closed. Blocking.

    Raises:
        StoreError: one of them is no directory.
    """
    found: list[Place] = []
    try:
        paths = [path for path in environment.get(STORE, "").split(":") if path]
        for path in paths[:MAX_STORES]:
            found.append(Place(DirectoryTree(path), ""))  # noqa: PERF401 - closed if one fails
    except StoreError:
        for place in found:
            place.tree.close()
        raise
    return found


def beside(tree: Tree, index: str) -> Sequence[Place]:
    """The stores that lie where casync puts them. Blocking.

    Args:
        tree: where the index lies.
        index: its path.

    Raises:
        StoreError: a directory cannot be read.
    """
    directory, _, name = index.rpartition("/")
    own = name.rpartition(".")[0] + SUFFIX
    found: list[Place] = []
    for where in dict.fromkeys((directory, "")):
        stores = [
            node.name
            for node in tree.entries(where)
            if node.directory and node.name.endswith(SUFFIX)
        ]
        stores.sort(key=lambda each: (each != own, each != f"default{SUFFIX}", each))
        found += [Place(tree, f"{where}/{each}" if where else each) for each in stores]
    return found[:MAX_STORES]


class ChunkStores:
    """The stores of an index, searched one after the other. Blocking; any thread."""

    def __init__(self, places: Sequence[Place], digest: str) -> None:
        """``digest``: what ids are made with: ``sha512-256`` or ``sha256``."""
        self.places = tuple(places)
        self._digest = digest
        self._large = threading.BoundedSemaphore(2)
        self._likely = [(place, suffix) for place in places for suffix in (PACKED, "")]

    def read(self, id_: bytes, length: int) -> tuple[bytes, int]:
        """Content of a chunk, proven, and the bytes that were read for it.

        Raises:
            CorruptImage: it is in no store, or broken in all that have it.
            StoreError: it cannot be read.
        """
        with self._large if length > LARGE else nullcontext():
            return self._read(id_, length)

    def _read(self, id_: bytes, length: int) -> tuple[bytes, int]:
        broken: DiskError | None = None
        for place, suffix in self._candidates():
            path = place.file(id_, suffix)
            try:
                raw = place.tree.read(path, limit=length + length // 8 + (1 << 12))
                data = self._proven(place.tree.full(path), raw, id_, length, suffix)
            except ObjectMissing:
                continue
            except DiskError as error:
                broken = broken or error
                continue
            self._prefer(place, suffix)
            return data, len(raw)
        raise broken or self._missing(id_)

    def find(self, id_: bytes) -> int:
        """Is it in one of them? Returns 0: nothing is read.

        Raises:
            CorruptImage: it is in none.
            StoreError: that cannot be found out.
        """
        for place, suffix in self._candidates():
            node = place.tree.find(place.file(id_, suffix))
            if node is not None and not node.directory and node.size:
                self._prefer(place, suffix)
                return 0
        raise self._missing(id_)

    def _candidates(self) -> Iterator[tuple[Place, str]]:
        """Where the last chunk was found comes first."""
        yield from self._likely

    def _prefer(self, place: Place, suffix: str) -> None:
        if self._likely[0] != (place, suffix):
            others = [each for each in self._likely if each != (place, suffix)]
            self._likely = [(place, suffix), *others]

    def _proven(self, where: str, raw: bytes, id_: bytes, length: int, suffix: str) -> bytes:
        data = raw
        if suffix:
            try:
                data = unpack(raw, length)
            except BrokenPayload as error:
                raise CorruptImage(f"corrupt repository: {where}: {error}") from error
        if len(data) != length:
            text = f"holds {len(data)} bytes, the index wants {length}"
            raise CorruptImage(f"corrupt repository: {where}: {text}")
        if chunk_id(self._digest, data) != id_:
            text = "its content does not have the id that is its name"
            raise CorruptImage(f"corrupt repository: {where}: {text}")
        return data

    def _missing(self, id_: bytes) -> CorruptImage:
        names = ", ".join(place.name for place in self.places) or "no store at all"
        return CorruptImage(f"corrupt repository: chunk {id_.hex()} is not in {names}")
