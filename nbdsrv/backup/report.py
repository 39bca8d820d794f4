"""What a backup has done, disk by disk and repository by repository."""

from dataclasses import dataclass, field

from nbdsrv.errors import NbdsrvError

__all__ = ["DiskReport", "Failed", "Report"]


@dataclass(frozen=True, slots=True)
class DiskReport:
    """One disk in one repository; all ``bytes`` are of the disk but ``new_bytes``.

    Attributes:
        repository: where.
        group: of the point.
        disk: its name.
        point: id of the point.
        size: of the disk.
        mode: ``full``, ``incremental`` or ``scan``.
        reason: why.
        read_bytes: that were read of the source to be stored.
        new_bytes: that were stored, compressed.
        zero_bytes: that are zeroes.
        unchanged_bytes: that are as in the parent point.
        duplicate_bytes: that the repository had already, elsewhere.
        rechecked_bytes: said to be unchanged, and read all the same.
        recheck_mismatches: chunks of these that had changed.
        reread_bytes: of ``read_bytes``, read for this repository alone: it had fallen behind.
        duration_s: seconds from the beginning of this disk to its end.
    """

    repository: str
    group: str
    disk: str
    point: str
    size: int
    mode: str
    reason: str
    read_bytes: int
    new_bytes: int
    zero_bytes: int
    unchanged_bytes: int
    duplicate_bytes: int
    rechecked_bytes: int
    recheck_mismatches: int
    reread_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A repository that has no new point."""

    repository: str
    error: NbdsrvError


@dataclass(slots=True)
class Report:
    """Of one backup."""

    disks: list[DiskReport] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
