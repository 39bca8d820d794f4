"""What a backup would do, disk by disk and repository by repository, without a byte being read.

::

    parents ── sources open ── per disk and repository: plan ── what the source says has changed

Nothing is begun in a repository: not even a lease is taken.
"""

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from nbdsrv.backup.engine import Order, SourceDisk
from nbdsrv.backup.parent import Parent, choose_parent
from nbdsrv.backup.plan import Mode, identity, plan_disk, wanted_contexts
from nbdsrv.backup.ranges import changed_ranges
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, NbdsrvError
from nbdsrv.repository.destination import Destination

__all__ = ["Preview", "preview"]


@dataclass(frozen=True, slots=True)
class Preview:
    """One disk in one repository.

    Attributes:
        repository: where.
        group: of the point that would be made.
        disk: its name.
        size: bytes.
        mode: ``full``, ``incremental`` or ``scan``; ``failed`` where there would be no point.
        reason: why.
        changed_bytes: of an incremental backup, in whole chunks; None where nothing tells.
    """

    repository: str
    group: str
    disk: str
    size: int
    mode: str
    reason: str
    changed_bytes: int | None = None


async def preview(
    destinations: Sequence[Destination],
    workers: Workers,
    order: Order,
    disks: Sequence[SourceDisk],
    choose: Callable[[Destination], Parent] | None = None,
) -> list[Preview]:
    """What ``Backup`` with the same arguments would do.

    Raises:
        DiskError: a source cannot be opened, or no repository can be asked.
    """
    names = [disk.name for disk in disks]
    chosen = choose or (lambda each: choose_parent(each, order.group, names, order.since))
    found: list[tuple[Destination, Parent | NbdsrvError]] = []
    for destination in destinations:
        try:
            found.append((destination, await workers.run(chosen, destination)))
        except NbdsrvError as error:
            found.append((destination, error))
    parents = [parent for _, parent in found if isinstance(parent, Parent)]
    if not parents:
        raise next(parent for _, parent in found if isinstance(parent, NbdsrvError))
    rows: list[Preview] = []
    async with AsyncExitStack() as stack:
        for disk in disks:
            contexts = wanted_contexts(order.changed, disk.name, parents)
            source = await stack.enter_async_context(disk.open(contexts))
            for destination, parent in found:
                rows.append(await _one(destination, parent, order, disk, source))
    return rows


async def _one(
    destination: Destination,
    parent: Parent | NbdsrvError,
    order: Order,
    disk: SourceDisk,
    source: Disk,
) -> Preview:
    name = destination.name
    if isinstance(parent, NbdsrvError):
        return Preview(name, order.group, disk.name, source.size, "failed", str(parent))
    point = identity(source, disk.source)
    plan = plan_disk(disk.name, parent, source, order.changed, point, disk.tracking)
    mode, reason, changed = plan.mode, plan.reason, None
    if mode is Mode.INCREMENTAL:
        try:
            ranges = await changed_ranges(source, plan.context, destination.granularity)
            changed = ranges.bytes
        except DiskError as error:
            mode, reason = Mode.SCAN, f"what changed cannot be read: {error}"
    return Preview(name, order.group, disk.name, source.size, str(mode), reason, changed)
