"""Where things lie in a datastore, and what they are called here.

::

    <root>/.chunks/bb9f/bb9f8df6...                                     chunks
    <root>/vm/100/2026-01-01T00:00:00Z/                group vm/100     a snapshot
           owner                     index.json.blob  drive-scsi0.img.fidx  qemu-server.conf.blob
    <root>/ns/a/ns/b/vm/100/...                        group a/b/vm/100

The last two parts of a group's name are always type and id, so that a namespace may be called
``vm`` too. A disk is called as its archive is, without ``.img.fidx``.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from nbdsrv.errors import RepositoryError
from nbdsrv.store.tree import Node, Tree, readable_entries

__all__ = [
    "CHUNKS",
    "MANIFEST",
    "PROTECTED",
    "disk_names",
    "group_path",
    "groups",
    "moment",
    "namespace",
    "snapshots",
]

CHUNKS = ".chunks"
MANIFEST = "index.json.blob"
PROTECTED = ".protected"
TYPES = ("ct", "host", "vm")
MAX_DEPTH = 8
"""Namespaces within each other, by the format."""
MAX_NAMESPACES = 10_000
"""Links that lead back up could make them endless."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SNAPSHOT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def group_path(group: str) -> str | None:
    """Where a group of that name would lie; None if no group can be called so."""
    *spaces, kind, id_ = group.split("/") if group.count("/") else ("", "", "")
    if kind not in TYPES or len(spaces) > MAX_DEPTH:
        return None
    if not all(_NAME.fullmatch(part) for part in (*spaces, id_)):
        return None
    return "/".join([*(f"ns/{space}" for space in spaces), kind, id_])


def namespace(group: str) -> str:
    """``a/b`` of ``a/b/vm/100``; "" for the root's groups."""
    return "/".join(group.split("/")[:-2])


def groups(tree: Tree, unread: list[str]) -> Iterator[str]:
    """The names of all groups, namespace by namespace. Blocking.

    Args:
        tree: the datastore.
        unread: takes what is said of directories that cannot be read.

    Raises:
        StoreError: the datastore cannot be read.
        RepositoryError: there are too many namespaces.
    """
    waiting: list[tuple[str, ...]] = [()]
    count = 0
    while waiting:
        spaces = waiting.pop()
        at = "/".join(f"ns/{space}" for space in spaces)
        below = f"{at}/" if at else ""
        nodes = readable_entries(tree, at, unread) if at else tree.entries()
        names = {node.name for node in nodes if node.directory}
        for kind in TYPES:
            if kind in names:
                for node in _directories(tree, below + kind, _NAME, unread):
                    yield "/".join((*spaces, kind, node.name))
        if "ns" not in names or len(spaces) == MAX_DEPTH:
            continue
        inner = _directories(tree, f"{below}ns", _NAME, unread)
        count += len(inner)
        if count > MAX_NAMESPACES:
            text = f"{tree.name}: has more than {MAX_NAMESPACES} namespaces; do links lead back?"
            raise RepositoryError(text)
        waiting += [(*spaces, node.name) for node in reversed(inner)]


def snapshots(tree: Tree, path: str, unread: list[str] | None) -> Sequence[str]:
    """The names of a group's snapshots, finished or not, from old to new. Blocking.

    ``unread`` takes what is said of the group's directory if it cannot be read; None: StoreError.
    """
    nodes = _directories(tree, path, _SNAPSHOT, unread)
    return [node.name for node in nodes if moment(node.name) is not None]


def _directories(
    tree: Tree, path: str, pattern: re.Pattern[str], unread: list[str] | None
) -> Sequence[Node]:
    nodes = readable_entries(tree, path, unread)
    return [node for node in nodes if node.directory and pattern.fullmatch(node.name)]


def moment(snapshot: str) -> float | None:
    """Seconds since 1970; None for what is no time."""
    try:
        when = datetime.strptime(snapshot, "%Y-%m-%dT%H:%M:%SZ")  # noqa: DTZ007 - next line
    except ValueError:
        return None
    return when.replace(tzinfo=UTC).timestamp()


def disk_names(archives: Sequence[str]) -> dict[str, str]:
    """What the disks among a snapshot's archives are called: name to archive, in order."""
    indexes = [archive for archive in archives if archive.endswith(".fidx")]
    taken = {archive.removesuffix(".fidx") for archive in indexes}
    names: dict[str, str] = {}
    for archive in indexes:
        whole = archive.removesuffix(".fidx")
        short = whole.removesuffix(".img")
        names[whole if short in taken or not short else short] = archive
    return names
