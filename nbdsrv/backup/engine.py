"""Backing up disks: each is read once, for all repositories it goes to.

::

    source ── told ranges ── holes ───────────────────────────> zero ──┐
                        └── data ── pieces, several at a time ─────────┴─> Part ─> repository A
                                    one buffer, looked at by all        └> Part ─> repository B

    parents ── sources open ── begin ── per disk: plan, recheck, tell, what is wanted ── commit

A source that cannot be read somewhere is no backup: everything is aborted and the error names the
offset. A repository that fails is dropped, and the others go on.

Memory: ``BUFFERS`` pieces of at least 2 MiB, and what ``native.stock`` says for each repository.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field

from nbdsrv.backup.parent import AUTO, choose_parent
from nbdsrv.backup.plan import Mode, Plan, identity, plan_disk, wanted_contexts
from nbdsrv.backup.ranges import changed_ranges, data_within, steps, together
from nbdsrv.backup.report import Failed, Report
from nbdsrv.backup.target import Part, Target
from nbdsrv.copying.progress import Advance
from nbdsrv.copying.reading import PIECE, WINDOW, Lender, read_piece
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.grammar import Source
from nbdsrv.repository.native.sealing import DEFAULT_LEVEL
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.writer import begin

__all__ = ["Backup", "Order", "SourceDisk"]

BUFFERS = WINDOW + 2
"""Pieces under way: two may wait for their packs to be put while the others are worked on."""


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """A disk that is to be backed up.

    Attributes:
        name: in the point.
        open: opens it, asking for the meta contexts given; read-only.
        source: as the user named it, if so.
    """

    name: str
    open: Callable[[Sequence[str]], AbstractAsyncContextManager[Disk]]
    source: Source | None = None


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
    """

    group: str
    since: str = AUTO
    changed: str = ""
    recheck: float = 1.0
    level: int = DEFAULT_LEVEL
    labels: Mapping[str, str] = field(default_factory=dict)


