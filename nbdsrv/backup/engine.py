"""Backing up disks: each is read once, for all repositories it goes to.

::

    parents ── sources open ── begin ── per disk: plan ── a Tee with a branch for each repository
                                                             │
    [ meanwhile: clients read through the Tees ]             │ what is read is offered to all
                                                             │
    per disk: recheck ── read what is owed still ── each catches up ── wanted ──── commit

A source that cannot be read somewhere is no backup: everything is aborted and the error names the
offset. A repository that fails is dropped, and the others go on; one that is slow falls behind, is
waited for at the end only, and reads by itself what it has missed (``branch``, ``drive``).

Memory: for each repository and each of ``AT_ONCE`` disks a queue (``queue_size``), some pieces
that are being read, and what ``native.stock`` says.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from nbdsrv.backup.branch import Branch
from nbdsrv.backup.drive import Driver, queue_size
from nbdsrv.backup.owed import Owed
from nbdsrv.backup.parent import AUTO, Parent, choose_parent
from nbdsrv.backup.plan import Mode, Plan, Tracking, identity, plan_disk, wanted_contexts
from nbdsrv.backup.ranges import changed_ranges, steps, together, whole
from nbdsrv.backup.report import Failed, Report
from nbdsrv.backup.several import Together
from nbdsrv.backup.target import Part, Target
from nbdsrv.backup.tee import Tee
from nbdsrv.copying.progress import Advance
from nbdsrv.copying.reading import PIECE, WINDOW, Lender, read_piece
from nbdsrv.copying.survey import DataMap, survey
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.destination import DEFAULT_LEVEL, Destination, Occasion
from nbdsrv.ulid import ulid_at

__all__ = ["Backup", "Meanwhile", "Order", "SourceDisk"]

AT_ONCE = 2
"""Disks of a VM that are read at a time: one waits for its source while the other is compressed;
each has buffers of its own."""

Meanwhile = Callable[[Mapping[str, Tee]], Awaitable[None]]
"""Something that reads the disks, by name, for its own ends, before the rest is read."""


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """A disk that is to be backed up.

    Attributes:
        name: in the point.
        open: opens it, asking for the meta contexts given; read-only.
        source: as the user named it, if so.
        tracking: what the hypervisor says of it, if one has frozen it.
    """

    name: str
    open: Callable[[Sequence[str]], AbstractAsyncContextManager[Disk]]
    source: Source | None = None
    tracking: Tracking | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    Attributes:
        group: the VM's name.
        since: ``auto``, ``full`` or a point.
        changed: the meta context that tells what has changed, or "".
        recheck: percent of what is said to be unchanged that is read all the same.
        level: of compression.
        labels: of the point.
        consistency: of the disks' content, as in a ``PointRecord``.
        blobs: the VM's configuration, by name.
        created: seconds since 1970, of disks that are as they were then; None for now. Repositories
            of other tools date their points themselves.
    """

    group: str
    since: str = AUTO
    changed: str = ""
    recheck: float = 1.0
    level: int = DEFAULT_LEVEL
    labels: Mapping[str, str] = field(default_factory=dict)
    consistency: str = ""
    blobs: Mapping[str, str] = field(default_factory=dict)
    created: float | None = None


