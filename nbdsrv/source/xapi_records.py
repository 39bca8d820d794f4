"""XAPI's records, as far as a backup looks at them: of VMs, of their disks, of snapshots.

::

    VM ── VBDs ── VBD(Disk, userdevice 0) ── VDI "root"       name in a point: xvda
               ├─ VBD(CD)                                      no disk
               └─ VBD(Disk, userdevice 2) ── VDI "[NOBAK] t"   left out, as Xen Orchestra does

Rule: what comes from a record has been checked for its type here, and nowhere else.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdsrv.errors import ConfigError
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_session import XapiError, XapiSession

__all__ = [
    "LiveDisk",
    "Vdi",
    "VirtualMachine",
    "chosen_disks",
    "find_vm",
    "live_disks",
    "network_cards",
    "read_vdi",
    "vbds_of",
]

NULL = "OpaqueRef:NULL"
NO_BACKUP = "[NOBAK]"
METADATA = "cbt_metadata"
MAX_DISKS = 255
"""Of one VM; XAPI allows that many."""
MAX_CARDS = 64
MAX_SIZE = 1 << 56
_UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """A VM."""

    ref: str
    uuid: str
    name: str
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Vdi:
    """A disk or a snapshot of one.

    Attributes:
        metadata: are its bytes gone, and only what changed until then is known?
    """

    ref: str
    uuid: str
    name: str
    size: int
    cbt: bool
    metadata: bool
    snapshot_of: str
    snapshots: Sequence[str]
    other_config: Mapping[str, str]
    sm_config: Mapping[str, str]
    time: str


@dataclass(frozen=True, slots=True)
class LiveDisk:
    """A disk of a VM.

    Attributes:
        name: in points: ``xvda`` for userdevice 0.
        userdevice: where the VM has it.
        vdi: its image now.
        vbd: how it is attached; for the facts.
    """

    name: str
    userdevice: str
    vdi: Vdi
    vbd: Mapping[str, Any]

    @property
    def unwanted(self) -> bool:
        """Does its name say that it is not to be backed up?"""
        return self.vdi.name.startswith(NO_BACKUP)


async def find_vm(session: XapiSession, name: str) -> VirtualMachine:
    """By uuid or by name.

    Raises:
        SourceError: there is none, or there are several of that name.
    """
    if _UUID.fullmatch(name.lower()):
        try:
            refs = [await session.call("VM.get_by_uuid", name.lower())]
        except XapiError as error:
            if error.code != "UUID_INVALID":
                raise
            refs = []
    else:
        refs = _texts(await session.call("VM.get_by_name_label", name))
    found = []
    for ref in refs:
        record = _mapping(await session.call("VM.get_record", ref))
        kinds = ("is_a_snapshot", "is_a_template", "is_control_domain")
        if not any(record.get(kind) for kind in kinds):
            found.append(
                VirtualMachine(ref, _of(record, "uuid"), _of(record, "name_label"), record)
            )
    if not found:
        raise SourceError(f"{session.server.name}: there is no VM {name!r}")
    if len(found) > 1:
        uuids = ", ".join(sorted(vm.uuid for vm in found))
        raise SourceError(
            f"{session.server.name}: {len(found)} VMs are called {name!r}: {uuids}; give a uuid"
        )
    return found[0]


async def live_disks(session: XapiSession, vm: VirtualMachine) -> list[LiveDisk]:
    """In the order of their devices."""
    found = []
    for vbd in await vbds_of(session, vm.record):
        vdi = await read_vdi(session, _of(vbd, "VDI"))
        device = _of(vbd, "userdevice")
        found.append(LiveDisk(disk_name(device), device, vdi, vbd))
    return sorted(found, key=lambda disk: (len(disk.userdevice), disk.userdevice))


async def vbds_of(session: XapiSession, vm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Its attachments that are disks."""
    refs = _texts(vm.get("VBDs"))
    if len(refs) > MAX_DISKS:
        raise SourceError(
            f"{session.server.name}: a VM with {len(refs)} disks; {MAX_DISKS} is the limit"
        )
    records = [_mapping(each) for each in await _at_once(session, "VBD.get_record", refs)]
    return [
        each
        for each in records
        if each.get("type") == "Disk" and each.get("VDI") not in {None, "", NULL}
    ]


