"""Which directories hold backups, and what is in them.

::

    /backups                    group: its directory below the root;
      web1/ vda.full.data ...       for the root itself, the VM's name
      web1/2026-10/ ...         one directory is one chain of backups: a group of its own
      web1/checkpoints/         libvirt's; never looked into

A file is read once and remembered by its name, size and time, so that listing anew costs a look
into each directory. What comes is seen, what is gone is dropped.
"""

import html
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from nbdsrv.errors import CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.virtnbdbackup.chains import Makers, PointFiles, makers_of, points_of
from nbdsrv.repository.virtnbdbackup.data_file import (
    PARTIAL,
    DataFile,
    data_name,
    read_data_file,
)
from nbdsrv.repository.virtnbdbackup.doubt import Logs, LogText, is_log, read_log
from nbdsrv.store.tree import Node, Tree, readable_entries

__all__ = ["Directory", "Listing"]

log = logging.getLogger(__name__)

MAX_DEPTH = 4
"""Directories below the root: pool/host/vm/month."""
MAX_DIRECTORIES = 20_000
MAX_FILES = 200_000
"""Data files of a directory."""
MAX_CONFIG = 1 << 20
"""Bytes of a domain's configuration that are looked at for its name."""
_CHECKPOINTS = "checkpoints"
_DOMAIN = re.compile(rb"<name>([^<>]{1,255})</name>")

T = TypeVar("T")


@dataclass(slots=True)
class Directory:
    """One directory with data files.

    Attributes:
        path: below the root.
        group: what it is called.
        files: of backups.
        points: of them, from old to new.
        makers: of checkpoints.
        logs: of virtnbdbackup's runs.
        partial: names of files that are being written, or were given up.
        names: of everything in it.
    """

    path: str
    group: str
    files: Sequence[DataFile]
    points: Sequence[PointFiles]
    makers: Makers
    logs: Logs
    partial: Sequence[str]
    names: frozenset[str]


@dataclass(slots=True)
class _Known:
    signature: tuple[Node, ...]
    directory: Directory
    texts: dict[Node, LogText | None] = field(default_factory=dict)
    read: dict[Node, DataFile] = field(default_factory=dict)


class Listing:
    """Blocking; any thread may call it, one at a time."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self.unread: Sequence[str] = ()
        """What is said of directories that could not be looked into when all were last listed."""

    def directories(self, group: str | None = None) -> Sequence[Directory]:
        """All of them, or that of one group; by name.

        Raises:
            DiskError: the root cannot be read, or there are too many.
        """
        with self._lock:
            if group is not None:
                return self._one(group)
            found = {path: nodes for path, nodes in self._walk() if _has_data(nodes)}
            for path in self._known.keys() - found.keys():
                del self._known[path]
            every = [self._look(path, nodes) for path, nodes in found.items()]
        every.sort(key=lambda directory: directory.group)
        return every

    def _one(self, group: str) -> Sequence[Directory]:
        """A group by its name, without a look at all the others."""
        for path in ("", group):
            if path.count("/") >= MAX_DEPTH:
                continue
            try:
                nodes = self._tree.entries(path)
            except CorruptImage:
                continue  # no path at all
            if _has_data(nodes):
                directory = self._look(path, nodes)
                if directory.group == group:
                    return [directory]
        return []

    def _walk(self) -> Iterator[tuple[str, Sequence[Node]]]:
        todo = [("", 0)]
        unread: list[str] = []
        count = 0
        while todo:
            path, depth = todo.pop()
            count += 1
            if count > MAX_DIRECTORIES:
                text = f"more than {MAX_DIRECTORIES} directories; name one of them"
                raise RepositoryError(f"{self._tree.name}: {text}")
            nodes = readable_entries(self._tree, path, unread) if path else self._tree.entries()
            if len(nodes) > MAX_FILES:
                raise RepositoryError(f"{self._tree.full(path)}: more than {MAX_FILES} files")
            yield path, nodes
            if depth < MAX_DEPTH:
                below = [n.name for n in nodes if n.directory and n.name != _CHECKPOINTS]
                todo += [(f"{path}/{name}" if path else name, depth + 1) for name in below]
        for text in unread:
            if text not in self.unread:
                log.warning("virtnbdbackup.unreadable reason=%s", text)
        self.unread = unread

    def _look(self, path: str, nodes: Sequence[Node]) -> Directory:
        known = self._known.get(path)
        signature = tuple(nodes)
        if known is not None and known.signature == signature:
            return known.directory
        read = known.read if known else {}
        texts = known.texts if known else {}
        data = [n for n in nodes if not n.directory and data_name(n.name)]
        now_read = _again(read, data, lambda n: read_data_file(self._tree, _below(path, n), n))
        logs = [n for n in nodes if is_log(n)]
        now_texts = _again(texts, logs, lambda n: read_log(self._tree, _below(path, n), n))
        files = list(now_read.values())
        directory = Directory(
            path,
            path or self._domain(nodes),
            files,
            points_of(files),
            makers_of(files),
            Logs([text for text in now_texts.values() if text is not None]),
            [n.name for n in nodes if _is_partial(n)],
            frozenset(n.name for n in nodes),
        )
        self._known[path] = _Known(signature, directory, now_texts, now_read)
        return directory

    def _domain(self, nodes: Sequence[Node]) -> str:
        """The VM's name; that of the root directory if there is none, or several."""
        named = {n.name.removesuffix(".cpt") for n in nodes if n.name.endswith(".cpt")}
        if not named:
            for node in nodes:
                if node.name.startswith("vmconfig.") and node.name.endswith(".xml"):
                    named |= self._configured(node)
        if len(named) == 1:
            return named.pop()
        return os.path.basename(os.path.realpath(self._tree.name)) or "root"

    def _configured(self, node: Node) -> set[str]:
        try:
            raw = self._tree.read_range(node.name, 0, max(min(node.size, MAX_CONFIG), 1))
        except DiskError:
            return set()
        found = _DOMAIN.search(raw)
        name = html.unescape(found[1].decode(errors="replace")) if found else ""
        return {name} if name.isprintable() and name else set()


def _below(path: str, node: Node) -> str:
    return f"{path}/{node.name}" if path else node.name


def _has_data(nodes: Sequence[Node]) -> bool:
    return any(not n.directory and (data_name(n.name) or _is_partial(n)) for n in nodes)


def _is_partial(node: Node) -> bool:
    name = node.name.removesuffix(PARTIAL)
    return name != node.name and not node.directory and data_name(name) is not None


def _again(known: dict[Node, T], nodes: Sequence[Node], read: Callable[[Node], T]) -> dict[Node, T]:
    """What is known of these files; only those that are new are read."""
    return {node: known[node] if node in known else read(node) for node in nodes}
