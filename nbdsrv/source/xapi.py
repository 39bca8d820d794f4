"""XCP-ng and XenServer: a running VM by snapshot, changed block tracking and NBD.

::

    freeze    log in ── find the VM, its disks ── VDI.enable_cbt where it is off
              VM.snapshot ── per disk: list_changed_blocks(base, snapshot) ──> Bitmap
    read      xapi-nbd of any host ── CbtDisk(bitmap)        or the export stream, spooled
    succeed   VM.destroy, VDI.data_destroy: the snapshot stays as metadata, the next base
    else      VM.destroy, VDI.destroy: the old base is in force, no change is lost

A checkpoint is the uuid of a snapshot's VDI. Consistency is that of a crash: XAPI has no quiescing
any more.

Rule: XAPI turns tracking off by itself when anything goes wrong, so it is asked each time.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.source.cbt import CONTEXT, CbtDisk
from nbdsrv.source.hypervisor import Frozen, FrozenDisk, Hypervisor, SourceError
from nbdsrv.source.xapi_allocation import AllocatedDisk, read_allocation
from nbdsrv.source.xapi_changes import Changes, changes_since, turn_on
from nbdsrv.source.xapi_export import open_exported, stream_format
from nbdsrv.source.xapi_nbd import HOST_CONNECTIONS, open_over_nbd
from nbdsrv.source.xapi_owner import RENEW_S
from nbdsrv.source.xapi_place import Access, XapiPlace
from nbdsrv.source.xapi_records import (
    LiveDisk,
    VirtualMachine,
    chosen_disks,
    find_vm,
    live_disks,
    network_cards,
)
from nbdsrv.source.xapi_session import XapiSession
from nbdsrv.source.xapi_snapshots import Snapshot, clean_up, drop, keep, prune, stamp, take

__all__ = ["XapiVm"]

log = logging.getLogger(__name__)

VM_FACTS = (
    "uuid",
    "name_label",
    "name_description",
    "VCPUs_max",
    "VCPUs_at_startup",
    "memory_static_max",
    "memory_dynamic_max",
    "memory_dynamic_min",
    "memory_static_min",
    "VCPUs_params",
    "HVM_boot_policy",
    "HVM_boot_params",
    "HVM_shadow_multiplier",
    "domain_type",
    "platform",
    "tags",
    "actions_after_shutdown",
    "actions_after_reboot",
    "actions_after_crash",
    "PV_bootloader",
    "PV_bootloader_args",
    "PV_kernel",
    "PV_ramdisk",
    "PV_args",
    "PV_legacy_args",
    "PCI_bus",
    "NVRAM",
    "bios_strings",
    "hardware_platform_version",
    "has_vendor_device",
    "other_config",
    "xenstore_data",
    "recommendations",
    "user_version",
    "order",
    "start_delay",
    "shutdown_delay",
    "ha_restart_priority",
    "ha_always_run",
)
"""Of a VM's record: what it takes to make it anew."""
VBD_FACTS = ("userdevice", "bootable", "mode")


class XapiVm(Hypervisor):
    """A VM of a pool."""

    def __init__(self, place: XapiPlace, access: Access, workers: Workers) -> None:
        """Nothing is connected yet. ``place.disk`` is for the caller of ``freeze``."""
        self._place = place
        self._access = access
        self._workers = workers

    async def vm(self) -> str:
        """Its name, also where it was given by uuid."""
        async with self._session() as session:
            return (await find_vm(session, self._place.vm)).name

    @asynccontextmanager
    async def freeze(
        self, known: Mapping[str, Sequence[str]], disks: Sequence[str] = ()
    ) -> AsyncIterator[Frozen]:
        """Snapshot it; see ``Hypervisor``."""
        async with self._session() as session:
            vm = await find_vm(session, self._place.vm)
            everything = await live_disks(session, vm)
            wanted = chosen_disks(vm, everything, disks)
            tracked = {disk.name: await turn_on(session, disk) for disk in wanted}
            snapshot = await take(session, vm, wanted, everything)
            frozen = XapiFrozen(session, self._access, vm, wanted, snapshot)
            try:
                frozen.facts = {**frozen.facts, "cards": await network_cards(session, vm)}
                for disk in wanted:
                    frozen.changes[disk.name] = await changes_since(
                        session,
                        self._workers,
                        disk,
                        tracked[disk.name],
                        snapshot.disks[disk.name],
                        known.get(disk.name, ()),
                    )
                frozen.prepare()
                async with _stamping(session, snapshot.vm):
                    yield frozen
            except BaseException as error:
                if not frozen.ended:
                    await _give_up(session, snapshot.vm, error)
                raise
            if not frozen.ended:
                await drop(session, snapshot.vm)

    async def clean(self) -> Sequence[str]:
        """Snapshots of backups that have died; their metadata stays, as bases."""
        async with self._session() as session:
            vm = await find_vm(session, self._place.vm)
            return await clean_up(session, vm, await live_disks(session, vm))

    def _session(self) -> AbstractAsyncContextManager[XapiSession]:
        return XapiSession(self._place, self._access)


