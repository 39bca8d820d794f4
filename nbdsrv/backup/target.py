"""One repository a backup goes to, and one disk there.

::

    Tee ── Branch ──> Target A · Part "sda" ── its own chunks, its own parent ──> point
      └─── Branch ──> Target B · Part "sda" ── ENOSPC: dropped, A goes on

Rule: what goes wrong in a repository is that repository's failure. Nothing here raises for it; a
failed target takes nothing more.
"""

import time

from nbdsrv.backup.branch import Branch, FailsAlone
from nbdsrv.backup.parent import Parent
from nbdsrv.backup.plan import Mode, Plan
from nbdsrv.backup.ranges import whole
from nbdsrv.backup.report import DiskReport
from nbdsrv.copying.survey import DataMap
from nbdsrv.repository.destination import Destination
from nbdsrv.repository.repository import DiskWriter, Point, PointWriter

__all__ = ["Part", "Target"]


class Target(FailsAlone):
    """One repository.

    Attributes:
        destination: it.
        parent: the point that is built upon.
        writer: of the new point, once it is begun.
        parts: the disks, in their order.
        failure: why there will be no point, or None.
        point: it, once it is committed.
    """

    def __init__(self, destination: Destination) -> None:
        super().__init__()
        self.destination = destination
        self.parent = Parent(None)
        self.writer: PointWriter | None = None
        self.parts: list[Part] = []
        self.point: Point | None = None

    async def abort(self) -> None:
        """Nothing more is stored; nothing after a commit."""
        if self.writer is not None:
            async with self.failing_alone():
                await self.writer.abort()


class Part:
    """One disk at one target.

    Attributes:
        target: whose.
        writer: of the disk.
        plan: what is done, and why.
        told: the ranges that must be told.
        branch: tells them.
        rechecked: bytes read though said to be unchanged.
        mismatches: chunks of these that were not.
        reread: bytes read for this repository alone, which had fallen behind.
    """

    def __init__(
        self, target: Target, writer: DiskWriter, plan: Plan, told: DataMap, branch: Branch
    ) -> None:
        self.target = target
        self.writer = writer
        self.plan = plan
        self.told = told
        self.branch = branch
        self.rechecked = 0
        self.mismatches = 0
        self.reread = 0
        self._began = self._ended = time.monotonic()

    @property
    def name(self) -> str:
        """Of the disk."""
        return self.writer.name

    def begin(self) -> None:
        """Its turn has come; unless it was read before, the time until now is not its own."""
        if not self.branch.given:
            self._began = self._ended = time.monotonic()

    async def recheck(self, offset: int, buffer: bytearray, length: int) -> None:
        """Is that as in the parent, as it was said to be?"""
        async with self.target.failing_alone():
            different = await self.writer.recheck(offset, buffer, length)
            self.rechecked += length
            self.mismatches += -(-different // self.writer.granularity)

    def distrust(self) -> None:
        """Read everything: what told the changes did not tell all of them."""
        reason = (
            f"{self.plan.context} did not tell of {self.mismatches} changed chunks among"
            f" {self.rechecked} bytes that were read to check it"
        )
        self.plan = Plan(Mode.SCAN, reason, cbt=self.plan.cbt)
        self.told = whole(self.writer.size, self.writer.granularity)
        self.branch.owed.tell(self.told)

    def end(self) -> None:
        """Everything has been told."""
        self._ended = time.monotonic()
        self.writer.facts.update(
            mode=str(self.plan.mode),
            reason=self.plan.reason,
            cbt=self.plan.cbt,
            read_bytes=self.branch.given,
            rechecked_bytes=self.rechecked,
        )

    def report(self, group: str, point: str) -> DiskReport:
        """What has been done; after the commit."""
        summary, plan = self.writer.summary, self.plan
        return DiskReport(
            repository=self.target.destination.name,
            group=group,
            disk=self.writer.name,
            point=point,
            size=self.writer.size,
            mode=str(plan.mode),
            reason=plan.reason,
            read_bytes=self.branch.given,
            new_bytes=summary.new_bytes,
            zero_bytes=summary.zero_bytes,
            unchanged_bytes=summary.unchanged_bytes,
            duplicate_bytes=summary.duplicate_bytes,
            rechecked_bytes=self.rechecked,
            recheck_mismatches=self.mismatches,
            reread_bytes=self.reread,
            duration_s=round(self._ended - self._began, 3),
        )
