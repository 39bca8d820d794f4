"""The archives of a repository, as restore points.

::

    archive   {name, time, hostname}        group: hostname     id: the archive's name
       └── items ── regular files of at least 1 MiB ── disks, named by their paths

An archive never changes, so what is in it is asked for once. Renaming one makes another of it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.borg.process import BorgProcesses
from nbdsrv.repository.pieces import ID_SIZE, MisfitError, Pieces
from nbdsrv.repository.repository import DiskFacts, Point

__all__ = ["MIN_DISK", "UNKNOWN", "Archives", "Row"]

T = TypeVar("T")

UNKNOWN = "unknown-host"
"""Group of archives that name no host."""
MIN_DISK = 1 << 20
"""Bytes a file has at least to be listed as a disk."""
MAX_DISKS = 1000
"""Of an archive; as many as a restore point can have."""
PART = 1 << 20
"""Chunks asked for at a time: 36 MiB."""
CHECKPOINT = ".checkpoint"
"""In the name of what borg leaves of a backup that was interrupted."""
_ROW = ID_SIZE + 4


class _Archive(msgspec.Struct, frozen=True):
    id: str
    name: str
    time: float
    hostname: str = ""
    username: str = ""
    comment: str = ""
    chunker: list[str] = []
    failure: str = ""


class _File(msgspec.Struct, frozen=True):
    path: str
    size: int
    chunks: int
    modified: float = 0


class _Listed(msgspec.Struct, frozen=True):
    archives: list[_Archive]


class _Files(msgspec.Struct, frozen=True):
    files: list[_File]
    complete: bool


@dataclass(slots=True)
class Row:
    """One archive.

    Attributes:
        archive: what borg says of it.
        point: once its items have been looked at.
    """

    archive: _Archive
    point: Point | None = field(default=None, repr=False)

    @property
    def group(self) -> str:
        """The host, or that none is known."""
        return self.archive.hostname or UNKNOWN


class Archives:
    """All archives. Everything here blocks; one thread at a time for ``rows``."""

    def __init__(self, borg: BorgProcesses, asked: Sequence[str]) -> None:
        """``asked``: paths of files that are disks, however small."""
        self._borg = borg
        self._asked = asked
        self._rows: dict[tuple[str, str], Row] = {}

    def rows(self, group: str | None) -> list[Row]:
        """By group, then from old to new; each has its ``point``.

        Raises:
            DiskError: they cannot be listed.
        """
        header, _ = self._borg.call("archives")
        listed = _converted(header, _Listed, self._borg.name)
        rows: dict[tuple[str, str], Row] = {}
        for archive in listed.archives:
            known = self._rows.get((archive.id, archive.name))
            if known is None or known.archive.failure:
                known = Row(archive)
            rows[archive.id, archive.name] = known
        self._rows = rows
        found = [row for row in rows.values() if group in {None, row.group}]
        for row in found:
            if row.point is None or "reason" in row.point.facts:
                row.point = self._point(row)
        found.sort(key=lambda row: (row.group, row.archive.time, row.archive.name))
        return found

    def _point(self, row: Row) -> Point:
        archive = row.archive
        facts: dict[str, Any] = {
            "archive": archive.id,
            "comment": archive.comment,
            "username": archive.username,
            "chunker": ",".join(archive.chunker),
            "encryption": self._borg.facts.get("encryption"),
            "encrypted": self._borg.facts.get("encrypted"),
            "smallest_listed": MIN_DISK,
        }
        flags = ("partial",) if CHECKPOINT in archive.name else ()
        try:
            if archive.failure:
                text = f"corrupt repository: {self._borg.name}: archive {archive.name}"
                raise CorruptImage(f"{text}: {archive.failure}")
            files = self._files(archive)
        except CorruptImage as error:
            facts["reason"] = str(error)
            return Point(archive.name, row.group, archive.time, (), None, ("damaged",), facts)
        if not files.complete:
            facts["not_listed"] = f"more than {MAX_DISKS} files; name them by path"
        disks = {
            file.path: DiskFacts(
                file.path, file.size, {"modified": file.modified, "chunks": file.chunks}
            )
            for file in files.files
        }
        return Point(
            archive.name, row.group, archive.time, tuple(disks.values()), None, flags, facts
        )

    def _files(self, archive: _Archive) -> _Files:
        header, _ = self._borg.call(
            "files",
            archive=archive.name,
            least=MIN_DISK,
            most=MAX_DISKS,
            asked=list(self._asked),
        )
        return _converted(header, _Files, self._borg.name)

    def pieces(self, archive: str, path: str) -> Pieces:
        """What a file is made of.

        Raises:
            CorruptImage: the archive is damaged.
            DiskError: it cannot be read, or has no such file.
        """
        ids, sizes = bytearray(), array("q")
        while True:
            header, body = self._borg.call(
                "chunks", archive=archive, path=path, first=len(sizes), count=PART
            )
            rows = memoryview(body)
            if len(rows) % _ROW:
                raise DiskError(f"{self._borg.name}: borg's answer is no list of chunks")
            for at in range(0, len(rows), _ROW):
                ids += rows[at : at + ID_SIZE]
                sizes.append(int.from_bytes(rows[at + ID_SIZE : at + _ROW], "big"))
            if not rows or len(sizes) >= int(header["count"]):
                break
        try:
            return Pieces(int(header["size"]), bytes(ids), sizes)
        except MisfitError as error:
            where = f"{self._borg.name}: archive {archive}: {path}"
            raise CorruptImage(f"corrupt repository: {where}: {error}") from error


def _converted(header: dict[str, Any], type_: type[T], name: str) -> T:
    try:
        return msgspec.convert(header, type_)
    except msgspec.MsgspecError as error:
        raise DiskError(f"{name}: borg's answer makes no sense: {error}") from error
