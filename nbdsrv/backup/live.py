"""A running VM backed up: frozen at one moment, read by all repositories, then let go.

::

    turn        nobody else of this host is at this VM
    clean       what a crashed backup has left there
    history     which checkpoints have the repositories points of?
    freeze ─────────────────────────────────────────────────────────── since c1, this is c2
    Backup      every repository builds upon its point of c1, or scans
                still frozen? ───────────────────────────────────────── points of c2
    succeed     only now: c2 is in force ──────────────────────────────── c1 may go

======================== ========================= ==============================================
dies after               the hypervisor            the next backup builds upon
======================== ========================= ==============================================
freeze                   c1 in force again         c1: what everybody has
one commit of several    c1 in force again         c1: who has c2 has the point of c1 as well
all commits              c1, or c2 if it was kept  whichever of the two the hypervisor has
succeed                  c2                        c2
a repository failed      c2, and c1 is kept        c1 while that one has no later; else it scans
======================== ========================= ==============================================

Rule: what a repository says it has is what counts. Nothing is remembered elsewhere, so nothing can
disagree with it.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from nbdsrv.backup.checkpoints import (
    History,
    known_checkpoints,
    needed_checkpoints,
    parent_at,
    read_history,
)
from nbdsrv.backup.engine import Backup, Meanwhile, Order, SourceDisk
from nbdsrv.backup.parent import Parent
from nbdsrv.backup.plan import Tracking
from nbdsrv.backup.preview import Preview, preview
from nbdsrv.backup.report import Report
from nbdsrv.copying.progress import Advance
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.insist import insist
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import NbdsrvError
from nbdsrv.repository.destination import Destination
from nbdsrv.source.hypervisor import Frozen, FrozenDisk, SourceError
from nbdsrv.source.opening import Machine, open_frozen
from nbdsrv.source.turn import turn

__all__ = ["LiveBackup", "LiveReport"]


@dataclass(slots=True)
class LiveReport:
    """What was done with one VM.

    Attributes:
        vm: its name.
        report: what was stored.
        previews: what would be stored, of a dry run.
        cleaned: what a crashed backup had left, one line each.
        warnings: what went wrong though everything is stored.
    """

    vm: str
    report: Report = field(default_factory=Report)
    previews: Sequence[Preview] = ()
    cleaned: Sequence[str] = ()
    warnings: list[str] = field(default_factory=list)


class LiveBackup:
    """Backs up VMs into the same repositories. Several may be under way at once."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        workers: Workers,
        order: Order,
        *,
        rate: Rate | None = None,
        budget: int = 0,
        dry_run: bool = False,
        absent: bool = False,
    ) -> None:
        """Back up into ``destinations``.

        Args:
            destinations: stay open.
            workers: threads.
            order: what is asked for; without a ``group`` it is the VM's name.
            rate: at which all VMs together are read, at most.
            budget: connections to one NBD server at most, of all disks together; 0: no limit.
            dry_run: freeze and thaw, and only say what would be read.
            absent: are there others that could not be opened? They have failed as well, and will
                want the checkpoint they have a point of.
        """
        self._destinations = destinations
        self._workers = workers
        self._order = order
        self._rate = rate
        self._budget = budget
        self._dry_run = dry_run
        self._absent = absent
        self._groups: dict[str, str] = {}

    async def run(
        self,
        machine: Machine,
        advance: Advance | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> LiveReport:
        """Back up one VM as one point.

        Cancellation and errors leave the old checkpoint in force.

        Args:
            machine: the VM.
            advance: called with (bytes read, bytes to read) of the disk under way, often.
            meanwhile: reads the frozen disks first, as for ``Backup.run``.

        Raises:
            SourceError: it cannot be frozen.
            DiskError: a disk cannot be read, or no repository is left.
        """
        vm, done = machine.place, None
        try:
            with turn(machine.place):
                vm = await machine.hypervisor.vm()
                self._claim(self._order.group or vm, machine)
                cleaned = await machine.hypervisor.clean()
                work = _Work(
                    self._destinations, replace(self._order, group=self._order.group or vm)
                )
                await work.read_histories(self._workers)
                known = known_checkpoints(work.histories, machine.kind)
                async with machine.hypervisor.freeze(known, machine.disks) as frozen:
                    if self._dry_run:
                        previews = await self._preview(work, machine, frozen)
                        return LiveReport(vm, previews=previews, cleaned=cleaned)
                    report = await self._store(work, machine, frozen, advance, meanwhile)
                    done = LiveReport(vm, report, cleaned=cleaned)
                    lacking = self._absent or report.failed
                    needed = needed_checkpoints(known) if lacking else []
                    await _finished(partial(frozen.succeed, needed), frozen.hurry)
        except SourceError as error:
            if done is None:
                raise
            # The points are good; what could not be done at the hypervisor costs the next a scan.
            done.warnings.append(f"{vm}: {error}")
        return done

    def _claim(self, group: str, machine: Machine) -> None:
        other = self._groups.setdefault(group, machine.place)
        if other != machine.place:
            text = f"{machine.place} is named {group!r}, as {other} is"
            raise SourceError(f"{text}; give each a --group, in commands of their own")

    async def _store(
        self,
        work: "_Work",
        machine: Machine,
        frozen: Frozen,
        advance: Advance | None,
        meanwhile: Meanwhile | None,
    ) -> Report:
        backup = Backup(
            self._destinations,
            self._workers,
            replace(work.order, consistency=frozen.consistency, blobs=_blobs(frozen)),
            rate=self._rate,
            advance=advance,
            choose=work.choice(machine.kind, frozen),
            confirm=frozen.still_frozen,
        )
        return await backup.run(self._disks(machine, frozen), meanwhile)

    async def _preview(self, work: "_Work", machine: Machine, frozen: Frozen) -> Sequence[Preview]:
        choose = work.choice(machine.kind, frozen)
        disks = self._disks(machine, frozen)
        return await preview(self._destinations, self._workers, work.order, disks, choose)

    def _disks(self, machine: Machine, frozen: Frozen) -> list[SourceDisk]:
        if not frozen.disks:
            raise SourceError(f"{frozen.vm}: has no disk that can be backed up")
        return [
            SourceDisk(disk.name, self._opener(disk), tracking=_tracking(machine.kind, disk))
            for disk in frozen.disks
        ]

    def _opener(
        self, disk: FrozenDisk
    ) -> Callable[[Sequence[str]], AbstractAsyncContextManager[Disk]]:
        return partial(open_frozen, disk, self._workers, budget=self._budget)


class _Work:
    """What the repositories have of one VM.

    Attributes:
        order: with the VM's group.
        histories: of the repositories that could tell.
    """

    def __init__(self, destinations: Sequence[Destination], order: Order) -> None:
        self.order = order
        self._destinations = destinations
        self._found: dict[int, History | NbdsrvError] = {}

    @property
    def histories(self) -> list[History]:
        return [each for each in self._found.values() if isinstance(each, History)]

    async def read_histories(self, workers: Workers) -> None:
        """Ask all repositories; nothing is frozen if none can tell."""
        order = self.order
        for each in self._destinations:
            try:
                history = await workers.run(read_history, each, order.group, order.since)
                self._found[id(each)] = history
            except NbdsrvError as error:
                self._found[id(each)] = error
        errors = [each for each in self._found.values() if isinstance(each, NbdsrvError)]
        if len(errors) == len(self._found):
            raise errors[0]

    def choice(self, kind: str, frozen: Frozen) -> Callable[[Destination], Parent]:
        """Which point a repository builds upon, for the engine."""
        since = {disk.name: disk.since for disk in frozen.disks}

        def choose(destination: Destination) -> Parent:
            history = self._found[id(destination)]
            if isinstance(history, NbdsrvError):
                raise history
            return parent_at(history, kind, since)

        return choose


def _tracking(kind: str, disk: FrozenDisk) -> Tracking:
    return Tracking(kind, disk.context, disk.since, disk.checkpoint, disk.reason)


def _blobs(frozen: Frozen) -> dict[str, str]:
    """The VM's configuration as texts."""
    blobs = {name: _text(value) for name, value in frozen.facts.items()}
    disks = {disk.name: dict(disk.facts) for disk in frozen.disks if disk.facts}
    if disks:
        blobs.setdefault("disks.json", _text(disks))
    return blobs


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


async def _finished(
    work: Callable[[], Coroutine[Any, Any, None]], hurry: Callable[[], None]
) -> None:
    """Once begun it is finished: half of an advance is of no use to anybody."""
    task = asyncio.ensure_future(work())
    try:
        await insist(task, hurry=hurry)
    except asyncio.CancelledError:
        task.result()  # what has gone wrong in it counts for more
        raise
