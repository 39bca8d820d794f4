"""What snapshots there are: each manifest is read once, and again when it has changed.

::

    vm/100/2026-01-01T00:00:00Z/   entries ── as before? ──> the row that is known
                                      '── new or changed ──> manifest ──> row

A snapshot without a manifest is a backup that has not finished: it is none yet. One that is broken
is a point with the flag ``damaged``; one whose index files are not all there is ``partial``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.pbs.keys import CryptKey
from nbdsrv.repository.pbs.layout import (
    MANIFEST,
    PROTECTED,
    disk_names,
    group_path,
    groups,
    moment,
    namespace,
    snapshots,
)
from nbdsrv.repository.pbs.manifest import MAX_MANIFEST, Archive, Manifest, read_manifest
from nbdsrv.repository.repository import DiskFacts, Point
from nbdsrv.store.store import ObjectMissing, StoreError
from nbdsrv.store.tree import Node, Tree

__all__ = ["Listing", "Row"]

log = logging.getLogger(__name__)

MAX_NOTES = 1000
"""Characters of notes that are shown."""

DRIVE = "drive-"
"""What Proxmox puts before the names of a machine's disks."""

_Seen = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A snapshot.

    Attributes:
        point: as it is shown.
        path: of its directory.
        manifest: None if it is damaged.
        archives: of its disks by their names.
        outage: is it called damaged only because it could not be read?
    """

    point: Point
    path: str
    manifest: Manifest | None
    archives: Mapping[str, Archive]
    outage: bool = False


class Listing:
    """Snapshots of a datastore. Its methods block; any thread may call them."""

    def __init__(self, tree: Tree, keys: Sequence[CryptKey]) -> None:
        self._tree = tree
        self._keys = {key.fingerprint: key for key in keys}
        self._known: dict[str, dict[str, tuple[_Seen, Row]]] = {}
        self.unfinished: dict[str, list[str]] = {}
        """Paths of snapshots without a manifest by group, as of the last listing."""
        self.unread: Sequence[str] = ()
        """What is said of groups that could not be read when all were last listed."""

    def rows(self, group: str | None = None) -> Sequence[Row]:
        """All snapshots, or those of a group; by group, then from old to new.

        Raises:
            StoreError: the datastore, or that group, cannot be read.
        """
        if group is not None:
            return self._group(group, None)
        unread: list[str] = []
        names = sorted(groups(self._tree, unread))
        for gone in self._known.keys() - set(names):
            self._known.pop(gone, None)
            self.unfinished.pop(gone, None)
        rows = [row for name in names for row in self._group(name, unread)]
        for text in unread:
            if text not in self.unread:
                log.warning("pbs.unreadable reason=%s", text)
        self.unread = unread
        return rows

    def groups(self) -> Sequence[str]:
        """The names of those that have a finished snapshot, sorted; no manifest is read.

        Raises:
            StoreError: the datastore cannot be read.
        """
        return sorted(name for name in groups(self._tree, []) if self._has_points(name))

    def key_of(self, manifest: Manifest) -> CryptKey | None:
        """The key a snapshot was made with, if it is one of ours."""
        if manifest.fingerprint:
            return self._keys.get(manifest.fingerprint)
        if manifest.signature:  # older clients did not note the key
            signers = [key for key in self._keys.values() if manifest.is_signed_by(key)]
            return signers[0] if signers else None
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _has_points(self, group: str) -> bool:
        path = group_path(group)
        if path is None:
            return False
        names = reversed(snapshots(self._tree, path, []))
        return any(self._tree.find(f"{path}/{name}/{MANIFEST}") is not None for name in names)

    def _group(self, group: str, unread: list[str] | None) -> Sequence[Row]:
        path = group_path(group)
        if path is None:
            return []
        before = self._known.get(group, {})
        now: dict[str, tuple[_Seen, Row]] = {}
        unfinished: list[str] = []
        for name in snapshots(self._tree, path, unread):
            where = f"{path}/{name}"
            try:
                nodes = self._tree.entries(where)
            except StoreError as error:
                if self._tree.distant:
                    raise
                now[name] = (), _damaged(group, name, where, (), error)
                continue
            if all(node.name != MANIFEST for node in nodes):
                unfinished.append(where)
                log.debug("pbs.unfinished snapshot=%s", where)
                continue
            seen = tuple((node.name, node.size, node.modified) for node in nodes)
            known = before.get(name)
            if known is not None and known[0] == seen:
                now[name] = known
            elif (row := self._row(group, name, where, nodes)) is not None:
                # What could not be read may be there next time.
                now[name] = seen if row.manifest is not None else (), row
        if now or before:
            self._known[group] = now
        self.unfinished[group] = unfinished
        return [row for _, row in now.values()]

    def _row(self, group: str, name: str, path: str, nodes: Sequence[Node]) -> Row | None:
        files = {node.name for node in nodes if not node.directory}
        flags = ("protected",) if PROTECTED in files else ()
        where = f"{path}/{MANIFEST}"
        try:
            manifest = read_manifest(
                self._tree.full(where), self._tree.read(where, limit=MAX_MANIFEST)
            )
            self._check(group, name, where, manifest)
        except ObjectMissing:
            return None  # pruned meanwhile
        except DiskError as error:
            return _damaged(group, name, path, flags, error)
        return self._sound(group, name, path, manifest, files, flags)

    def _check(self, group: str, name: str, where: str, manifest: Manifest) -> None:
        """Is it this snapshot's, and what was signed?"""
        kind, id_ = group.split("/")[-2:]
        wanted = (kind, id_, int(moment(name) or 0))
        if manifest.identity != wanted:
            text = f"corrupt repository: {self._tree.full(where)}: is of another snapshot:"
            raise CorruptImage(f"{text} {'/'.join(map(str, manifest.identity))[:200]}")
        if not manifest.signature:
            return
        key = self.key_of(manifest)
        if key is not None and not manifest.is_signed_by(key):
            text = f"corrupt repository: {self._tree.full(where)}: its signature is not of what it"
            raise CorruptImage(f"{text} says: it was changed after the backup")

    def _sound(
        self,
        group: str,
        name: str,
        path: str,
        manifest: Manifest,
        files: set[str],
        flags: tuple[str, ...],
    ) -> Row:
        archives = {
            disk: manifest.archives[file]
            for disk, file in disk_names(list(manifest.archives)).items()
        }
        here = {disk: each for disk, each in archives.items() if each.filename in files}
        facts = _facts(group, manifest, self.key_of(manifest))
        if lost := [each.filename for each in archives.values() if each.filename not in files]:
            flags = ("partial" if here else "damaged", *flags)
            facts["reason"] = f"{self._tree.full(path)}: {', '.join(lost)[:500]} is missing"
        if manifest.verify_state == "failed":
            flags = (*flags, "verify-failed")
        disks = tuple(
            DiskFacts(
                disk,
                each.size,
                {"archive": each.filename, "crypt_mode": each.crypt_mode, "csum": each.csum},
                (disk.removeprefix(DRIVE),) if disk.startswith(DRIVE) else (),
            )
            for disk, each in here.items()
        )
        point = Point(name, group, moment(name) or 0, disks, flags=flags, facts=facts)
        return Row(point, path, manifest, here)


def _damaged(group: str, name: str, path: str, flags: tuple[str, ...], error: DiskError) -> Row:
    facts = {"reason": str(error)}
    point = Point(name, group, moment(name) or 0, (), flags=("damaged", *flags), facts=facts)
    return Row(point, path, None, {}, isinstance(error, StoreError))


def _facts(group: str, manifest: Manifest, key: CryptKey | None) -> dict[str, Any]:
    kind, id_, _ = manifest.identity
    facts: dict[str, Any] = {"backup_type": kind, "backup_id": id_}
    if spaces := namespace(group):
        facts["namespace"] = spaces
    facts["encrypted"] = any(each.crypt_mode == "encrypt" for each in manifest.archives.values())
    if manifest.fingerprint:
        facts["key_fingerprint"] = manifest.fingerprint
    if manifest.signature:
        facts["signature"] = "valid" if key is not None else "not checked"
    if manifest.verify_state:
        facts["verify_state"] = manifest.verify_state
    if manifest.notes:
        facts["notes"] = manifest.notes[:MAX_NOTES]
    others = [name for name in manifest.archives if not name.endswith(".fidx")]
    if others:
        facts["archives"] = others
    return facts
