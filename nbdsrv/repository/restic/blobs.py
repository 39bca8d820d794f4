"""The blobs of a repository: found by the index, opened, proven.

::

    blob(id) ── Index ── places ── read ── MAC ── zstd ── SHA-256 == id ──> bytes
                  │         └── pack gone: somebody prunes; the index is read anew, once
                  └── not there: headers of packs that no index knows

Nothing is given out whose SHA-256 is not its id. A file of the index that is damaged, missing or
cannot be read costs time only: what it knew is found by the headers of the packs.

Rule: everything here blocks, in threads. Nothing is written, and restic's locks are not made: a
``prune`` meanwhile deletes packs only after it has stored what is still needed elsewhere.
"""

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.restic.index import (
    HEADER_LENGTH,
    MAX_HEADER,
    BlobPlace,
    Index,
    pack_header,
)
from nbdsrv.repository.restic.records import BlobEntry, IndexRecord, decoded
from nbdsrv.repository.restic.sealed import OVERHEAD, Broken, SealKey, expanded_to, plain_json
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Node, Tree, readable_entries

__all__ = ["BlobMissing", "BlobStore", "is_id", "pack_path"]

MAX_INDEX = 64 << 20
"""Bytes of a file of the index; restic begins another after some 8 MiB."""
MAX_INDEX_JSON = 256 << 20
MAX_FILES = 1 << 16
"""Files of an index, or packs whose headers are read because no index knows them."""

_ID = re.compile(r"[0-9a-f]{64}")


class BlobMissing(CorruptImage):
    """No index and no pack knows it."""


def is_id(name: str) -> bool:
    """Is it the name of a file that restic named by its hash?"""
    return _ID.fullmatch(name) is not None


def pack_path(name: str) -> str:
    """Where a pack stands."""
    return f"data/{name[:2]}/{name}"