class XapiFrozen(Frozen):
    """A VM's snapshot, to be read.

    Attributes:
        changes: by disk.
        ended: has ``succeed`` been called? The points are stored then, whatever it comes to.
    """

    consistency = "crash"

    def __init__(
        self,
        session: XapiSession,
        access: Access,
        machine: VirtualMachine,
        wanted: Sequence[LiveDisk],
        snapshot: Snapshot,
    ) -> None:
        self.vm = machine.name
        self.disks = ()
        self.facts = {
            "hypervisor": "xapi",
            "vm": {key: machine.record[key] for key in VM_FACTS if key in machine.record},
        }
        self.changes: dict[str, Changes] = {}
        self.ended = False
        self._session = session
        self._access = access
        self._wanted = wanted
        self._snapshot = snapshot
        self._facts: dict[str, dict[str, Any]] = {}

    def prepare(self) -> None:
        """Make ``disks``, once the changes are known."""
        self.disks = [self._frozen(index, disk) for index, disk in enumerate(self._wanted)]

    def _frozen(self, index: int, disk: LiveDisk) -> FrozenDisk:
        vdi, changes = self._snapshot.disks[disk.name], self.changes[disk.name]
        facts = self._facts[disk.name] = {
            "vdi": disk.vdi.uuid,
            "name": disk.vdi.name,
            "snapshot": vdi.uuid,
            **{key: disk.vbd[key] for key in VBD_FACTS if key in disk.vbd},
        }
        return FrozenDisk(
            disk.name,
            "",  # a name dies with its session; ``open`` asks for a new one
            vdi.size,
            context=CONTEXT if changes.bitmap is not None else "",
            since=changes.since,
            checkpoint=vdi.uuid if vdi.cbt else "",
            reason=changes.reason,
            connections=HOST_CONNECTIONS,
            facts=facts,
            open=partial(self._opened, index, disk),
        )

    @asynccontextmanager
    async def _opened(
        self, index: int, disk: LiveDisk, workers: Workers, contexts: Sequence[str]
    ) -> AsyncIterator[Disk]:
        """One disk, by NBD if that can be; with what changed, if that is known."""
        del contexts  # its servers have none
        async with AsyncExitStack() as stack:
            opened = await self._transport(stack, index, disk, workers)
            bitmap = self.changes[disk.name].bitmap
            if bitmap is not None:
                yield CbtDisk(workers, opened, bitmap)
            elif self._facts[disk.name]["transport"] == "nbd":
                yield await self._allocated(opened, disk, workers)
            else:
                yield opened

    async def _allocated(self, opened: Disk, disk: LiveDisk, workers: Workers) -> Disk:
        """With a map of what there is at all: a full backup of a thin disk is short then."""
        vdi = self._snapshot.disks[disk.name]
        try:
            allocated = await read_allocation(self._session, vdi, stream_format(vdi, disk.vdi))
        except SourceError as error:
            log.info("xapi.unmapped disk=%s reason=%s", disk.name, error)
            return opened
        return AllocatedDisk(workers, opened, allocated)

    async def _transport(
        self, stack: AsyncExitStack, index: int, disk: LiveDisk, workers: Workers
    ) -> Disk:
        vdi, access, facts = self._snapshot.disks[disk.name], self._access, self._facts[disk.name]
        try:
            opening = open_over_nbd(
                self._session, vdi, workers, first=index, plain=access.plain_nbd
            )
            opened = await stack.enter_async_context(opening)
        except DiskError as error:
            reason = error
        else:
            facts["transport"] = "nbd"
            return opened
        log.warning("xapi.export disk=%s reason=%s", disk.name, reason)
        kind = stream_format(vdi, disk.vdi)
        facts.update(transport=f"export of {kind}", transport_reason=str(reason))
        exporting = open_exported(self._session, vdi, kind, workers, access.spool)
        try:
            return await stack.enter_async_context(exporting)
        except DiskError as error:
            text = f"{self.vm}/{disk.name} cannot be read: {reason}; nor exported: {error}"
            raise SourceError(text, error.errno) from error

    async def succeed(self, needed: Collection[str] = ()) -> None:
        """The snapshot becomes a base; see ``Frozen``. All disks must be closed."""
        self.ended = True
        try:
            kept = await keep(self._session, self._snapshot.vm)
            live = [disk.vdi.ref for disk in self._wanted]
            await prune(self._session, live, {*kept, *needed})
        except SourceError as error:
            text = f"{self.vm}: its snapshot is not all cleared away, the next backup does it"
            raise SourceError(f"{text}: {error}", error.errno) from error


@asynccontextmanager
async def _stamping(session: XapiSession, snapshot: str) -> AsyncIterator[None]:
    """Tell others that we live, and XAPI that the session is in use."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await stamp(session, snapshot)
            except SourceError as error:
                log.warning("xapi.stamp reason=%s", error)

    task = asyncio.get_running_loop().create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # our own cancellation is not lost in it


async def _give_up(session: XapiSession, snapshot: str, why: BaseException) -> None:
    """Remove the snapshot of a backup that has failed."""
    try:
        await drop(session, snapshot)
    except SourceError as error:
        log.warning("xapi.left snapshot, the next backup removes it reason=%s", error)
        why.add_note(f"and its snapshot is left: {error}")
