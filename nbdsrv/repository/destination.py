"""Where backups go: what the backup engine needs to know of a repository that can be written.

::

    Destination ── stored(group) ──> key, key, ...     from old to new
        │      └── point(key) ─────> KnownPoint        its disks, and of which checkpoint they are
        │      └── prove(point, disk)                  can that be built upon?
        └── begin(occasion, parent) ──> PointWriter    with DiskWriters that say what they want

The engine chooses the parent, decides what is read, and gives it; a destination stores it in its
own way. Nothing else of a repository is known to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.repository import PointWriter

__all__ = ["DEFAULT_LEVEL", "Destination", "KnownDisk", "KnownPoint", "Occasion", "Storage"]

DEFAULT_LEVEL = 2
"""Of zstd, where the repository is packed so."""


class KnownDisk(Protocol):
    """A disk of a point that is there."""

    @property
    def name(self) -> str:
        """In the point."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def cbt(self) -> dict[str, str] | None:
        """Who can tell what changes from here on: ``kind`` and ``id``; None if nobody can."""


class KnownPoint(Protocol):
    """A point that is there."""

    @property
    def id(self) -> str:
        """Unique in its group; a ULID is unique in the world."""

    @property
    def created(self) -> float:
        """Seconds since 1970."""

    @property
    def disks(self) -> Sequence[KnownDisk]:
        """In the VM's order."""

    def disk(self, name: str) -> KnownDisk | None:
        """The disk of that name."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How other tools' repositories store disks, where they leave a choice.

    Attributes:
        layout: of a VHD: ``vhd-directory`` or ``vhd``; "" for what the repository is used to.
        packing: of a VHD directory's files: ``brotli``, ``gzip`` or ``none``; "" for the default.
    """

    layout: str = ""
    packing: str = ""


@dataclass(frozen=True, slots=True)
class Occasion:
    """What a point is made of and for.

    Attributes:
        group: the VM's name.
        level: of compression.
        labels: of the point.
        consistency: ``crash``, ``filesystem``, ``application`` or "" where nothing is known.
        blobs: the VM's configuration, by name.
    """

    group: str
    level: int = DEFAULT_LEVEL
    labels: Mapping[str, str] = field(default_factory=dict)
    consistency: str = ""
    blobs: Mapping[str, str] = field(default_factory=dict)


class Destination(ABC):
    """A repository that is open to be written. All methods but ``begin`` block.

    Attributes:
        name: for messages.
        place: equal for two that are the same repository, whatever they were called.
        granularity: bytes of the chunks that its ``DiskWriter`` s want to be given.
    """

    name: str
    place: str
    granularity: int

    @abstractmethod
    def check_group(self, group: str) -> None:
        """Can a group be called so?

        Raises:
            RepositoryError: it cannot.
        """

    @abstractmethod
    def stored(self, group: str) -> Sequence[str]:
        """Keys of all its points, from old to new; nothing is read of them.

        Raises:
            DiskError: the repository cannot be read.
        """

    @abstractmethod
    def point(self, key: str) -> KnownPoint:
        """A point.

        Raises:
            ObjectMissing: it has been pruned meanwhile.
            CorruptImage: it is damaged.
            DiskError: the repository cannot be read.
        """

    @abstractmethod
    def prove(self, point: KnownPoint, disk: str) -> None:
        """Can a new point be told in terms of this disk of ``point``?

        Raises:
            CorruptImage: it is damaged.
            DiskError: it cannot be read.
        """

    def renewal(self, group: str) -> str:
        """Why the next point of the group should build upon none, unless it is told to; or ""."""
        del group
        return ""

    @abstractmethod
    async def begin(
        self, workers: Workers, occasion: Occasion, parent: KnownPoint | None
    ) -> PointWriter:
        """Begin a point; end it with ``commit`` or ``abort``.

        Args:
            workers: threads for everything that blocks.
            occasion: what it is made for.
            parent: of ``point``; what its disks are told in terms of, by name. None: of zeroes.

        Raises:
            PointMissing: the parent has been pruned.
            DiskError: the repository cannot be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Idempotent; no point may be under way."""