class BlobStore:
    """Blobs by id. Thread-safe.

    Attributes:
        tree: where the repository lies.
        key: opens everything in it.
        damaged: files of the index that cannot be used, and why.
        unread: files of the index that could not be read, and why; they are tried again.
        unsearched: what could not be looked through for blobs that no index knows, and why.
        generation: changes whenever the index has.
    """

    def __init__(self, tree: Tree, key: SealKey) -> None:
        self.tree = tree
        self.key = key
        self.damaged: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        self.unsearched: list[str] = []
        self.generation = 0
        self._index = Index()
        self._files: frozenset[str] = frozenset()
        self._searched = False
        self._lock = threading.RLock()

    @property
    def index(self) -> Index:
        """As it was read last."""
        return self._index

    # --- the index -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what is new of the index; all of it if some has been taken away.

        Raises:
            StoreError: it cannot be listed.
            CorruptImage: it is larger than what is read of any repository.
        """
        with self._lock:
            names = frozenset(node.name for node in self._listed("index"))
            if self._files <= names and self.generation:
                new, unread = names - self._files, self.unread
                self.unread = self._load(self._index, new)
                if new == set(unread) == set(self.unread):
                    return
            else:
                index = Index()
                self.damaged = {}
                self.unread = self._load(index, names)
                self._index = index
            self._files = names - set(self.unread)
            self._searched = False
            self.generation += 1

    def _listed(self, directory: str) -> Sequence[Node]:
        nodes = [
            node for node in self.tree.entries(directory) if not node.directory and is_id(node.name)
        ]
        if len(nodes) > MAX_FILES:
            text = f"corrupt repository: {self.tree.full(directory)}: {len(nodes)} files"
            raise CorruptImage(f"{text}; at most {MAX_FILES} are read")
        return nodes

    def _load(self, index: Index, names: frozenset[str]) -> dict[str, str]:
        """Read files of the index; which of them cannot be read, and why."""
        unread: dict[str, str] = {}
        superseded: set[str] = set()
        # Names say nothing of order: who supersedes whom is known once all have been looked at. A
        # superseded file only repeats what its successor says, at the cost of memory.
        for name in sorted(names):
            if name in superseded:
                continue
            try:
                record = self._index_file(name)
                superseded.update(record.supersedes or ())
                for pack in record.packs or ():
                    index.add(pack.id, pack.blobs)
            except ObjectMissing:
                continue  # superseded and deleted meanwhile
            except (Broken, CorruptImage) as error:
                self.damaged[f"index/{name}"] = str(error)
            except StoreError as error:
                unread[name] = str(error)
        return unread

    def _index_file(self, name: str) -> IndexRecord:
        return decoded(self.document(f"index/{name}", MAX_INDEX, MAX_INDEX_JSON), IndexRecord)

    def document(self, path: str, limit: int, json_limit: int) -> bytes:
        """The JSON of a sealed file whose name is its hash.

        Raises:
            Broken: it is damaged.
            ObjectMissing, StoreError: it cannot be read.
        """
        sealed = self.tree.read(path, limit)
        if hashlib.sha256(sealed).hexdigest() != path.rpartition("/")[2]:
            raise Broken("its SHA-256 is not its name: it was changed")
        return plain_json(self.key.opened(sealed), json_limit)

    # --- packs ---------------------------------------------------------------------------------

    def pack_files(self, unread: list[str] | None = None) -> Iterator[Node]:
        """All packs there are.

        Args:
            unread: takes what is said of directories that cannot be listed; None: they are errors.

        Raises:
            StoreError: they cannot be listed.
        """
        for directory in self.tree.entries("data"):
            if not directory.directory:
                continue
            for node in readable_entries(self.tree, f"data/{directory.name}", unread):
                if not node.directory and is_id(node.name):
                    yield node

    def pack_blobs(self, node: Node) -> list[BlobEntry]:
        """What a pack itself says it holds.

        Raises:
            Broken: its header is damaged.
            StoreError: it cannot be read.
        """
        path, tail = pack_path(node.name), HEADER_LENGTH.size
        if node.size < tail + OVERHEAD:
            raise Broken(f"{node.size} bytes, too few for a pack")
        (length,) = HEADER_LENGTH.unpack(self.tree.read_range(path, node.size - tail, tail))
        end = node.size - tail - length
        if not OVERHEAD <= length <= MAX_HEADER or end < 0:
            raise Broken(f"a header of {length} bytes in a pack of {node.size}")
        return pack_header(self.key, self.tree.read_range(path, end, length), end)

    def _search(self) -> None:
        """Add what packs hold that no index knows. Once for each state of the index."""
        with self._lock:
            if self._searched:
                return
            self._searched = True
            self.unsearched = []
            looked = 0
            for node in self.pack_files(self.unsearched):
                if self._index.knows_pack(node.name):
                    continue
                looked += 1
                if looked > MAX_FILES:
                    break
                try:
                    self._index.add(node.name, self.pack_blobs(node))
                except (Broken, ObjectMissing):
                    continue  # it is missed where something in it is wanted
                except DiskError as error:
                    self.unsearched.append(str(error))

    # --- blobs ---------------------------------------------------------------------------------

    def size(self, id_: bytes) -> int | None:
        """Bytes of a blob; None if nobody knows it."""
        size = self._index.size(id_)
        if size is None:
            self._search()
            size = self._index.size(id_)
        return size

    def places(self, id_: bytes) -> list[BlobPlace]:
        """Everywhere it is said to lie; maybe nowhere."""
        found = self._index.places(id_)
        if not found:
            self._search()
            found = self._index.places(id_)
        return found

    @property
    def nowhere(self) -> str:
        """Said of a blob that was not found."""
        if not self.unsearched:
            return "is in no index and in no pack"
        more = f", and {len(self.unsearched) - 1} more" if len(self.unsearched) > 1 else ""
        return f"is in no index and no pack that can be read; not read: {self.unsearched[0]}{more}"

    def blob(self, id_: bytes) -> bytes:
        """A blob, proven.

        Raises:
            CorruptImage: it is damaged everywhere; ``BlobMissing``: it is nowhere.
            StoreError: its pack cannot be read.
        """
        try:
            return self._blob(id_)
        except ObjectMissing:
            before = self.generation
            self.refresh()
            if before == self.generation:
                raise
            return self._blob(id_)

    def _blob(self, id_: bytes) -> bytes:
        places = self.places(id_)
        if not places:
            text = f"corrupt repository: {self.tree.name}: blob {id_.hex()} {self.nowhere}"
            raise BlobMissing(f"{text}; was it pruned meanwhile? `restic check` tells")
        failure: DiskError | None = None
        for place in places:
            try:
                return self.at(id_, place)
            except DiskError as error:
                failure = error if failure is None or isinstance(error, CorruptImage) else failure
        assert failure is not None
        if isinstance(failure, ObjectMissing):
            text = f"{failure}; was it pruned meanwhile? `restic check` tells"
            raise ObjectMissing(text, failure.errno) from failure
        raise failure

    def at(self, id_: bytes, place: BlobPlace) -> bytes:
        """A blob from one of its places, proven.

        Raises:
            CorruptImage: it is damaged there.
            StoreError: the pack cannot be read.
        """
        path = pack_path(place.pack)
        sealed = self.tree.read_range(path, place.offset, place.length)
        try:
            return proven(self.key, id_, sealed, place)
        except Broken as error:
            where = f"{self.tree.full(path)} at {place.offset}"
            raise CorruptImage(f"corrupt repository: {where}: blob {id_.hex()}: {error}") from error


def proven(key: SealKey, id_: bytes, sealed: bytes, place: BlobPlace) -> bytes:
    """The blob in these bytes of a pack.

    Raises:
        Broken: it is not the one of that id.
    """
    data = key.opened(sealed)
    if place.compressed:
        data = expanded_to(data, place.size)
    if hashlib.sha256(data).digest() != id_:
        raise Broken("its SHA-256 is not its id")
    return data