class Backup:
    """One backup. ``run`` it once.

    Attributes:
        targets: one for each repository.
    """

    def __init__(
        self,
        vaults: Sequence[Vault],
        workers: Workers,
        order: Order,
        *,
        rate: Rate | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Back up into ``vaults``.

        Args:
            vaults: stay open.
            workers: threads.
            order: what is asked for.
            rate: at which sources are read, at most.
            advance: called with (bytes read, bytes to read) of the disk under way, often.
        """
        self.targets = [Target(vault) for vault in vaults]
        self._workers = workers
        self._order = order
        self._rate = rate
        self._advance = advance
        unit = max(target.vault.config.chunk_size for target in self.targets)
        self._piece = max(PIECE, unit)
        self._buffers = Lender(BUFFERS, self._piece)

    @property
    def _alive(self) -> list[Target]:
        return [target for target in self.targets if target.failure is None]

    async def run(self, disks: Sequence[SourceDisk]) -> Report:
        """Back up these disks as one point.

        Cancellation and errors leave no point anywhere, but where one is committed already.

        Raises:
            DiskError: a source cannot be read (it names the offset), or no repository is left.
        """
        try:
            async with AsyncExitStack() as stack:
                await self._choose_parents(disks)
                sources = [await stack.enter_async_context(self._opened(disk)) for disk in disks]
                await self._begin()
                for disk, source in zip(disks, sources, strict=True):
                    self._go_on()
                    await self._back_up(disk, source)
                self._go_on()
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
        names = [disk.name for disk in disks]
        for target in self.targets:
            async with target.failing_alone():
                target.parent = await self._workers.run(
                    choose_parent, target.vault, self._order.group, names, self._order.since
                )
        self._go_on()

    def _opened(self, disk: SourceDisk) -> AbstractAsyncContextManager[Disk]:
        parents = [target.parent for target in self._alive]
        return disk.open(wanted_contexts(self._order.changed, disk.name, parents))

    async def _begin(self) -> None:
        order = self._order
        for target in self._alive:
            async with target.failing_alone():
                target.writer = await begin(
                    target.vault,
                    self._workers,
                    order.group,
                    target.parent.record,
                    level=order.level,
                )
        self._go_on()

    async def _commit(self, target: Target) -> None:
        async with target.failing_alone():
            assert target.writer is not None
            target.record = await target.writer.commit_record({"labels": dict(self._order.labels)})

    # --- one disk ------------------------------------------------------------------------------

    async def _back_up(self, disk: SourceDisk, source: Disk) -> None:
        parts = [part for target in self._alive if (part := await self._part(target, disk, source))]
        for part in parts:
            if part.plan.mode is Mode.INCREMENTAL:
                await self._recheck(source, part)
        await self._tell(source, parts)
        for part in parts:
            await self._tell_wanted(source, part)
            part.end()

    async def _part(self, target: Target, disk: SourceDisk, source: Disk) -> Part | None:
        """Begin a disk at one target; what must be told there?"""
        point = identity(source, disk.source)
        plan = plan_disk(disk.name, target.parent, source, self._order.changed, point)
        changed = None
        if plan.mode is Mode.INCREMENTAL:
            try:
                unit = target.vault.config.chunk_size
                changed = await changed_ranges(source, plan.context, unit)
            except DiskError as error:
                plan = _scan_instead(plan.cbt, error)
        async with target.failing_alone():
            assert target.writer is not None
            writer = await target.writer.disk(disk.name, source.size)
            part = Part(target, writer, plan)
            if changed is not None:
                wanted = await writer.wanted()
                part.told = together(source.size, writer.granularity, [changed.ranges(), wanted])
            target.parts.append(part)
            return part
        return None

    async def _recheck(self, source: Disk, part: Part) -> None:
        """Read a sample of what is said to be unchanged."""
        chosen: list[tuple[int, int]] = []
        async with part.target.failing_alone():
            chosen = await part.writer.sample(self._order.recheck, part.told)

        async def one(offset: int, length: int, buffer: bytearray) -> None:
            try:
                await read_piece(source, self._workers, offset, buffer, length, _nothing)
                await part.recheck(offset, buffer, length)
            finally:
                self._buffers.give_back(buffer)

        ranges = together(source.size, part.writer.granularity, [chosen])
        async with asyncio.TaskGroup() as tasks:
            for offset, length, _ in steps(ranges, ranges, self._piece):
                buffer = await self._buffers.take()
                await self._pace(length)
                tasks.create_task(one(offset, length, buffer))
        if part.mismatches:
            part.distrust()

    async def _tell_wanted(self, source: Disk, part: Part) -> None:
        """What turned out to be missing on the way."""
        while part.target.failure is None:
            wanted: list[tuple[int, int]] = []
            async with part.target.failing_alone():
                wanted = await part.writer.wanted()
            if not wanted:
                return
            part.told = together(source.size, part.writer.granularity, [wanted])
            await self._tell(source, [part])

    async def _tell(self, source: Disk, parts: Sequence[Part]) -> None:
        """Read what must be told, once for all."""
        if not parts:
            return
        unit = max(part.writer.granularity for part in parts)
        told = together(source.size, unit, [part.told.ranges() for part in parts])
        data = await data_within(source, told)
        moved = _Moved(data.bytes, self._advance)
        async with asyncio.TaskGroup() as tasks:
            for offset, length, is_data in steps(told, data, self._piece):
                if not self._alive:
                    return
                if is_data:
                    buffer = await self._buffers.take()
                    await self._pace(length)
                    work = self._move(source, parts, offset, length, buffer, moved)
                    tasks.create_task(work)
                else:
                    for part in parts:
                        await part.zero(offset, length)

    async def _move(
        self,
        source: Disk,
        parts: Sequence[Part],
        offset: int,
        length: int,
        buffer: bytearray,
        moved: "_Moved",
    ) -> None:
        try:
            await read_piece(source, self._workers, offset, buffer, length, _nothing)
            if len(parts) == 1:
                await parts[0].data(offset, buffer, length)
            else:
                async with asyncio.TaskGroup() as tasks:  # all have done with it at its end
                    for part in parts:
                        tasks.create_task(part.data(offset, buffer, length))
        finally:
            self._buffers.give_back(buffer)
        moved.add(length)

    async def _pace(self, length: int) -> None:
        if self._rate is not None:
            await self._rate.take(length)

    # --- the end -------------------------------------------------------------------------------

    def _report(self) -> Report:
        report = Report()
        for target in self.targets:
            if target.record is None:
                assert target.failure is not None
                report.failed.append(Failed(target.vault.name, target.failure))
                continue
            for part in target.parts:
                report.disks.append(part.report(self._order.group, target.record.id))
        return report


class _Moved:
    """How far the reading of a disk has come."""

    def __init__(self, total: int, advance: Advance | None) -> None:
        self._done, self._total, self._advance = 0, total, advance

    def add(self, length: int) -> None:
        self._done += length
        if self._advance is not None:
            self._advance(self._done, self._total)


def _nothing() -> None:
    """What has been read is looked at elsewhere."""


def _scan_instead(cbt: dict[str, str] | None, error: DiskError) -> Plan:
    return Plan(Mode.SCAN, f"what changed cannot be read: {error}", cbt=cbt)


def _cause(error: BaseException) -> BaseException:
    """What went wrong first; a TaskGroup wraps it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
