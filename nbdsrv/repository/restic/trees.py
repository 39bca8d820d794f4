"""The directories of a snapshot: which of its files may be disks, and what one is made of.

::

    snapshot ── tree blob ──┬── dir   ── tree blob ── ...        breadth first, within bounds
                            ├── file, at least 1 MiB   listed
                            └── file, smaller          only if it was asked for by its path

Trees are blobs: equal directories of two snapshots are one, and what was found in one is
remembered.
"""

import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import msgspec

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.pieces import ID_SIZE, MisfitError, Pieces
from nbdsrv.repository.restic.blobs import BlobStore
from nbdsrv.repository.restic.records import FileNode, TreeNode, content_ids, decoded, unquoted
from nbdsrv.repository.restic.sealed import Broken
from nbdsrv.store.store import ObjectMissing

__all__ = ["MIN_DISK", "Found", "ImageFileNode", "Trees", "is_outage"]

T = TypeVar("T")

MIN_DISK = 1 << 20
"""Bytes a file has at least to be listed as a disk."""
MAX_TREES = 4096
"""Directories of a snapshot that are looked at."""
MAX_DEPTH = 32
MAX_DISKS = 1000
"""Of a snapshot; as many as a restore point can have."""
ROW = 1 << 14
"""Equal pieces in a row that are looked at together."""
MAX_REMEMBERED = 1 << 16
"""Entries (directories and large files) of trees that are remembered."""


class ImageFileNode(NamedTuple):
    """A regular file."""

    name: str
    size: int
    modified: str


class _Tree(NamedTuple):
    files: tuple[ImageFileNode, ...]
    directories: tuple[tuple[str, str], ...]


class _Nodes(msgspec.Struct, frozen=True):
    nodes: list[TreeNode] | None = None


class _FullNodes(msgspec.Struct, frozen=True):
    nodes: list[FileNode] | None = None


@dataclass(slots=True)
class Found:
    """The disks of a snapshot.

    Attributes:
        files: by path, without a slash in front.
        complete: were all directories looked at?
        failure: why some of them cannot be read; "" if all can.
        outage: may that be otherwise the next time?
    """

    files: dict[str, ImageFileNode] = field(default_factory=dict)
    complete: bool = True
    failure: str = ""
    outage: bool = False


def is_outage(error: DiskError) -> bool:
    """Was something not to be read, which proves no damage?"""
    return not isinstance(error, CorruptImage | ObjectMissing)


class Trees:
    """The directories of a repository's snapshots. Thread-safe; everything here blocks."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._known: OrderedDict[str, _Tree] = OrderedDict()
        self._entries = 0
        self._lock = threading.Lock()

    def find(self, root: str, asked: Iterable[str] = ()) -> Found:
        """What may be a disk below a tree.

        Args:
            root: id of the tree.
            asked: paths that are listed whatever their size, if they are there.

        Raises:
            DiskError: the root itself cannot be read.
        """
        found = Found()
        waiting = deque([("", self._tree(root), 1)])
        looked = 1
        while waiting:
            path, tree, depth = waiting.popleft()
            for file in tree.files:
                if file.size < MIN_DISK:
                    continue
                if len(found.files) >= MAX_DISKS:
                    found.complete = False
                    break
                found.files.setdefault(path + file.name, file)
            for name, subtree in tree.directories:
                if looked >= MAX_TREES or depth >= MAX_DEPTH:
                    found.complete = False
                    break
                looked += 1
                try:
                    below = self._tree(subtree)
                except DiskError as error:
                    found.failure = found.failure or f"/{path}{name}: {error}"
                    found.outage = found.outage or is_outage(error)
                    continue
                waiting.append((f"{path}{name}/", below, depth + 1))
        for wanted in asked:
            if wanted not in found.files and (small := self._at(root, wanted)) is not None:
                found.files[wanted] = small
        return found

    def _at(self, root: str, path: str) -> ImageFileNode | None:
        """A file by its path, however small."""
        try:
            tree, name = self._directory(root, path)
        except DiskError:
            return None
        for node in self._nodes(tree):
            if node.type == "file" and unquoted(node.name) == name:
                return ImageFileNode(name, node.size, node.mtime)
        return None

    def _directory(self, root: str, path: str) -> tuple[str, str]:
        """The tree a path's last part is in, and that part."""
        *parents, name = path.split("/")
        tree = root
        for part in parents[:MAX_DEPTH]:
            below = dict(self._tree(tree).directories).get(part)
            if below is None:
                raise CorruptImage(f"{self._blobs.tree.name}: {path!r} is not in the snapshot")
            tree = below
        return tree, name

    def pieces(self, root: str, path: str) -> Pieces:
        """What a file of a snapshot is made of.

        Raises:
            CorruptImage: a tree is damaged, or there is no such file.
            StoreError: it cannot be read.
        """
        tree, name = self._directory(root, path)
        record = self._decoded(tree, _FullNodes)
        for node in record.nodes or ():
            if node.type == "file" and unquoted(node.name) == name:
                try:
                    content = content_ids(memoryview(node.content))
                    return Pieces(node.size, content, self._sizes(content))
                except (Broken, MisfitError) as error:
                    where = f"{self._blobs.tree.name}: tree {tree}: {path!r}"
                    raise CorruptImage(f"corrupt repository: {where}: {error}") from error
        raise CorruptImage(f"{self._blobs.tree.name}: {path!r} is not in the snapshot")

    def _sizes(self, content: bytes) -> "array[int]":
        sizes = array("q")
        at = 0
        while at < len(content):
            id_ = content[at : at + ID_SIZE]
            found = self._blobs.size(id_)
            row = array("q", [-1 if found is None else found])
            count = 1  # zeroes come in long rows
            while count < ROW and content.startswith(id_ * count, at + count * ID_SIZE):
                count *= 2
            sizes.extend(row * count)
            at += count * ID_SIZE
        return sizes

    def _tree(self, id_: str) -> _Tree:
        with self._lock:
            known = self._known.get(id_)
            if known is not None:
                self._known.move_to_end(id_)
                return known
        files: list[ImageFileNode] = []
        directories: list[tuple[str, str]] = []
        for node in self._nodes(id_):
            name = unquoted(node.name)
            if not name or "/" in name or "\0" in name:
                continue  # restic makes none
            if node.type == "file" and node.size >= MIN_DISK:
                files.append(ImageFileNode(name, node.size, node.mtime))
            elif node.type == "dir" and node.subtree is not None:
                directories.append((name, node.subtree))
        tree = _Tree(tuple(files), tuple(directories))
        with self._lock:
            if id_ not in self._known:
                self._known[id_] = tree
                self._entries += 1 + len(files) + len(directories)
                while self._entries > MAX_REMEMBERED and len(self._known) > 1:
                    _, old = self._known.popitem(last=False)
                    self._entries -= 1 + len(old.files) + len(old.directories)
        return tree

    def _nodes(self, id_: str) -> list[TreeNode]:
        return self._decoded(id_, _Nodes).nodes or []

    def _decoded(self, id_: str, type_: type[T]) -> T:
        data = self._blobs.blob(bytes.fromhex(id_))
        try:
            return decoded(data, type_)
        except Broken as error:
            text = f"corrupt repository: {self._blobs.tree.name}: tree {id_}: {error}"
            raise CorruptImage(text) from error
