"""What ``nbdsrv backup`` does once its words are understood.

::

    Job ── repositories opened ─┬─ disks ────── Backup ─────────────────> one point
                                └─ VM, VM, VM ─ LiveBackup, some at once > a point each
                                                                            │
                                     what there is to tell, and exit code <─┘ Outcome
"""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from nbdsrv.backup.engine import Backup, Order, SourceDisk
from nbdsrv.backup.live import LiveBackup, LiveReport
from nbdsrv.backup.preview import Preview, preview
from nbdsrv.backup.report import Failed, Report
from nbdsrv.backup.several import Together, for_each
from nbdsrv.cli.running import running_workers
from nbdsrv.cli.stopping import run
from nbdsrv.copying.progress import Advance, progress
from nbdsrv.disk.throttle import Rate
from nbdsrv.errors import ConfigError, DiskError, NbdsrvError
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.ops.jobs import registered

if TYPE_CHECKING:
    from nbdsrv.disk.disk import Disk
    from nbdsrv.disk.workers import Workers
    from nbdsrv.repository.destination import Destination, Storage
    from nbdsrv.source.opening import Machine

__all__ = ["Job", "Outcome", "back_up", "opened_destinations"]

FAILED = 1
DEGRADED = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asked for.

    Attributes:
        disks: of one VM, by name; or none, and:
        machines: running VMs, each as the SOURCEs that name its disks.
        repositories: to be filled.
        storage: how repositories of other tools store it.
        order: as for ``Backup``; for VMs without a group, unless it was given.
        rate: bytes a second, or None.
        jobs: VMs at once.
        budget: connections to one NBD server, or 0.
    """

    disks: dict[str, Source]
    machines: Sequence[Sequence[Source]]
    repositories: Sequence[Source]
    storage: "Storage"
    order: Order
    rate: int | None
    jobs: int
    budget: int
    dry_run: bool
    quiet: bool


@dataclass(slots=True)
class Outcome:
    """What there is to tell.

    Attributes:
        report: what was stored, of all VMs.
        previews: what would be, of a dry run.
        cleaned: what crashed backups had left at hypervisors.
        warnings: what went wrong though everything is stored.
        failed: VMs without a point, as the user named them, and why.
    """

    report: Report = field(default_factory=Report)
    previews: list[Preview] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failed: list[tuple[str, NbdsrvError]] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Of the process."""
        if self.failed and not self.report.disks and not self.previews:
            return FAILED
        mismatched = any(disk.recheck_mismatches for disk in self.report.disks)
        unlike = any(each.mode == "failed" for each in self.previews)
        bad = self.failed or self.report.failed or self.warnings
        return DEGRADED if bad or mismatched or unlike else 0


def back_up(job: Job) -> Outcome:
    """Do it; signals to stop end it cleanly.

    Raises:
        NbdsrvError: no point was made.
        Stopped: likewise.
    """
    left = "no restore point was made"
    if len(job.machines) > 1:
        left = "VMs that were not finished have no new restore point"
    return run(_back_up(job), left)


async def _back_up(job: Job) -> Outcome:
    async with running_workers() as workers:
        with ExitStack() as stack:
            opened, failed = opened_destinations(job.repositories, stack, job.storage)
            with (
                registered(_title(job)) as registration,
                progress(_title(job), quiet=job.quiet) as shown,
            ):
                advance = registration.also(shown)
                destinations = [destination for destination, _ in opened]
                work = _live if job.machines else _still
                outcome = await work(job, destinations, workers, advance)
    # As the user named them: what is printed can be used again.
    texts = {destination.name: source.text for destination, source in opened}
    report = outcome.report
    report.disks = [dataclasses.replace(d, repository=texts[d.repository]) for d in report.disks]
    report.failed = [dataclasses.replace(f, repository=texts[f.repository]) for f in report.failed]
    report.failed += failed
    outcome.previews = [
        dataclasses.replace(each, repository=texts[each.repository]) for each in outcome.previews
    ]
    return outcome


def _title(job: Job) -> str:
    return f"{len(job.machines)} VMs" if len(job.machines) > 1 else job.order.group or "VM"


# --- repositories ---------------------------------------------------------------------------------


def opened_destinations(
    sources: Sequence[Source], stack: ExitStack, storage: "Storage"
) -> "tuple[list[tuple[Destination, Source]], list[Failed]]":
    """Those that can be opened, if any; one that is away does not keep the others from theirs.

    Blocking: nothing else runs yet.
    """
    from nbdsrv.repository.opening import open_destination

    opened: list[tuple[Destination, Source]] = []
    failed: list[Failed] = []
    for source in sources:
        try:
            destination = open_destination(source, storage)
        except DiskError as error:
            failed.append(Failed(source.text, error))
            continue
        stack.callback(destination.close)
        if any(destination.place == other.place for other, _ in opened):
            raise ConfigError(f"{destination.name}: --to names this repository twice")
        opened.append((destination, source))
    if not opened:
        raise failed[0].error
    return opened, failed


# --- disks ----------------------------------------------------------------------------------------


async def _still(
    job: Job, targets: "Sequence[Destination]", workers: "Workers", advance: Advance | None
) -> Outcome:
    disks = [
        SourceDisk(name, partial(_opened, source, workers, job.budget), source)
        for name, source in job.disks.items()
    ]
    if job.dry_run:
        return Outcome(previews=await preview(targets, workers, job.order, disks))
    work = Backup(targets, workers, job.order, rate=_rate(job), advance=advance)
    return Outcome(report=await work.run(disks))


@asynccontextmanager
async def _opened(
    source: Source, workers: "Workers", budget: int, contexts: Sequence[str]
) -> "AsyncIterator[Disk]":
    """A source; an NBD server is asked for these meta contexts too."""
    if source.kind is Kind.NBD and source.partition is None:
        from nbdsrv.source.nbd import open_nbd
        from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

        wanted = (ALLOCATION, ALLOCATION_DEPTH, *contexts)
        disk: Disk = await open_nbd(
            source.location, workers, contexts=wanted, host_connections=budget
        )
    else:
        from nbdsrv.export.opener import open_source

        disk = await open_source(source, workers)
    try:
        yield disk
    finally:
        await disk.close()


def _rate(job: Job) -> Rate | None:
    return Rate(job.rate) if job.rate else None


# --- running VMs ----------------------------------------------------------------------------------


async def _live(
    job: Job, targets: "Sequence[Destination]", workers: "Workers", advance: Advance | None
) -> Outcome:
    from nbdsrv.source.opening import open_hypervisor

    machines = [open_hypervisor(sources, workers) for sources in job.machines]
    work = LiveBackup(
        targets,
        workers,
        job.order,
        rate=_rate(job),
        budget=job.budget,
        dry_run=job.dry_run,
        absent=len(targets) < len(job.repositories),
    )
    together = Together(advance) if advance is not None else None

    async def one(machine: "Machine") -> LiveReport:
        return await work.run(machine, together.part() if together is not None else None)

    outcome = Outcome()
    for machine, done in zip(machines, await for_each(machines, job.jobs, one), strict=True):
        if isinstance(done, NbdsrvError):
            if len(machines) == 1:
                raise done
            outcome.failed.append((machine.place, done))
            continue
        outcome.report.disks += done.report.disks
        outcome.report.failed += done.report.failed
        outcome.previews += done.previews
        outcome.cleaned += [
            f"{done.vm}: removed what a backup had left: {it}" for it in done.cleaned
        ]
        outcome.warnings += done.warnings
    return outcome
