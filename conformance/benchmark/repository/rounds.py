"""The interleaving: rounds, then steps, then programs in rotating order.

::

    a round, all repositories new and empty
      1  full backup of the disk                      each program, one right after the other
      2  backup of the disk with 2 % changed          the same; sizes after both
      3  restore of that point, compared              the same
      4  reads of that point                          the same; each program all of its loads:
           cold:  its files out of the page cache, a fresh server, few random reads
           cold:  the same again, 16 of them at a time
           cold:  the same again, one pass from end to end
           warm:  the same server, the pass again, then random reads
      5  backup of another 2 %, told where they are   those that can; who can do no other
                                                      backup of changes has done this in step 2

Sources are in the page cache. A program that fails in a step is noted and left out of the rest of
the round.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

from conformance.benchmark import image
from conformance.benchmark.report import BenchmarkError, Report, RepositorySample
from conformance.benchmark.repository import cells as the
from conformance.benchmark.repository.benji import Benji
from conformance.benchmark.repository.borg import Borg
from conformance.benchmark.repository.cells import Cell, Program
from conformance.benchmark.repository.command import run
from conformance.benchmark.repository.disk import PIECE, Disks, State, make_disks
from conformance.benchmark.repository.ours import Encrypted, Ours
from conformance.benchmark.repository.qemu_img import QemuImg
from conformance.benchmark.repository.reading import Load, read
from conformance.benchmark.repository.restic import Restic
from conformance.benchmark.repository.subject import Subject
from conformance.benchmark.repository.virtnbdbackup import VirtNbdBackup

__all__ = ["run_repository"]

SUBJECTS: tuple[type[Subject], ...] = (
    *(Ours, Encrypted, Benji, Restic, Borg, QemuImg, VirtNbdBackup),
)
MEGA = 1e6
SPARE = 7
"""Disk space needed, in sizes of the disk: six images of nearly half of it, eight repositories of
a quarter or half, Benji's block cache, a restored image."""
PASS_LIMIT_S = 30.0
"""Of a pass from end to end; the rate of a slower one is that of its beginning."""
COLD_READS, COLD_READS_LEAST = 16 << 20, 64
"""One cold random read for so many bytes of disk: few enough that most of them meet a block of
4 MiB, the largest of any program here, that none has met before."""

Progress = Callable[[str], None]


