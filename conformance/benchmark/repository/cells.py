"""What is measured of a repository, by which programs, and the bar of each cell.

A number is the higher the better, in MB/s (10**6) of the *disk's* size or in IOPS; but for the
sizes of repositories, in MiB, a ratio is theirs over ours, so that there too more is better.

Rule: ``nbdsrv`` is ahead of each peer in each cell. ``nbdsrv-encrypted`` is the same repository
with encryption, and has to be ahead of restic, which cannot do without.
"""

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

__all__ = ["CELLS", "Cell", "Program", "select"]


class Program(StrEnum):
    """The programs compared; a column of the table each."""

    OURS = "nbdsrv"
    ENCRYPTED = "nbdsrv-encrypted"
    BENJI = "benji"
    RESTIC = "restic"
    BORG = "borg"
    QEMU = "qemu-img"
    VIRTNBD = "virtnbdbackup"

    @property
    def is_ours(self) -> bool:
        return self in {Program.OURS, Program.ENCRYPTED}


COLD_BAR_BENJI = 50.0
"""Benji fetches, decompresses and hashes a block of 4 MiB for any 4 KiB of it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing measured; ``name`` is what ``--cells`` matches."""

    name: str
    title: str
    unit: str
    only: frozenset[Program] | None = None
    barring: frozenset[Program] = frozenset()

    @property
    def smaller_is_better(self) -> bool:
        return self.unit == "MiB"

    def takes(self, program: Program) -> bool:
        """Can this program do it at all?"""
        return program not in self.barring and (self.only is None or program in self.only)

    def bar(self, ours: Program, peer: Program) -> float | None:
        """The ratio this cell has to reach; None where the two are not compared."""
        if not ours.is_ours or peer.is_ours:
            return None
        if ours is Program.ENCRYPTED:
            return 1.0 if peer is Program.RESTIC else None
        if self in {RANDOM_COLD, DEEP_COLD} and peer is Program.BENJI:
            return COLD_BAR_BENJI
        return 1.0


_VIRTNBD = frozenset({Program.VIRTNBD})
_TOLD = frozenset({Program.OURS, Program.ENCRYPTED, Program.BENJI, Program.VIRTNBD})
"""Programs that can be told which blocks have changed."""

BACKUP_FULL = Cell("repository/backup-full", "backup, full", "MB/s")
BACKUP_SCAN = Cell(
    "repository/backup-scan",
    "backup after 2 % change, whole disk read",
    "MB/s",
    barring=_VIRTNBD,  # it has no such backup: without a bitmap it makes a full one
)
BACKUP_TOLD = Cell(
    "repository/backup-told", "backup after 2 % change, changes known", "MB/s", only=_TOLD
)
RESTORE = Cell("repository/restore", "restore", "MB/s")
RANDOM_COLD = Cell("repository/random-cold", "4 KiB random read, depth 1, cold", "IOPS")
DEEP_COLD = Cell("repository/random-cold-qd16", "4 KiB random read, depth 16, cold", "IOPS")
SEQUENTIAL_COLD = Cell("repository/sequential-cold", "256 KiB sequential read, cold", "MB/s")
SEQUENTIAL_WARM = Cell("repository/sequential-warm", "256 KiB sequential read, warm", "MB/s")
RANDOM_WARM = Cell("repository/random-warm", "4 KiB random read, depth 1, warm", "IOPS")
DEEP_WARM = Cell("repository/random-warm-qd16", "4 KiB random read, depth 16, warm", "IOPS")
SIZE_FULL = Cell("repository/size-full", "repository after the full backup", "MiB")
SIZE_CHANGED = Cell("repository/size-changed", "repository after both backups", "MiB")

CELLS = [
    BACKUP_FULL,
    BACKUP_SCAN,
    BACKUP_TOLD,
    RESTORE,
    RANDOM_COLD,
    DEEP_COLD,
    SEQUENTIAL_COLD,
    SEQUENTIAL_WARM,
    RANDOM_WARM,
    DEEP_WARM,
    SIZE_FULL,
    SIZE_CHANGED,
]


def select(pattern: str) -> list[Cell]:
    """The cells whose name contains the glob ``pattern``, in the table's order."""
    return [cell for cell in CELLS if fnmatchcase(cell.name, f"*{pattern}*")]
