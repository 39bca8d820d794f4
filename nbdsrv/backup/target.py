"""One repository a backup goes to, and one disk there.

::

    Backup ── piece ──> Target A · Part "sda" ── its own chunks, its own parent ──> point
                   └──> Target B · Part "sda" ── ENOSPC: dropped, A goes on

Rule: what goes wrong in a repository is that repository's failure. Nothing here raises for it; a
failed target takes nothing more.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdsrv.backup.parent import Parent
from nbdsrv.backup.plan import Mode, Plan
from nbdsrv.backup.ranges import ranges_within, whole
from nbdsrv.backup.report import DiskReport
from nbdsrv.copying.survey import DataMap
from nbdsrv.errors import NbdsrvError
from nbdsrv.repository.native.disk_writer import NativeDiskWriter
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.writer import NativePointWriter

__all__ = ["Part", "Target"]


class Target:
    """One repository.

    Attributes:
        vault: it.
        parent: the point that is built upon.
        writer: of the new point, once it is begun.
        parts: the disks, in their order.
        failure: why there will be no point, or None.
        record: the point, once it is committed.
    """

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.parent = Parent(None)
        self.writer: NativePointWriter | None = None
        self.parts: list[Part] = []
        self.failure: NbdsrvError | None = None
        self.record: PointRecord | None = None

    @asynccontextmanager
    async def failing_alone(self) -> AsyncIterator[None]:
        """An error in the block is this target's failure and goes no further."""
        try:
            yield
        except NbdsrvError as error:
            # What follows the first error only says that there was one.
            self.failure = self.failure or error

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
        rechecked: bytes read though said to be unchanged.
        mismatches: chunks of these that were not.
    """

    def __init__(self, target: Target, writer: NativeDiskWriter, plan: Plan) -> None:
        self.target = target
        self.writer = writer
        self.plan = plan
        self.told: DataMap = whole(writer.size, writer.granularity)
        self.read = 0
        self.rechecked = 0
        self.mismatches = 0
        self._began = time.monotonic()
        self._ended = self._began

    async def data(self, offset: int, buffer: bytearray, length: int) -> None:
        """What is in ``buffer``, as far as it must be told here."""
        if self.target.failure is not None:
            return
        async with self.target.failing_alone():
            for start, span in ranges_within(self.told, offset, length):
                part, skip = buffer, start - offset
                if skip:
                    with memoryview(buffer) as view:
                        part = bytearray(view[skip : skip + span])
                self.read += span
                await self.writer.data(start, part, span)

    async def zero(self, offset: int, length: int) -> None:
        """Zeroes, as far as they must be told here."""
        if self.target.failure is not None:
            return
        async with self.target.failing_alone():
            for start, span in ranges_within(self.told, offset, length):
                await self.writer.zero(start, span)

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

    def end(self) -> None:
        """Everything has been told."""
        self._ended = time.monotonic()
        self.writer.facts.update(
            mode=str(self.plan.mode),
            reason=self.plan.reason,
            cbt=self.plan.cbt,
            read_bytes=self.read,
            rechecked_bytes=self.rechecked,
        )

    def report(self, group: str, point: str) -> DiskReport:
        """What has been done; after the commit."""
        summary, plan = self.writer.summary, self.plan
        return DiskReport(
            repository=self.target.vault.name,
            group=group,
            disk=self.writer.name,
            point=point,
            size=self.writer.size,
            mode=str(plan.mode),
            reason=plan.reason,
            read_bytes=self.read,
            new_bytes=summary.new_bytes,
            zero_bytes=summary.zero_bytes,
            unchanged_bytes=summary.unchanged_bytes,
            duplicate_bytes=summary.duplicate_bytes,
            rechecked_bytes=self.rechecked,
            recheck_mismatches=self.mismatches,
            duration_s=round(self._ended - self._began, 3),
        )
