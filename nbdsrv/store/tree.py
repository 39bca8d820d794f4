"""Somebody else's directory tree, read only: where other tools' repositories lie.

::

    entries("xo-vm-backups/b0a7")     names, sizes, times; not what lies below
    read(path, limit)                 a whole file
    read_range(path, offset, length)  a part of one
    open_file(path)                   a descriptor, where it is a file of this host

Unlike a ``Store`` it takes the names other tools use (``.chunks``, ``2026-01-01T00:00:00Z``), and
nothing is ever written: no lock, no access time where that can be had, so that read-only mounts
and immutable files are fine.

Rule: a path may come from inside a repository. It is checked here: no ``..``, nothing absolute,
and no symbolic link leads out of the root.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from nbdsrv.errors import CorruptImage
from nbdsrv.store.store import StoreError

__all__ = ["MAX_FILE", "Node", "Tree", "check_path", "joined", "readable_entries"]

MAX_FILE = 64 << 20
"""Bytes of a file that is read as a whole, at most, unless the caller says otherwise."""
MAX_PATH = 4096
"""Characters of a path."""
MAX_NAME = 255
LOST_AND_FOUND = "lost+found"
"""At the root of ext4 file systems; nobody but root may look into it, nor needs to."""


class Node(NamedTuple):
    """A file or directory.

    Attributes:
        name: the last part of its path.
        directory: is it one? Links are what they lead to.
        size: bytes; 0 for directories.
        modified: seconds since 1970 by the place's own clock; 0 where it keeps none.
    """

    name: str
    directory: bool
    size: int
    modified: float


class Tree(ABC):
    """A directory tree. Thread-safe; all methods block, so the event loop calls them in threads.

    Paths are relative, parts divided by ``/``; "" is the root.

    Attributes:
        name: for messages: a directory, or ``s3://bucket/prefix``.
        distant: does a call cost a network round trip?
    """

    name: str
    distant: bool = False

    @abstractmethod
    def entries(self, path: str = "") -> Sequence[Node]:
        """What a directory holds, by name; nothing if there is no such directory.

        Entries whose names nobody could ask for (not UTF-8, links that lead nowhere or out of the
        root) are left out.

        Raises:
            StoreError: it cannot be read.
        """

    @abstractmethod
    def find(self, path: str) -> Node | None:
        """The file or directory of that path; None if there is none.

        Raises:
            CorruptImage: the path leads out of the root.
            StoreError: that cannot be found out.
        """

    @abstractmethod
    def read(self, path: str, limit: int = MAX_FILE) -> bytes:
        """A whole file.

        Raises:
            ObjectMissing: there is none.
            StoreError: EFBIG if it is longer than ``limit``, before it is read; or unreadable.
            CorruptImage: the path leads out of the root.
        """

    @abstractmethod
    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly these bytes of a file; ``length`` is at least 1.

        Raises:
            ObjectMissing: there is none.
            StoreError: EIO if the file ends before that; or unreadable.
            CorruptImage: the path leads out of the root.
        """

    def open_file(self, path: str) -> int | None:
        """A read-only descriptor of a regular file, to be closed; None where it is no file here.

        ``ImageFile.from_descriptor(tree.full(path), fd)`` makes what formats read.

        Raises:
            ObjectMissing: there is none.
            StoreError: it cannot be opened.
            CorruptImage: the path leads out of the root.
        """
        del path
        return None

    def full(self, path: str) -> str:
        """For messages: root and path."""
        return f"{self.name}/{path}" if path else self.name

    def close(self) -> None:
        """Give descriptors and connections back; idempotent. Files that are open stay so."""


def readable_entries(tree: Tree, path: str, unread: list[str] | None) -> Sequence[Node]:
    """What one directory of many holds; nothing if it cannot be read, so that it hides no other.

    Args:
        tree: where it is.
        path: of the directory.
        unread: takes what is said of it; None: it is an error after all.

    Raises:
        StoreError: it cannot be read, and the tree is distant, so that others cannot either.
    """
    try:
        return tree.entries(path)
    except StoreError as error:
        if tree.distant or unread is None:
            raise
        if path.rpartition("/")[2] != LOST_AND_FOUND:
            unread.append(str(error))
        return ()


def check_path(name: str, path: str) -> None:
    """Refuse what is no path below a root.

    Args:
        name: the tree's, for the message.
        path: relative, or "".

    Raises:
        CorruptImage: the path leads out, or cannot be one.
    """
    if not path:
        return
    parts = path.split("/")
    bad = len(path) > MAX_PATH or "\0" in path
    if bad or any(part in {"", ".", ".."} or len(part) > MAX_NAME for part in parts):
        raise CorruptImage(f"corrupt repository: {name}: {path!r} is no path below it")


def joined(name: str, directory: str, relative: str) -> str:
    """What a relative path, as repositories hold them, leads to from ``directory``.

    ``./`` and ``../`` count, but must not climb above the root.

    Args:
        name: the tree's, for the message.
        directory: below the root, "" for it.
        relative: as it was found.

    Raises:
        CorruptImage: it is absolute or leads out.
    """
    parts = directory.split("/") if directory else []
    if relative.startswith("/") or "\0" in relative or len(relative) > MAX_PATH:
        raise CorruptImage(f"corrupt repository: {name}/{directory}: {relative!r} leads out of it")
    for part in relative.split("/"):
        if part in {"", "."}:
            continue
        if part != "..":
            parts.append(part)
            continue
        if not parts:
            text = f"corrupt repository: {name}/{directory}: {relative!r} leads out of it"
            raise CorruptImage(text)
        parts.pop()
    path = "/".join(parts)
    check_path(name, path)
    return path
