"""Which disks of a VDI can be opened: headers are read once, chains are proven from them.

::

    20260103.. ──> 20260102.. ──> 20260101..        each DiskFile once, for all points
         '  link  '     '  link  '                  each link once

What is known of a disk holds until its file, or the directory it leads to, has another time or
size, and while nothing is merged: only a merge writes headers and footers anew. That one could not
be read is not known: the next listing tries again.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.repository.xo.chain import (
    MAX_CHAIN,
    Chain,
    check_identity,
    check_link,
    open_chain,
    refuse_merging,
)
from nbdsrv.repository.xo.disk_file import DiskFile, open_disk_file
from nbdsrv.repository.xo.layout import DATA, VHD
from nbdsrv.repository.xo.merging import Merge, read_merges
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Node

__all__ = ["Health"]

AHEAD = 15
"""Disks in a bucket that are opened along with one: each takes half a dozen requests in turn."""

Stamp = tuple[Node | None, Node | None]


class Health:
    """The disks of one VDI's directory. Not thread-safe; blocking.

    Attributes:
        merges: that are under way in it.
        nodes: what is in it, by name.
    """

    def __init__(self, remote: Remote, directory: str) -> None:
        self.merges: Mapping[str, Merge] = {}
        self.nodes: Mapping[str, Node] = {}
        self._remote = remote
        self._directory = directory
        self._data: Mapping[str, Node] = {}
        self._known: dict[str, tuple[Stamp, DiskFile | DiskError]] = {}
        self._links: dict[str, DiskError | None] = {}
        self._fetched: dict[str, DiskFile | DiskError] = {}

    def refresh(self) -> None:
        """Look what is there now.

        Raises:
            StoreError: the directory cannot be read.
        """
        tree = self._remote.tree
        nodes = tree.entries(self._directory)
        self.nodes = {node.name: node for node in nodes}
        data = self.nodes.get(DATA)
        below = tree.entries(f"{self._directory}/{DATA}") if data is not None else []
        self._data = {node.name: node for node in below}
        self.merges = read_merges(self._remote, self._directory, nodes)
        self._links = {}
        self._known = {
            path: (stamp, found)
            for path, (stamp, found) in self._known.items()
            if isinstance(found, DiskFile | CorruptImage | UnsupportedImage)
            if self._node(path) is not None
        }

    def disk(self, path: str) -> DiskFile:
        """What is known of a disk; its file is closed.

        Raises:
            DiskError: it cannot be opened.
        """
        known = self._known.get(path)
        if known is None or known[0] != self._stamp(path, known[1]) or self.merges:
            found: DiskFile | DiskError
            try:
                found = open_disk_file(self._remote, path)
                found.close()
            except DiskError as error:
                found = _missing(self._remote, path) if isinstance(error, ObjectMissing) else error
            known = self._known[path] = self._stamp(path, found), found
        if isinstance(known[1], DiskError):
            raise known[1]
        return known[1]

    def check(self, path: str, snapshot: str) -> DiskFile:
        """The same of a disk that is to be a restore point: with all its parents.

        ``snapshot``: its id, as ``check_identity`` takes it.

        Raises:
            DiskError: it, or one of them, cannot be opened, or is not the right one.
        """
        refuse_merging(self._remote, self.merges, path)
        found = self.disk(path)
        check_identity(found, snapshot)
        error = self._link_error(path)
        if error is not None:
            raise error
        return found

    def chain(self, path: str, snapshot: str) -> Chain:
        """The same, open: of VHD directories what is known is taken, files are read anew.

        Raises:
            DiskError: as ``open_chain``.
        """
        self._fetched = {}
        opener = self._fetch if self._remote.tree.distant else self._opened
        return open_chain(self._remote, path, self.merges, snapshot, opener)

    def _fetch(self, path: str) -> DiskFile:
        """Open a disk in a bucket; with a parent, those that are likely to be its parents."""
        if path not in self._fetched:
            paths = [path]
            if self._fetched:
                older = sorted(name for name in self.nodes if self._may_be_parent(name, path))
                paths += [f"{self._directory}/{name}" for name in older[: -AHEAD - 1 : -1]]
            with ThreadPoolExecutor(len(paths), "nbdsrv-chain") as threads:
                for each, found in zip(paths, threads.map(self._attempt, paths), strict=True):
                    self._fetched[each] = found
        found = self._fetched[path]
        if isinstance(found, DiskError):
            raise found
        return found

    def _may_be_parent(self, name: str, child: str) -> bool:
        path = f"{self._directory}/{name}"
        return name.endswith(VHD) and path < child and path not in self._fetched

    def _attempt(self, path: str) -> DiskFile | DiskError:
        try:
            return open_disk_file(self._remote, path)
        except DiskError as error:
            return error

    def _opened(self, path: str) -> DiskFile:
        known = self._known.get(path)
        if known is not None and isinstance(known[1], DiskFile):
            found = self.disk(path)
            if found.directory is not None:
                return found
        return open_disk_file(self._remote, path)

    def _link_error(self, path: str) -> DiskError | None:
        """Why a disk has not all its parents, or None. Not by recursion: chains are long."""
        above: list[str] = []
        error: DiskError | None = None
        while True:
            if path in self._links:
                error = self._links[path]
                break
            if path in above or len(above) > MAX_CHAIN:
                text = f"corrupt image: {self._remote.full(path)} at 0: its parents make a loop"
                error = CorruptImage(text)
                break
            above.append(path)
            try:
                child = self.disk(path)
                if not child.differencing:
                    break
                parent = self._parent(child)
                check_link(child, parent, self.merges)
            except DiskError as found:
                error = found
                break
            path = parent.path
        for each in above:
            self._links[each] = error
        return error

    def _parent(self, child: DiskFile) -> DiskFile:
        try:
            return self.disk(child.parent(self._remote))
        except DiskError as error:
            text = f"{error} (the parent of {child.name})"
            raise type(error)(text, error.errno) from error

    def _node(self, path: str) -> Node | None:
        directory, _, name = path.rpartition("/")
        if directory != self._directory:
            return self._remote.tree.find(path)
        return self.nodes.get(name)

    def _stamp(self, path: str, found: DiskFile | DiskError) -> Stamp:
        place = found.place if isinstance(found, DiskFile) else ""
        directory, _, name = place.rpartition("/")
        data = self._data.get(name) if directory == f"{self._directory}/{DATA}" else None
        return self._node(path), data


def _missing(remote: Remote, path: str) -> CorruptImage:
    return CorruptImage(f"corrupt image: {remote.full(path)} at 0: is missing")


def parent_stamps(disks: Sequence[DiskFile], remote: Remote) -> Sequence[str]:
    """The names of the parents of a point's disks, without directory and ending."""
    found: list[str] = []
    for disk in disks:
        if disk.differencing:
            name = disk.parent(remote).rpartition("/")[2]
            found.append(name.partition(".")[0])
    return found
