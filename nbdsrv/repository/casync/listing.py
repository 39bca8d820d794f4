"""Which indexes there are: head and tail of each are read once, and again when it has changed.

::

    directory ──> *.caibx, and those one directory below (stores excepted) ──> Entry ──> Point
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nbdsrv.errors import DiskError
from nbdsrv.repository.casync.index import BlobIndex
from nbdsrv.repository.casync.names import SUFFIX, Name, name_of
from nbdsrv.repository.casync.stores import SUFFIX as STORE_SUFFIX
from nbdsrv.repository.repository import DiskFacts, Point
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Node, Tree, readable_entries

__all__ = ["Entry", "Listing", "Row"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One index.

    Attributes:
        path: in the tree.
        length: of the file, bytes.
        modified: seconds since 1970.
        name: what it is called.
        facts: None if it is broken.
        reason: why it is.
    """

    path: str
    length: int
    modified: float
    name: Name
    facts: DiskFacts | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A point.

    Attributes:
        point: as it is shown.
        entries: by the names of its disks; those that are broken too.
    """

    point: Point
    entries: Mapping[str, Entry]


class Listing:
    """Indexes in a directory. Its methods block; any thread may call them."""

    def __init__(self, tree: Tree, only: str | None = None) -> None:
        """``only``: the one file it is about."""
        self._tree = tree
        self._only = only
        self._root = os.path.basename(os.path.abspath(tree.name))
        self._known: dict[str, Entry] = {}
        self.unread: Sequence[str] = ()
        """What is said of directories that could not be looked into."""

    def rows(self, group: str | None = None) -> Sequence[Row]:
        """All points, or those of a group; by group, then from old to new.

        Raises:
            StoreError: a directory cannot be read.
        """
        now: dict[str, Entry] = {}
        for path, node in self._files():
            known = self._known.get(path)
            same = known is not None and (known.length, known.modified) == (
                node.size,
                node.modified,
            )
            if known is not None and same and known.facts is not None:
                now[path] = known
            elif group in {None, name_of(path, self._root).group} and (
                entry := self._read(path, node)
            ):
                now[path] = entry
        self._known = now
        chosen = [each for each in now.values() if group in {None, each.name.group}]
        return _rows(chosen)

    def groups(self) -> Sequence[str]:
        """Sorted; no index is read.

        Raises:
            StoreError: a directory cannot be read.
        """
        return sorted({name_of(path, self._root).group for path, _ in self._files()})

    def _files(self) -> list[tuple[str, Node]]:
        if self._only is not None:
            node = self._tree.find(self._only)
            return [(self._only, node)] if node is not None and not node.directory else []
        found: list[tuple[str, Node]] = []
        below: list[str] = []
        for node in self._tree.entries():
            if not node.directory and node.name.endswith(SUFFIX):
                found.append((node.name, node))
            elif node.directory and not node.name.endswith(STORE_SUFFIX):
                below.append(node.name)
        unread: list[str] = []
        for directory in below:
            found += [
                (f"{directory}/{node.name}", node)
                for node in readable_entries(self._tree, directory, unread)
                if not node.directory and node.name.endswith(SUFFIX)
            ]
        for text in unread:
            if text not in self.unread:
                log.warning("casync.unreadable reason=%s", text)
        self.unread = unread
        return found

    def _read(self, path: str, node: Node) -> Entry | None:
        name = name_of(path, self._root)
        entry = Entry(path, node.size, node.modified, name, None)
        try:
            index = BlobIndex(self._tree, path, node.size)
        except ObjectMissing:
            return None  # gone meanwhile
        except DiskError as error:
            return replace(entry, reason=str(error))
        try:
            facts = {
                "index": path,
                "chunks": index.count,
                "chunk_size_avg": index.avg_size,
                "digest": index.digest,
            }
            return replace(entry, facts=DiskFacts(name.disk, index.size, facts))
        finally:
            index.close()


def _rows(entries: Sequence[Entry]) -> Sequence[Row]:
    points: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        disks = points.setdefault((entry.name.group, entry.name.point), {})
        disk = entry.name.disk
        if disk in disks:  # vm1-2026-01-01 and vm1_2026-01-01
            disk = entry.path.rpartition("/")[2].removesuffix(SUFFIX)
        disks[disk] = entry
    rows = [_row(group, id_, disks) for (group, id_), disks in points.items()]
    return sorted(rows, key=lambda row: (row.point.group, row.point.created, row.point.id))


def _row(group: str, id_: str, entries: Mapping[str, Entry]) -> Row:
    times = [entry.name.created for entry in entries.values() if entry.name.created is not None]
    created = max(times or [entry.modified for entry in entries.values()])
    disks = tuple(
        replace(entry.facts, name=disk)
        for disk, entry in entries.items()
        if entry.facts is not None
    )
    reasons = [entry.reason for entry in entries.values() if entry.facts is None]
    flags: tuple[str, ...] = ()
    if reasons:
        flags = ("partial" if disks else "damaged",)
    facts = {"reason": "; ".join(reasons[:4])} if reasons else {}
    return Row(Point(id_, group, created, disks, flags=flags, facts=facts), entries)