async def network_cards(session: XapiSession, vm: VirtualMachine) -> list[Mapping[str, Any]]:
    """Device, MAC, MTU and the network's name of each: what a restore needs."""
    refs = _texts(vm.record.get("VIFs"))[:MAX_CARDS]
    records = [_mapping(each) for each in await _at_once(session, "VIF.get_record", refs)]
    networks = [str(each.get("network")) for each in records]
    names = await _at_once(session, "network.get_name_label", networks)
    return [
        {**{key: each.get(key) for key in ("device", "MAC", "MTU")}, "network": str(name)}
        for each, name in zip(records, names, strict=True)
    ]


async def read_vdi(session: XapiSession, ref: str) -> Vdi:
    """The record of one."""
    record = _mapping(await session.call("VDI.get_record", ref))
    size = record.get("virtual_size")
    if isinstance(size, str) and size.isdigit():
        size = int(size[:20])
    if not isinstance(size, int) or not 0 <= size <= MAX_SIZE:
        raise SourceError(f"{session.server.name}: VDI {record.get('uuid')}: size {size!r}")
    return Vdi(
        ref,
        _of(record, "uuid"),
        _of(record, "name_label"),
        size,
        cbt=record.get("cbt_enabled") is True,
        metadata=record.get("type") == METADATA,
        snapshot_of=_of(record, "snapshot_of"),
        snapshots=_texts(record.get("snapshots")),
        other_config=_strings(record.get("other_config")),
        sm_config=_strings(record.get("sm_config")),
        time=str(record.get("snapshot_time", "")),
    )


def chosen_disks(
    vm: VirtualMachine, disks: Sequence[LiveDisk], wanted: Sequence[str]
) -> list[LiveDisk]:
    """Those of these names (or devices, or uuids); without names all but the unwanted.

    Raises:
        ConfigError: the VM has no such disk.
        SourceError: there is nothing to back up.
    """
    if not wanted:
        chosen = [disk for disk in disks if not disk.unwanted]
        if not chosen:
            raise SourceError(f"{vm.name}: has no disk that is not {NO_BACKUP}")
        return chosen
    chosen = []
    for name in wanted:
        for disk in disks:
            if name in {disk.name, disk.userdevice, disk.vdi.uuid}:
                chosen.append(disk)
                break
        else:
            names = ", ".join(disk.name for disk in disks) or "none"
            raise ConfigError(f"{vm.name} has no disk {name!r}; it has {names}")
    return list({disk.name: disk for disk in chosen}.values())


def disk_name(userdevice: str) -> str:
    """``xvda`` for 0, ``xvdz`` for 25, ``xvdaa`` for 26: as Linux guests call them."""
    if not userdevice.isdigit() or len(userdevice) > 3:
        return userdevice
    number, letters = int(userdevice), ""
    while number >= 0:
        letters = chr(97 + number % 26) + letters
        number = number // 26 - 1
    return f"xvd{letters}"


async def _at_once(session: XapiSession, method: str, refs: Sequence[str]) -> list[Any]:
    """One call for each, four at a time."""
    gate = asyncio.Semaphore(4)

    async def one(ref: str) -> Any:
        async with gate:
            return await session.call(method, ref)

    return list(await asyncio.gather(*(one(ref) for ref in refs)))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SourceError("XAPI: a record is no record")
    return value


def _strings(value: Any) -> Mapping[str, str]:
    return {str(key): str(each) for key, each in value.items()} if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _of(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise SourceError(f"XAPI: a record has no {key}")
    return value
