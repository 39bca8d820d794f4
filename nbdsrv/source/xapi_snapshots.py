"""A VM's snapshot: taken, kept as what changed, or removed; and what a crashed backup left.

::

    take ── VM.snapshot, marked ──> snapshots of the disks ── read
    keep ── VM.destroy, VDI.data_destroy ──> cbt_metadata: a base for the next backup
    drop ── VM.destroy, VDI.destroy ──────> gone; the log is merged into the next one by the storage

    leftovers: a snapshot whose run is dead. Its disks are *kept*, not dropped: a repository may
    have a point of that moment, committed just before the crash.

Rule: only what bears our mark is touched.
"""

import asyncio
import logging
import time
from calendar import timegm
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_owner import ALIVE, MARK, Owner, marked_name, owner_of
from nbdsrv.source.xapi_records import LiveDisk, Vdi, VirtualMachine, read_vdi, vbds_of
from nbdsrv.source.xapi_session import XapiError, XapiSession

__all__ = ["Snapshot", "clean_up", "drop", "keep", "prune", "stamp", "take"]

log = logging.getLogger(__name__)

BUSY_TRIES = 16
"""How often a disk that is in use is asked for again: its last reader is being unplugged."""
FIRST_PAUSE_S, BUSY_PAUSE_S = 0.5, 5.0
"""Between two tries; it doubles from the first to the last: a minute in all."""
SPARE_BASES = 7
"""Bases kept beyond those that are needed, from new to old: another job may back up the same VM
elsewhere, daily here and weekly there. Each is a bitmap, 2 MiB for a disk of 1 TiB."""
_GONE = {"HANDLE_INVALID", "UUID_INVALID"}
_TIME = "%Y%m%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Of a VM.

    Attributes:
        vm: reference of the snapshot.
        disks: by name of the live disk.
    """

    vm: str
    disks: dict[str, Vdi]


async def take(
    session: XapiSession, vm: VirtualMachine, wanted: Sequence[LiveDisk], all_: Sequence[LiveDisk]
) -> Snapshot:
    """Snapshot a VM at one moment; disks that are not wanted are left out where XAPI can do that.

    Raises:
        SourceError: it cannot; nothing is left behind.

    Cancellation: what has been made is removed.
    """
    owner = Owner.new()
    name = marked_name(vm.name, owner)
    chosen = {disk.name for disk in wanted}
    ignored = [disk.vdi.ref for disk in all_ if disk.name not in chosen]
    try:
        ref = await _snapshot(session, vm.ref, name, ignored)
        return await _marked(session, ref, owner, wanted)
    except BaseException as error:
        try:
            for left in await session.call("VM.get_by_name_label", name):
                await drop(session, left)
        except SourceError as trouble:
            error.add_note(f"and its snapshot {name!r} is left: {trouble}")
        raise


async def _snapshot(session: XapiSession, vm: str, name: str, ignored: Sequence[str]) -> str:
    if ignored:
        try:
            return await session.task("VM.snapshot", vm, name, list(ignored))
        except XapiError as error:  # hosts before XAPI 21 take everything or nothing
            if error.code != "MESSAGE_PARAMETER_COUNT_MISMATCH":
                raise
    return await session.task("VM.snapshot", vm, name)


async def _marked(
    session: XapiSession, ref: str, owner: Owner, wanted: Sequence[LiveDisk]
) -> Snapshot:
    await _set(session, "VM", ref, MARK, owner.run)
    await stamp(session, ref)
    found = [vdi async for vdi in _disks_of(session, ref)]
    for vdi in found:
        await _set(session, "VDI", vdi.ref, MARK, owner.run)
    by_live = {vdi.snapshot_of: vdi for vdi in found}
    disks = {}
    for disk in wanted:
        if disk.vdi.ref not in by_live:
            raise SourceError(f"{disk.name}: the snapshot has no image of it")
        disks[disk.name] = by_live[disk.vdi.ref]
    return Snapshot(ref, disks)


async def stamp(session: XapiSession, snapshot: str) -> None:
    """Say that its owner lives."""
    await _set(session, "VM", snapshot, ALIVE, str(int(time.time())))


async def _set(session: XapiSession, kind: str, ref: str, key: str, value: str) -> None:
    await session.call(f"{kind}.remove_from_other_config", ref, key)
    await session.call(f"{kind}.add_to_other_config", ref, key, value)


async def _disks_of(session: XapiSession, vm: str) -> AsyncIterator[Vdi]:
    record = await session.call("VM.get_record", vm)
    for vbd in await vbds_of(session, record):
        yield await read_vdi(session, vbd["VDI"])


async def keep(session: XapiSession, snapshot: str) -> list[str]:
    """Give up the bytes; what changed until then stays known where it was tracked.

    Returns:
        The uuids of what is a base now.

    Raises:
        SourceError: a disk stayed in use; it is still a base, and is looked after by the next run.
    """
    disks = [vdi async for vdi in _disks_of(session, snapshot)]
    await session.task("VM.destroy", snapshot)
    return [vdi.uuid for vdi in disks if await _reduce(session, vdi)]


async def _reduce(session: XapiSession, vdi: Vdi) -> bool:
    """To metadata, or to nothing; True if it can be a base."""
    if vdi.cbt:
        try:
            await _patiently(session, "VDI.data_destroy", vdi.ref)
            return True
        except XapiError as error:
            if error.code != "VDI_NO_CBT_METADATA":
                raise
    await _patiently(session, "VDI.destroy", vdi.ref)
    return False


async def drop(session: XapiSession, snapshot: str) -> None:
    """Remove a snapshot and its disks.

    Cancellation waits until that is done: what is to be cleaned up has been cancelled already,
    mostly, and all calls have deadlines.

    Raises:
        SourceError: something is left; the next run finds it by its mark.
    """
    work = asyncio.ensure_future(_drop(session, snapshot))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            cancelled = error
        except SourceError:
            break
    if cancelled is not None:
        if not work.cancelled() and (failure := work.exception()) is not None:
            log.warning("xapi.left reason=%s", failure)
        raise cancelled
    work.result()


async def _drop(session: XapiSession, snapshot: str) -> None:
    disks = [vdi async for vdi in _disks_of(session, snapshot)]
    await session.task("VM.destroy", snapshot)
    for vdi in disks:
        await _patiently(session, "VDI.destroy", vdi.ref)


async def _patiently(session: XapiSession, method: str, ref: str) -> None:
    pause = FIRST_PAUSE_S
    for attempt in range(BUSY_TRIES):
        try:
            await session.task(method, ref)
        except XapiError as error:
            if error.code in _GONE:
                return
            if error.code != "VDI_IN_USE" or attempt == BUSY_TRIES - 1:
                raise
            log.info("xapi.busy method=%s attempt=%d", method, attempt + 1)
            await asyncio.sleep(min(pause, BUSY_PAUSE_S))
            pause *= 2
        else:
            return


async def prune(session: XapiSession, live: Sequence[str], keep_: Collection[str]) -> list[str]:
    """Destroy our bases of these disks, but those to be kept and the newest few.

    Args:
        session: to the pool.
        live: references of the disks.
        keep_: uuids.

    Returns:
        The uuids of what is gone.
    """
    gone = []
    for ref in live:
        ours = [vdi for vdi in await _snapshots_of(session, ref) if vdi.metadata]
        ours.sort(key=lambda vdi: vdi.time, reverse=True)
        for vdi in [vdi for vdi in ours if vdi.uuid not in keep_][SPARE_BASES:]:
            await _patiently(session, "VDI.destroy", vdi.ref)
            gone.append(vdi.uuid)
    return gone


async def _snapshots_of(session: XapiSession, live: str) -> list[Vdi]:
    """Ours, of one disk; also those no snapshot of a VM refers to any more."""
    found = []
    for ref in (await read_vdi(session, live)).snapshots:
        try:
            vdi = await read_vdi(session, ref)
        except XapiError as error:
            if error.code not in _GONE:
                raise
            continue
        if owner_of(vdi.other_config.get(MARK, "")) is not None:
            found.append(vdi)
    return found


async def clean_up(session: XapiSession, vm: VirtualMachine, live: Sequence[LiveDisk]) -> list[str]:
    """Give up what dead runs left of a VM; one line for each thing.

    Raises:
        SourceError: it cannot.
    """
    done = []
    spared: set[str] = set()
    for ref in await session.call("VM.get_snapshots", vm.ref):
        record = await session.call("VM.get_record", ref)
        name = str(record.get("name_label"))
        owner = owner_of(name)
        if owner is None:
            continue
        marks = record.get("other_config")
        last = marks.get(ALIVE, "") if isinstance(marks, dict) else ""
        last = last or _seconds(str(record.get("snapshot_time", "")))
        if owner.is_alive(last, time.time()):
            spared.add(owner.run)
            continue
        await keep(session, ref)
        done.append(f"{vm.name}: the snapshot {name!r} of a backup that has died")
    for disk in live:
        for vdi in await _snapshots_of(session, disk.vdi.ref):
            run = vdi.other_config[MARK]
            if vdi.metadata or run in spared:
                continue
            owner = owner_of(run)
            if owner is None or owner.is_alive(_seconds(vdi.time), time.time()):
                continue
            await _reduce(session, vdi)
            done.append(f"{vm.name}: the bytes of {disk.name}'s snapshot {vdi.uuid}")
    return done


def _seconds(text: str) -> str:
    """XAPI's time as seconds since 1970; "" if it is none."""
    try:
        return str(timegm(time.strptime(text, _TIME)))
    except ValueError:
        return ""
