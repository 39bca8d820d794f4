"""A domain that is being backed up: what holds while it is, and both ways out.

::

    succeed   the job ended ── the directory removed ── checkpoints nobody needs deleted
    leave     the job ended ── the new checkpoint deleted ── the directory removed

The order is what makes it safe to be killed in between: the directory is the note that the new
checkpoint is not confirmed, and goes after the decision and before anything older does.

While the disks are frozen, QEMU keeps what the guest overwrites in scratch files. When it cannot,
it fails the guest's writes. So free space is watched, and the backup ended while there still is
some.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nbdsrv.source.hypervisor import Frozen, FrozenDisk, SourceError
from nbdsrv.source.libvirt_checkpoints import droppable
from nbdsrv.source.libvirt_line import Refused
from nbdsrv.source.libvirt_link import Link
from nbdsrv.source.libvirt_remains import end_job, job_token
from nbdsrv.source.libvirt_start import Start
from nbdsrv.source.libvirt_workplace import RESERVE

__all__ = ["LibvirtFrozen"]

log = logging.getLogger(__name__)

WATCH_S = 0.5
"""Between two looks at the free space: a fast guest writes some hundred MiB meanwhile."""


class LibvirtFrozen(Frozen):
    """A running backup job. ``leave`` it in every case.

    Attributes:
        lost: why the disks are frozen no more, or "".
    """

    def __init__(
        self,
        link: Link,
        start: Start,
        disks: Sequence[FrozenDisk],
        *,
        vm: str,
        consistency: str,
        facts: Mapping[str, Any],
    ) -> None:
        self.vm = vm
        self.disks = disks
        self.consistency = consistency
        self.facts = facts
        self._link = link
        self._start = start
        self._place = start.place
        self.lost = ""
        self._over = False
        self._guard = asyncio.get_running_loop().create_task(self._watch())

    async def still_frozen(self) -> None:
        """Is the job still running?"""
        if not self.lost and await job_token(self._link) != self._place.token:
            self.lost = (
                "libvirt has ended the backup job: the VM was shut off, or QEMU had an error"
            )
        if self.lost:
            raise SourceError(f"{self.vm}: {self.lost}; what was read since is not of one moment")

    async def succeed(self, needed: Collection[str] = ()) -> None:
        """End the job, confirm the checkpoint, delete those that nobody needs any more."""
        await self.still_frozen()
        self._over = True
        await self._stop_watching()
        await end_job(self._link, self._place.token)
        self._place.remove()
        await self._drop(needed)

    async def _drop(self, needed: Collection[str]) -> None:
        """Failing here costs bitmaps, nothing else: the next success tries again."""
        start = self._start
        known = {name for names in start.known.values() for name in names}
        kept = {*needed, *(choice.since for choice in start.choices.values() if needed)}
        try:
            checkpoints = await self._link.checkpoints()
            for name in droppable(checkpoints, start.checkpoint, known, kept, start.present):
                await self._delete(name)
        except SourceError as error:
            log.warning("libvirt.kept reason=%s", error)

    async def _delete(self, name: str) -> None:
        try:
            await self._link.delete_checkpoint(name)
        except Refused:
            if name not in self._start.broken:
                raise
            # libvirt looks for its bitmap, which is gone; what it knows of it can go.
            await self._link.delete_checkpoint(name, bitmaps=False)

    async def leave(self) -> None:
        """End the job; unless ``succeed`` was called, delete the new checkpoint. Idempotent.

        Raises:
            SourceError: something is left, for the next backup to remove.
        """
        await self._stop_watching()
        if self._over:
            self._place.leave()
            return
        self._over = True
        try:
            await end_job(self._link, self._place.token)
            if self._start.checkpoint:
                await self._link.delete_checkpoint(self._start.checkpoint)
            self._place.remove()
        finally:
            self._place.leave()

    # --- the guard ------------------------------------------------------------------------------

    async def _watch(self) -> None:
        if self._start.address.remote:
            return  # the scratch files are on another host
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                free = self._place.free()
                if free < RESERVE:
                    self.lost = (
                        f"{self._place.path.parent} has only {free >> 20} MiB left for what the"
                        " guest overwrites; the backup was given up before the guest would suffer"
                    )
                    await end_job(self._link, self._place.token)
                    return
            except SourceError as error:
                log.warning("libvirt.guard reason=%s", error)
                return

    async def _stop_watching(self) -> None:
        if not self._guard.done():
            self._guard.cancel()
        await asyncio.wait([self._guard])
