"""The seam: what a program under test has to be able to do.

::

    directory/            a subject's own, fresh each round
      source/disk.raw     the disk of the moment, a hard link: the same path for every backup
      repository/         all it keeps, whose size is measured
      restored/           emptied before each restore

Nothing but ``backup``, ``backup_told`` and ``restore`` is on the clock.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import chill, size_of
from conformance.benchmark.repository.disk import Disks, State
from conformance.benchmark.repository.service import Target

__all__ = ["Restored", "Subject"]


@dataclass(frozen=True, slots=True)
class Restored:
    """How long a restore took, and what it made: an image in one of QEMU's formats."""

    seconds: float
    path: str
    form: str = "raw"


class Subject(ABC):
    """One program, its directory, and the disk it backs up."""

    program: Program

    def __init__(self, directory: str, disks: Disks) -> None:
        self.directory = directory
        self.disks = disks
        self.repository = os.path.join(directory, "repository")
        self.source = os.path.join(directory, "source", "disk.raw")
        for path in (self.repository, os.path.dirname(self.source)):
            os.makedirs(path)

    def attach(self, state: State) -> None:
        """Let ``source`` be the disk in this state."""
        if os.path.exists(self.source):
            os.unlink(self.source)
        os.link(state.raw, self.source)

    def inputs(self, state: State) -> Sequence[str]:
        """The images a backup of this state reads: they are warm before it."""
        return [state.raw]

    def empty_target(self) -> str:
        """An empty directory to restore into."""
        target = os.path.join(self.directory, "restored")
        shutil.rmtree(target, ignore_errors=True)
        os.makedirs(target)
        return target

    def chill(self) -> None:
        """Make everything the program has written cold; forget what its server has cached."""
        shutil.rmtree(os.path.join(self.directory, "restored"), ignore_errors=True)
        chill(self.repository)

    def stored_bytes(self) -> int:
        return size_of(self.repository)

    @classmethod
    @abstractmethod
    def unavailable(cls) -> str | None:
        """Why it cannot take part, or None."""

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def create(self) -> None:
        """Make an empty repository, and what the program needs first."""

    @abstractmethod
    def backup(self, state: State) -> float:
        """Back up ``source``, attached to ``state``; its seconds."""

    def backup_told(self, state: State) -> float:
        """Back up, reading only what is known to be new in ``state``; its seconds."""
        raise NotImplementedError

    @abstractmethod
    def restore(self, state: State) -> Restored:
        """Restore the point made of ``state`` into ``empty_target``."""

    @abstractmethod
    def serve(self, state: State) -> AbstractContextManager[Target]:
        """Serve the point made of ``state``."""