class Backup:
    """One backup. ``run`` it once.

    Attributes:
        targets: one for each repository.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        workers: Workers,
        order: Order,
        *,
        rate: Rate | None = None,
        advance: Advance | None = None,
        choose: Callable[[Destination], Parent] | None = None,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Back up into ``destinations``.

        Args:
            destinations: stay open.
            workers: threads.
            order: what is asked for.
            rate: at which sources are read, at most.
            advance: called with (bytes read, bytes to read) of the disks begun so far, often.
            choose: the point to build upon in a repository, in a thread; by the order's ``since``
                without it.
            confirm: called when all is read and nothing committed; what it raises aborts.
        """
        self.targets = [Target(destination) for destination in destinations]
        self._workers = workers
        self._order = order
        self._rate = rate
        self._advance = advance
        self._choose = choose
        self._confirm = confirm
        unit = max(target.destination.granularity for target in self.targets)
        self._piece = max(PIECE, unit)

    @property
    def _alive(self) -> list[Target]:
        return [target for target in self.targets if target.failure is None]

    async def run(self, disks: Sequence[SourceDisk], meanwhile: Meanwhile | None = None) -> Report:
        """Back up these disks as one point.

        Cancellation and errors leave no point anywhere, but where one is committed already.

        Args:
            disks: of one VM.
            meanwhile: reads them first; what it has read is not read again. Failing repositories
                do not end it.

        Raises:
            DiskError: a source cannot be read (it names the offset), or no repository is left.
        """
        try:
            async with AsyncExitStack() as stack:
                await self._choose_parents(disks)
                sources = [await stack.enter_async_context(self._opened(disk)) for disk in disks]
                await self._begin()
                async with asyncio.TaskGroup() as crew:
                    await self._back_up(disks, sources, crew, meanwhile)
                self._go_on()
                if self._confirm is not None:
                    await self._confirm()
                for target in self._alive:
                    await self._commit(target)
        except BaseException as error:
            raise _cause(error) from error
        finally:
            for target in self.targets:
                await target.abort()
        self._go_on()
        return self._report()

    def _go_on(self) -> None:
        """Raises the error of the last repository that was left."""
        failures = [target.failure for target in self.targets if target.failure is not None]
        if len(failures) == len(self.targets):
            if len(failures) == 1:
                raise failures[0]
            raise DiskError(f"no repository is left: {'; '.join(map(str, failures))}")

    async def _choose_parents(self, disks: Sequence[SourceDisk]) -> None:
        names, order = [disk.name for disk in disks], self._order
        choose = self._choose or (
            lambda destination: choose_parent(destination, order.group, names, order.since)
        )
        for target in self.targets:
            async with target.failing_alone():
                target.parent = await self._workers.run(choose, target.destination)
        self._go_on()

    def _opened(self, disk: SourceDisk) -> AbstractAsyncContextManager[Disk]:
        parents = [target.parent for target in self._alive]
        return disk.open(wanted_contexts(self._order.changed, disk.name, parents))

    async def _begin(self) -> None:
        order = self._order
        occasion = Occasion(
            order.group, order.level, dict(order.labels), order.consistency, dict(order.blobs)
        )
        for target in self._alive:
            async with target.failing_alone():
                target.writer = await target.destination.begin(
                    self._workers, occasion, target.parent.record
                )
        self._go_on()

    async def _commit(self, target: Target) -> None:
        async with target.failing_alone():
            assert target.writer is not None
            facts: dict[str, Any] = {
                "labels": dict(self._order.labels),
                "consistency": self._order.consistency,
                "blobs": dict(self._order.blobs),
            }
            if self._order.created is not None:
                created = max(self._order.created, 0.0)
                facts |= {"created": created, "id": ulid_at(created)}
            target.point = await target.writer.commit(facts)

    # --- the disks -----------------------------------------------------------------------------

    async def _back_up(
        self,
        disks: Sequence[SourceDisk],
        sources: Sequence[Disk],
        crew: asyncio.TaskGroup,
        meanwhile: Meanwhile | None,
    ) -> None:
        tees: dict[str, Tee] = {}
        for disk, source in zip(disks, sources, strict=True):
            self._go_on()
            tees[disk.name] = await self._tee(disk, source, crew)
        if meanwhile is not None:
            await meanwhile(tees)
        shown = Together(self._advance) if self._advance is not None else None
        turns = asyncio.Semaphore(AT_ONCE)

        async def finish(name: str) -> None:
            async with turns:
                self._go_on()
                await self._finish(name, tees[name], shown.part() if shown else None)

        async with asyncio.TaskGroup() as tasks:
            for disk in disks:
                tasks.create_task(finish(disk.name))

    async def _tee(self, disk: SourceDisk, source: Disk, crew: asyncio.TaskGroup) -> Tee:
        """Plan a disk; from now on what is read through its Tee reaches the repositories."""
        tee = Tee(self._workers, source)
        for target in self._alive:
            part = await self._part(target, disk, source)
            if part is not None:
                tee.branches.append(part.branch)
                crew.create_task(part.branch.run())
        return tee

    async def _finish(self, name: str, tee: Tee, advance: Advance | None) -> None:
        """See to it that each repository has all of a disk."""
        parts = [part for target in self.targets for part in target.parts if part.name == name]
        source = tee.source
        for part in parts:
            part.begin()
            if part.plan.mode is Mode.INCREMENTAL and part.branch.alive:
                await self._recheck(source, part)
        branches = [part.branch for part in parts]
        driver = Driver(source, branches, self._workers, rate=self._rate, advance=advance)
        await driver.run()
        async with asyncio.TaskGroup() as tasks:
            for part in parts:
                tasks.create_task(self._complete(driver, part))

    async def _complete(self, driver: Driver, part: Part) -> None:
        """One repository, by itself."""
        before = part.branch.given
        async with part.target.failing_alone():
            await driver.catch_up(part.branch)
            part.reread = part.branch.given - before
            while part.branch.alive and (wanted := await part.writer.wanted()):
                # What turned out to be missing on the way.
                told = together(part.writer.size, part.writer.granularity, [wanted])
                part.branch.owed = Owed(told, part.writer.granularity)
                await driver.catch_up(part.branch)
            part.end()
        part.branch.close()

    async def _part(self, target: Target, disk: SourceDisk, source: Disk) -> Part | None:
        """Begin a disk at one target; what must be told there?"""
        point = identity(source, disk.source)
        plan = plan_disk(
            disk.name, target.parent, source, self._order.changed, point, disk.tracking
        )
        changed = None
        if plan.mode is Mode.INCREMENTAL:
            try:
                unit = target.destination.granularity
                changed = await changed_ranges(source, plan.context, unit)
            except DiskError as error:
                plan = _scan_instead(plan.cbt, error)
        async with target.failing_alone():
            assert target.writer is not None
            writer = await target.writer.disk(disk.name, source.size)
            told = whole(source.size, writer.granularity)
            if changed is not None:
                wanted = await writer.wanted()
                told = together(source.size, writer.granularity, [changed.ranges(), wanted])
            branch = Branch(writer, told, target, queue=queue_size(self._piece))
            part = Part(target, writer, plan, told, branch)
            target.parts.append(part)
            return part
        return None

    async def _recheck(self, source: Disk, part: Part) -> None:
        """Read a sample of what is said to be unchanged."""
        chosen: list[tuple[int, int]] = []
        data = await _data_now(source, part.writer.granularity) if self._order.recheck else None
        async with part.target.failing_alone():
            chosen = await part.writer.sample(self._order.recheck, part.told, data)

        async def one(offset: int, length: int, buffer: bytearray) -> None:
            try:
                await read_piece(source, self._workers, offset, buffer, length, _nothing)
                await part.recheck(offset, buffer, length)
            finally:
                buffers.give_back(buffer)

        buffers = Lender(WINDOW, self._piece)
        ranges = together(source.size, part.writer.granularity, [chosen])
        async with asyncio.TaskGroup() as tasks:
            for offset, length, _ in steps(ranges, ranges, self._piece):
                buffer = await buffers.take()
                if self._rate is not None:
                    await self._rate.take(length)
                tasks.create_task(one(offset, length, buffer))
        if part.mismatches:
            part.distrust()

    # --- the end -------------------------------------------------------------------------------

    def _report(self) -> Report:
        report = Report()
        for target in self.targets:
            if target.point is None:
                assert target.failure is not None
                report.failed.append(Failed(target.destination.name, target.failure))
                continue
            for part in target.parts:
                report.disks.append(part.report(self._order.group, target.point.id))
        return report


async def _data_now(source: Disk, unit: int) -> DataMap | None:
    """Where a source has data, or None if it does not tell: then all of it seems to be data."""
    try:
        found = await survey(source, unit)
    except DiskError:
        return None
    return found if found.bytes < source.size else None


def _nothing() -> None:
    """What has been read is looked at elsewhere."""


def _scan_instead(cbt: dict[str, str] | None, error: DiskError) -> Plan:
    return Plan(Mode.SCAN, f"what changed cannot be read: {error}", cbt=cbt)


def _cause(error: BaseException) -> BaseException:
    """What went wrong first; a TaskGroup wraps it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
