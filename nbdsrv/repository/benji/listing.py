"""Which versions a storage has.

::

    versions/ab/cd/UID        UID may itself hold slashes: it begins with the volume's name
    versions/ab/cd/UID.meta   both must be there; ab cd is the MD5 of UID

A head is read once and remembered by name, size and time; listing anew costs a look into the
directories.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbdsrv.errors import ConfigError, DiskError, NbdsrvError, RepositoryError
from nbdsrv.repository.benji.objects import META, Objects
from nbdsrv.repository.benji.versions import Head, read_head, version_path
from nbdsrv.store.tree import Node, readable_entries

__all__ = ["Listing", "Version"]

log = logging.getLogger(__name__)

ROOT = "versions"
MAX_DEPTH = 16
"""Parts of a version's uid."""
MAX_VERSIONS = 200_000
LONG_S = 0.02
"""A listing that took longer holds for twice as long: finding what a selector means takes many."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version object.

    Attributes:
        uid: its name.
        path: of the object.
        node: name, size and time of the file.
        head: None where it cannot be read.
        reason: why not, or "".
    """

    uid: str
    path: str
    node: Node
    head: Head | None
    reason: str = ""


class Listing:
    """Blocking; any thread may call it, one at a time."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._known: dict[str, Version] = {}
        self._versions: Sequence[Version] = ()
        self._good_until = 0.0
        self.unread: Sequence[str] = ()
        """What is said of directories of versions that could not be looked into."""

    def versions(self) -> Sequence[Version]:
        """All of them, by uid. One that is broken has no head.

        Raises:
            StoreError: the storage cannot be read.
            RepositoryError: there are too many; or none can be read, for the key is wrong.
            ConfigError: none can be read, for a key is needed and there is none.
        """
        with self._lock:
            if time.monotonic() < self._good_until:
                return self._versions
            began = time.monotonic()
            found: dict[str, Version] = {}
            refused: NbdsrvError | None = None
            for uid, path, node in self._walk():
                known = self._known.get(path)
                if known is None or known.node != node or known.head is None:
                    try:
                        known = Version(uid, path, node, read_head(self._objects, path, uid))
                    except (RepositoryError, ConfigError) as error:
                        refused = refused or error
                        known = Version(uid, path, node, None, str(error))
                    except DiskError as error:
                        known = Version(uid, path, node, None, str(error))
                found[path] = known
                if len(found) > MAX_VERSIONS:
                    text = f"more than {MAX_VERSIONS} versions"
                    raise RepositoryError(f"{self._objects.tree.name}: {text}")
            self._check_key(list(found.values()), refused)
            self._known = found
            self._versions = sorted(found.values(), key=lambda version: version.uid)
            took = time.monotonic() - began
            if took > LONG_S:
                self._good_until = began + 3 * took
            return self._versions

    def _check_key(self, versions: Sequence[Version], refused: NbdsrvError | None) -> None:
        """One that cannot be read is broken; if none can, it is the key."""
        if any(version.head is not None for version in versions):
            return
        if refused is not None:
            raise refused
        if versions and self._objects.encrypted:
            text = f"no version can be read, is the key the right one? {versions[0].reason}"
            raise RepositoryError(f"{self._objects.tree.name}: {text}")

    def _walk(self) -> Iterator[tuple[str, str, Node]]:
        unread: list[str] = []
        for first in self._objects.tree.entries(ROOT):
            if not first.directory or len(first.name) != 2:
                continue
            for second in readable_entries(self._objects.tree, f"{ROOT}/{first.name}", unread):
                if second.directory and len(second.name) == 2:
                    yield from self._below(f"{ROOT}/{first.name}/{second.name}", "", 0, unread)
        for text in unread:
            if text not in self.unread:
                log.warning("benji.unreadable reason=%s", text)
        self.unread = unread

    def _below(
        self, root: str, prefix: str, depth: int, unread: list[str]
    ) -> Iterator[tuple[str, str, Node]]:
        path = f"{root}/{prefix}".rstrip("/")
        for node in readable_entries(self._objects.tree, path, unread):
            uid = f"{prefix}{node.name}"
            if node.directory:
                if depth < MAX_DEPTH:
                    yield from self._below(root, f"{uid}/", depth + 1, unread)
            elif not uid.endswith(META) and version_path(uid) == f"{root}/{uid}":
                yield uid, f"{root}/{uid}", node