class Round:
    """One round: its programs, and where its numbers go."""

    def __init__(
        self,
        turn: int,
        disks: Disks,
        subjects: Sequence[Subject],
        cells: Sequence[Cell],
        report: Report,
        progress: Progress,
        seconds: float,
    ) -> None:
        self.turn = turn
        self.disks = disks
        self.subjects = list(subjects)
        self.cells = cells
        self.report = report
        self.progress = progress
        self.seconds = seconds

    def run(self) -> None:
        """All steps of which a cell is wanted, and those they need."""
        self._step("create", lambda subject: subject.create())
        self._step("full", self._full)
        self._step("changed", self._changed)
        if the.RESTORE in self.cells:
            self._step("restore", self._restore)
        if self._wanted(the.RANDOM_COLD, the.DEEP_COLD):
            self._step("cold random reads", self._cold_random)
        if self._wanted(the.SEQUENTIAL_COLD, the.SEQUENTIAL_WARM, the.RANDOM_WARM, the.DEEP_WARM):
            self._step("reads", self._reads)
        if the.BACKUP_TOLD in self.cells:
            self._step("told", self._told)

    def _wanted(self, *cells: Cell) -> bool:
        return any(cell in self.cells for cell in cells)

    def _step(self, title: str, action: Callable[[Subject], None]) -> None:
        first = self.turn % max(len(self.subjects), 1)
        for subject in [*self.subjects[first:], *self.subjects[:first]]:
            try:
                action(subject)
            except BenchmarkError as error:
                where = f"{subject.program}, {title}, round {self.turn + 1}"
                self.report.failures.append(f"{where}: {error}")
                self.subjects.remove(subject)

    def _full(self, subject: Subject) -> None:
        self._backed_up(subject, the.BACKUP_FULL, self.disks.base, subject.backup)
        self._note(the.SIZE_FULL, subject, subject.stored_bytes() / 2**20)

    def _changed(self, subject: Subject) -> None:
        state = self.disks.changed
        if the.BACKUP_SCAN.takes(subject.program):
            self._backed_up(subject, the.BACKUP_SCAN, state, subject.backup)
        else:
            self._backed_up(subject, the.BACKUP_TOLD, state, subject.backup_told)
        self._note(the.SIZE_CHANGED, subject, subject.stored_bytes() / 2**20)

    def _told(self, subject: Subject) -> None:
        program = subject.program
        if the.BACKUP_SCAN.takes(program) and the.BACKUP_TOLD.takes(program):
            state = self.disks.again
            self._backed_up(subject, the.BACKUP_TOLD, state, subject.backup_told)

    def _backed_up(
        self, subject: Subject, cell: Cell, state: State, backup: Callable[[State], float]
    ) -> None:
        subject.attach(state)
        for path in subject.inputs(state):
            image.warm(path)
        self._note(cell, subject, self.disks.size / backup(state) / MEGA)

    def _restore(self, subject: Subject) -> None:
        state = self.disks.changed
        restored = subject.restore(state)
        compare = ["qemu-img", "compare", "-f", restored.form, "-F", "raw"]
        run([*compare, restored.path, state.raw])
        self._note(the.RESTORE, subject, self.disks.size / restored.seconds / MEGA)
        shutil.rmtree(os.path.dirname(restored.path))

    def _cold_random(self, subject: Subject) -> None:
        size = self.disks.size
        count = max(size // COLD_READS, COLD_READS_LEAST)
        for cell, depth in ((the.RANDOM_COLD, 1), (the.DEEP_COLD, 16)):
            load = Load("randread", "4k", depth, PASS_LIMIT_S, amount=count * 4096)
            subject.chill()
            with subject.serve(self.disks.changed) as target:
                self._note(cell, subject, read(target, load, size).iops)

    def _reads(self, subject: Subject) -> None:
        size = self.disks.size
        whole = Load("read", "256k", 8, PASS_LIMIT_S, amount=size)
        subject.chill()
        with subject.serve(self.disks.changed) as target:
            self._note(the.SEQUENTIAL_COLD, subject, read(target, whole, size).rate)
            self._note(the.SEQUENTIAL_WARM, subject, read(target, whole, size).rate)
            for cell, depth in ((the.RANDOM_WARM, 1), (the.DEEP_WARM, 16)):
                load = Load("randread", "4k", depth, self.seconds)
                self._note(cell, subject, read(target, load, size).iops)

    def _note(self, cell: Cell, subject: Subject, value: float) -> None:
        if cell in self.cells:
            sample = RepositorySample(cell.name, subject.program, self.turn + 1, value)
            self.report.repository.append(sample)
            where = f"round {self.turn + 1} {cell.name} {subject.program}"
            self.progress(f"{where}: {value:,.1f} {cell.unit}")


def run_repository(
    cells: Sequence[Cell],
    programs: Sequence[Program],
    cache: str,
    size: int,
    report: Report,
    progress: Progress,
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Measure all cells, adding samples; who is not there, or fails, is noted."""
    kinds = []
    for kind in SUBJECTS:
        if kind.program in programs:
            why = kind.unavailable()
            if why is None:
                kinds.append(kind)
            else:
                report.failures.append(f"{kind.program}: {why}")
    try:
        image.require_space(cache, SPARE * size)
        disks = make_disks(cache, size)
    except BenchmarkError as error:
        report.failures.append(f"repositories: {error}")
        return
    changed = len(disks.changed.changed) * PIECE >> 20
    report.environment["disk backed up"] = f"{size >> 20} MiB, {changed} MiB changed, twice"
    for turn in range(rounds):
        with _subjects(kinds, cache, disks) as subjects:
            if not turn:
                report.environment.update({s.program.value: s.version() for s in subjects})
            Round(turn, disks, subjects, cells, report, progress, seconds).run()


@contextlib.contextmanager
def _subjects(
    kinds: Sequence[type[Subject]], cache: str, disks: Disks
) -> Iterator[Sequence[Subject]]:
    # Beside the images: a hard link gives every program the same path for each state.
    with tempfile.TemporaryDirectory(prefix="repository-", dir=cache) as scratch:
        yield [kind(os.path.join(scratch, kind.program), disks) for kind in kinds]
