"""The disks of a VM on QEMU at one moment: made, watched, and taken away again.

::

    which disks, which checkpoint each builds upon                 qemu_disks, qemu_checkpoints
    nbd-server-start; a file for each disk                              qemu_server, qemu_graph
    guest-fsfreeze-freeze                                                            qemu_agent
        transaction: filters, bitmaps since the old checkpoint, the new checkpoint   qemu_graph
    guest-fsfreeze-thaw
    one export a disk ── the caller reads ── succeed: what the new checkpoint supersedes goes
    release: all of it goes; without ``succeed`` the new checkpoint too

Rule: nothing that an older checkpoint needs is touched before ``succeed``. Whatever a kill
in between leaves is either swept by name, or a checkpoint more than there need be.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from nbdsrv.disk.insist import insist
from nbdsrv.disk.patience import set_within
from nbdsrv.disk.workers import Workers
from nbdsrv.source.hypervisor import Frozen, FrozenDisk, SourceError
from nbdsrv.source.qemu_address import Place, QemuAddress
from nbdsrv.source.qemu_agent import GuestAgent
from nbdsrv.source.qemu_checkpoints import Base, choose_bases, new_checkpoint, superseded
from nbdsrv.source.qemu_disks import VmDisk, bitmaps_of, chosen_disks, disks_of
from nbdsrv.source.qemu_graph import (
    export,
    jobs,
    named_nodes,
    prepare,
    remove_bitmap,
    remove_export,
    since_bitmap,
    swept,
    transaction,
)
from nbdsrv.source.qemu_leftovers import find_agent
from nbdsrv.source.qemu_scratch import Scratch
from nbdsrv.source.qemu_server import start_server, stop_server
from nbdsrv.source.qmp import QmpClient, making_sense

__all__ = ["QemuFrozen"]

log = logging.getLogger(__name__)

RELEASE_S = 120.0
"""To take everything away again."""
FASTEST = 4 << 30
"""Bytes a second that no guest overwrites: the room left is looked at again before it could be
gone."""
SOONEST_S = 0.02
LATEST_S = 2.0
"""Between two looks."""
JOB_ENDS = frozenset({"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"})


class QemuFrozen(Frozen):
    """One freeze: ``make``, then ``watched``, then ``release``, whatever has happened.

    Attributes:
        client: the monitor; another connection once the first is lost.
    """

    def __init__(
        self,
        client: QmpClient,
        reconnect: Callable[[], Awaitable[QmpClient]],
        scratch: Scratch,
        address: QemuAddress,
        workers: Workers,
    ) -> None:
        """``scratch``: open; ``reconnect``: to the same monitor."""
        self.vm = ""
        self.disks: Sequence[FrozenDisk] = ()
        self.consistency = "crash"
        self.facts: dict[str, Any] = {}
        self.client = client
        self._reconnect = reconnect
        self._scratch = scratch
        self._address = address
        self._workers = workers
        self._chosen: list[tuple[VmDisk, Base]] = []
        self._known: Mapping[str, Sequence[str]] = {}
        self._checkpoint = ""
        self._started = False
        self._succeeded = False
        self._reason = ""
        self._asleep: GuestAgent | None = None
        self._over = asyncio.Event()

    @property
    def trouble(self) -> str:
        """Why the moment has been lost; "" if it has not."""
        return self._reason or self.client.lost

    # --- the way in ----------------------------------------------------------------------

    async def make(
        self, vm: str, known: Mapping[str, Sequence[str]], wanted: Sequence[str]
    ) -> None:
        """All up to the exports; ``release`` undoes whatever of it was done.

        Raises:
            SourceError: it could not be done.
        """
        client = self.client
        await self._workers.look_up(self._scratch.check_room)
        found = disks_of(await client.execute("query-block"), client.name)
        disks = chosen_disks(found, wanted, client.name)
        self.vm, self.facts = vm, await self._vm_facts()
        bases = choose_bases(disks, known)
        self._known = known
        self._chosen = [(disk, bases[disk.name]) for disk in disks]
        newest = max((each for disk in disks for each in disk.checkpoints), default="")
        self._checkpoint = new_checkpoint(newest)
        place = await start_server(client, self._scratch, self._address.nbd)
        self._started = self._address.nbd is None
        for number, disk in enumerate(disks):
            await prepare(client, number, disk, self._scratch.fleece(number))
        client.on_event = self._on_event
        await self._at_one_moment()
        for number, (disk, base) in enumerate(self._chosen):
            await export(client, number, disk, base)
        self.disks = [self._frozen_disk(disk, base, place) for disk, base in self._chosen]

    async def _at_one_moment(self) -> None:
        """The transaction, with the guest's file systems frozen if that can be."""
        agent = await find_agent(self.client, self._address)
        if agent is None:
            await transaction(self.client, self._chosen, self._checkpoint)
            return
        try:
            quiet = await self._quieten(agent)
            await transaction(self.client, self._chosen, self._checkpoint)
        except asyncio.CancelledError:
            self.hurry()
            raise
        finally:
            await insist(self._wake(agent), hurry=self.hurry)
        self.consistency = "filesystem" if quiet else "crash"

    async def _quieten(self, agent: GuestAgent) -> bool:
        await self._workers.look_up(self._scratch.mark_frozen, agent.path)
        try:
            count = await agent.freeze()
        except SourceError as error:
            log.warning("qemu.not_quiet vm=%s reason=%s", self.client.name, error)
            self.facts["agent"] = str(error)
            return False
        self.facts["agent"] = f"{count} file systems frozen"
        return count > 0

    async def _wake(self, agent: GuestAgent) -> None:
        try:
            if agent.touched:
                await agent.thaw()
        except SourceError as error:
            # Tried again at the end, and by the next run, for the marker stays. What was read is
            # good all the same.
            log.warning("qemu.not_thawed vm=%s reason=%s", self.client.name, error)
            self._asleep = agent
            return
        self._asleep = None
        await self._workers.look_up(self._scratch.mark_thawed)

    async def _vm_facts(self) -> dict[str, Any]:
        client = self.client
        uuid = await client.execute("query-uuid")
        memory = await client.execute("query-memory-size-summary")
        processors = await client.execute("query-cpus-fast")
        return {
            "hypervisor": "qemu",
            "version": ".".join(map(str, client.version)),
            "uuid": str(uuid.get("UUID", "")),
            "memory": memory.get("base-memory"),
            "processors": len(processors),
        }

    def _frozen_disk(self, disk: VmDisk, base: Base, place: Place) -> FrozenDisk:
        context = f"qemu:dirty-bitmap:{since_bitmap(base.checkpoint)}" if base.checkpoint else ""
        return FrozenDisk(
            name=disk.name,
            uri=place.uri(disk.name),
            size=disk.size,
            context=context,
            since=base.checkpoint,
            checkpoint="" if disk.read_only else self._checkpoint,
            reason=base.reason,
            facts={
                "format": disk.driver,
                "file": disk.file,
                "checkpoints": "in the image" if disk.keeps else "until QEMU ends",
            },
        )

    # --- meanwhile -----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """In the block the exports end once they are no longer of that moment, or soon may not be.

        That is when a job has ended, or when room gets scarce: before the guest's writes fail.
        """
        watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        while not self._reason:
            room = await self._workers.look_up(self._scratch.room)
            if room < 0:
                self._end(f"no room is left in {self._scratch.path} for what the guest overwrites")
            pause_s = min(max(room / FASTEST, SOONEST_S), LATEST_S)
            await set_within(self._over, pause_s)
        for number in range(len(self._chosen)):
            await remove_export(self.client, f"nbdsrv-{number}")
        await swept(self.client)

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        names = {f"nbdsrv-{number}": disk.name for number, (disk, _) in enumerate(self._chosen)}
        disk = names.get(str(data.get("device")))
        if disk is not None and name in JOB_ENDS:
            self._end(f"{disk}: QEMU's backup job has ended: {data.get('error', 'cancelled')}")

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._over.set()
        log.warning("qemu.ended vm=%s reason=%s", self.client.name, reason)

    async def still_frozen(self) -> None:
        """Ask QEMU whether all jobs are there still; events may be late, answers are not."""
        with making_sense(self.client.name):
            found = await jobs(self.client)
        if not self._reason and len(found) < len(self._chosen):
            self._end("QEMU's backup job has ended")
        if self._reason:
            raise SourceError(f"{self.client.name}: {self._reason}")

    # --- the way out ---------------------------------------------------------------------

    def hurry(self) -> None:
        """As for the monitor."""
        self.client.hurry()

    async def succeed(self, needed: Collection[str] = ()) -> None:
        """The new checkpoint stays; what nobody needs any more is removed."""
        self._succeeded = True
        client = self.client
        with making_sense(client.name):
            nodes = await named_nodes(client)
            there = {node: bitmaps_of(description) for node, description in nodes.items()}
        for disk, _ in self._chosen:
            if not disk.read_only and self._checkpoint not in there.get(disk.node, {}):
                text = f"{client.name}: {disk.name}: checkpoint {self._checkpoint} has disappeared"
                raise SourceError(f"{text}; the next backup will be full")
        for disk, base in self._chosen:
            for bitmap in superseded(disk, base, self._known.get(disk.name, ()), needed):
                await remove_bitmap(client, disk.node, bitmap)
        if self._asleep is not None:
            await self._wake(self._asleep)
        if self._asleep is not None:
            text = f"{client.name}: the guest's file systems may still be frozen"
            raise SourceError(f"{text}: its agent at {self._asleep.path} did not thaw them")

    async def release(self) -> None:
        """Take everything away. What cannot be is left to the next run."""
        self.client.on_event = lambda _name, _data: None
        try:
            async with asyncio.timeout(RELEASE_S):
                with making_sense(self.client.name):
                    await self._release()
        except SourceError as error:
            text = f"{error}; the next backup removes what there is"
            log.warning("qemu.left vm=%s reason=%s", self.client.name, text)
        except TimeoutError:
            text = f"QEMU did not answer within {RELEASE_S:g} s; the next backup removes it"
            log.warning("qemu.left vm=%s reason=%s", self.client.name, text)

    async def _release(self) -> None:
        if self.client.lost and not self.client.hurried:
            # The monitor may have been taken from us while QEMU goes on.
            self.client = await self._reconnect()
        try:
            await swept(self.client)
            await stop_server(self.client, self._scratch, started=self._started)
        finally:
            if self._checkpoint and not self._succeeded:
                for disk, _ in self._chosen:
                    await remove_bitmap(self.client, disk.node, self._checkpoint)
