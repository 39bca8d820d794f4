"""Restore points, whoever made them: what our repository and any other tool's have in common.

::

    Repository ── points() ──> Point ── disks ──> open_disk(point, name) ──> Disk
        └── begin(group) ──> PointWriter ── disk(name, size) ──> DiskWriter ── data zero unchanged
                                 │                                  in any order, whole chunks
                                 └── commit()   durable and visible, at once
                                     abort()    nothing is visible
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import RepositoryError
from nbdsrv.repository.damage import Check

if TYPE_CHECKING:
    from nbdsrv.copying.survey import DataMap

__all__ = [
    "CHANGED_SINCE",
    "LEVELS",
    "UNREAD",
    "DiskFacts",
    "DiskWriter",
    "Point",
    "PointWriter",
    "Repository",
    "WriteSummary",
    "stamp_of",
]

LEVELS = ("structure", "packs", "chunks")
"""How deep ``verify`` looks. structure: listings and metadata agree, everything named is there;
packs: also what is stored has the checksums the format keeps of it; chunks: also every byte of
every disk can be read, decoded and, where the format can prove it, is what was backed up."""
CHANGED_SINCE = "nbdsrv:changed-since:"
"""A meta context for each other point of the disk: 1 where it differs from what it was there."""

UNREAD = "unread"
"""Flag of a point that the store did not give: neither sound nor damaged, and nothing is known of
its disks. The next listing asks for it again."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """One disk of a point.

    Attributes:
        name: unique in the point.
        size: bytes.
        facts: what else is known: JSON values under snake_case names.
        aliases: what it may be called as well: a device, an id.
    """

    name: str
    size: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """One restore point of one VM.

    Attributes:
        id: unique in its group; sorts by time where the tool's ids do.
        group: the VM's name or id.
        created: seconds since 1970.
        disks: in the VM's order.
        parent: id of the point it was made from, or None.
        flags: ``partial``, ``damaged``, ``locked``, ``UNREAD`` ...
        facts: what else is known: JSON values under snake_case names.
    """

    id: str
    group: str
    created: float
    disks: tuple[DiskFacts, ...]
    parent: str | None = None
    flags: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stamp(self) -> str:
        """``created`` in UTC, to the second: what a timestamp prefix is matched with."""
        return stamp_of(self.created)

    def disk(self, name: str) -> DiskFacts | None:
        """The disk of that name; else the only one that is also called so."""
        for disk in self.disks:
            if disk.name == name:
                return disk
        called = [disk for disk in self.disks if name in disk.aliases]
        return called[0] if len(called) == 1 else None


def stamp_of(created: float) -> str:
    """Seconds since 1970 as ``Point.stamp``."""
    return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Repository(ABC):
    """Restore points. Belongs to one event loop.

    Attributes:
        name: for messages.
        kind: the scheme it is opened by: ``repo``, ``xo`` ...
        identity: what stays when it is moved, where its tool gives it an id; else "".
    """

    name: str
    kind: str
    identity: str = ""

    @abstractmethod
    async def points(self, group: str | None = None) -> Sequence[Point]:
        """All points, or those of one group; by group, then from old to new.

        ``group`` may be another name the group goes by, such as the VM's id.

        A damaged one is listed with the flag ``damaged`` and no disks.

        Raises:
            DiskError: the repository cannot be read.
        """

    @property
    def unread(self) -> Sequence[str]:
        """Why some places were passed over when all points were last listed."""
        return ()

    async def groups(self) -> Sequence[str]:
        """The names of all groups that have points, sorted.

        Raises:
            DiskError: the repository cannot be read.
        """
        return sorted({point.group for point in await self.points()})

    @abstractmethod
    async def open_disk(self, point: Point, name: str) -> Disk:
        """A disk of a point, read-only.

        Raises:
            PointMissing: it has no such disk, or has been pruned.
            DiskError: it is damaged.
        """

    async def begin(self, group: str, *, parent: Point | None = None) -> "PointWriter":
        """Begin a new point of ``group``.

        Args:
            group: the VM's name.
            parent: what is *unchanged* in it is as in this point.

        Raises:
            RepositoryError: nobody writes to repositories of this kind.
        """
        del group, parent
        raise RepositoryError(f"{self.name}: repositories of this kind are only read")

    async def verify(
        self,
        level: str,
        points: Sequence[Point] | None = None,
        disk: str | None = None,
        *,
        advance: Callable[[int, int], None] = lambda _, __: None,
    ) -> Check:
        """Look for damage, as deep as the format allows.

        Args:
            level: one of ``LEVELS``; each contains those before it.
            points: these; None for all, and for what belongs to no point.
            disk: only disks of that name.
            advance: called now and then with (bytes done, bytes to do).

        Raises:
            DiskError: the repository cannot be read at all.
        """
        del level, points, disk, advance
        raise RepositoryError(f"{self.name}: repositories of this kind cannot be verified")

    @abstractmethod
    async def close(self) -> None:
        """Idempotent. Disks that are open stay so."""


@dataclass(slots=True)
class WriteSummary:
    """What became of the bytes of one disk.

    Attributes:
        new_bytes: stored, as they take place: compressed.
        duplicate_bytes: of the disk that the repository had already, elsewhere.
        zero_bytes: of the disk that are zeroes now.
        unchanged_bytes: of the disk that are as in the parent.
    """

    new_bytes: int = 0
    duplicate_bytes: int = 0
    zero_bytes: int = 0
    unchanged_bytes: int = 0


class DiskWriter(ABC):
    """One disk of a point that is being written.

    Calls may come in any order and several at a time, for ranges that do not overlap, on multiples
    of ``granularity`` (the end of the disk excepted). What is never told of is *unchanged* if there
    is a parent, and zeroes otherwise.

    Attributes:
        name: of the disk.
        size: bytes.
        granularity: bytes.
        summary: so far.
        facts: what the point will say of it: ``mode``, ``reason``, ``cbt``, ``read_bytes``,
            ``rechecked_bytes``; may be changed until it is committed.
    """

    name: str
    size: int
    granularity: int
    summary: WriteSummary
    facts: dict[str, Any]

    @abstractmethod
    async def data(self, offset: int, buffer: bytearray, length: int) -> None:
        """``buffer[:length]`` is at ``offset``; it may be reused once this returns.

        Zeroes in it are found. Content that is as in the parent counts as unchanged.

        Raises:
            DiskError: it cannot be stored. The point cannot be committed any more.
        """

    @abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes now, whatever the parent has there."""

    async def wanted(self) -> list[tuple[int, int]]:
        """(offset, length) of what must be told although nothing says that it has changed.

        Ask again until there is nothing left: without it nothing can be committed.
        """
        return []

    async def sample(
        self, percent: float, changed: "DataMap", data: "DataMap | None" = None
    ) -> list[tuple[int, int]]:
        """(offset, length) of a random choice of chunks: data in the parent, or in ``data``, and
        not in ``changed``.

        So many percent of them, but at least one if there is one. ``data``: where the disk has
        some now, on multiples of the granularity; None if that is not known.
        """
        del percent, changed, data
        return []

    async def recheck(self, offset: int, buffer: bytearray, length: int) -> int:
        """Bytes of chunks that are not as in the parent. Tells the point nothing.

        Raises:
            DiskError: the parent cannot be read.
        """
        del offset, buffer, length
        return 0


class PointWriter(ABC):
    """A point that is being written: a lease is held until ``commit`` or ``abort``."""

    @abstractmethod
    async def disk(
        self, name: str, size: int, facts: Mapping[str, Any] | None = None
    ) -> DiskWriter:
        """Add a disk."""

    @abstractmethod
    async def commit(self, facts: Mapping[str, Any] | None = None) -> Point:
        """Make it durable, then visible.

        Raises:
            DiskError: nothing is visible.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Forget it; nothing is visible. Idempotent, and nothing after ``commit``."""
