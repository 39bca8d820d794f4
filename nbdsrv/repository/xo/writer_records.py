"""The metadata of a point as Xen Orchestra writes it: what it lists and what it restores a VM from.

::

    vm, vmSnapshot     records of XAPI; from a restore on they are how the VM is made anew
    vdis vbds vhds     by ref: the disk's record, how the VM has it, where its VHD is
    vifs               by ref: its network cards

A VM of XAPI is described by its own record. Of any other little is known; what is missing has the
values of a plain HVM guest, so that the VM can be made and then be set up by hand.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4, uuid5

import msgspec

from nbdsrv.repository.destination import Occasion

__all__ = [
    "JOB",
    "SCHEDULE",
    "Machine",
    "StoredDisk",
    "machine_of",
    "metadata_of",
    "vm_of_group",
]

_OURS = UUID("8d0c5e1c-7c0b-4f4e-9b43-6e62647372a1")
JOB = str(uuid5(_OURS, "job"))
"""Our job: none that Xen Orchestra knows, so its retention leaves our points alone."""
SCHEDULE = str(uuid5(_OURS, "schedule"))
NULL = "OpaqueRef:NULL"

MEMORY = 2 << 30
"""Bytes, where nothing is known."""
MAX_NUMBER = 1 << 60
_MEMORY_XML = re.compile(r"<memory(?: unit=['\"](\w+)['\"])?[^>]*>\s*(\d{1,15})\s*</memory>")
_VCPU_XML = re.compile(r"<vcpu[^>]*>\s*(\d{1,4})\s*</vcpu>")
_UNITS = {"b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of the VM.

    Attributes:
        uuid: of the VM; its points lie in a directory of that name.
        record: of XAPI, as far as it is known.
        disks: by name in the point: ``vdi``, ``snapshot`` (uuids), ``name``, ``userdevice`` ...
        cards: ``device``, ``MAC``, ``MTU``, ``network`` (its name) of each.
    """

    uuid: str
    record: Mapping[str, Any]
    disks: Mapping[str, Mapping[str, Any]]
    cards: Sequence[Mapping[str, Any]]

    def vdi(self, disk: str) -> str:
        """The uuid of the live disk: the directory its backups lie in."""
        return _uuid(self._of(disk).get("vdi")) or _made(self.uuid, "vdi", disk)

    def snapshot(self, disk: str) -> UUID:
        """The uuid of the snapshot that was read; a new one where there is none."""
        known = _uuid(self._of(disk).get("snapshot"))
        return UUID(known) if known else uuid4()

    def _of(self, disk: str) -> Mapping[str, Any]:
        found = self.disks.get(disk, {})
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True, slots=True)
class StoredDisk:
    """A disk that has been written.

    Attributes:
        name: in the point.
        size: bytes.
        unique_id: in the footer.
        path: of alias or VHD, relative to the VM's directory.
        parent: unique id of the disk it lies upon, or "".
        stored: bytes it takes.
    """

    name: str
    size: int
    unique_id: str
    path: str
    parent: str
    stored: int


def vm_of_group(group: str) -> str:
    """The uuid that stands for a VM of which only the name is known."""
    return _uuid(group) or str(uuid5(_OURS, f"vm/{group}"))


def machine_of(occasion: Occasion) -> Machine:
    """What the hypervisor has told."""
    blobs = occasion.blobs
    kind, told = blobs.get("hypervisor", ""), _mapping(blobs.get("vm", ""))
    disks = _mapping(blobs.get("disks.json", ""))
    if kind == "xapi" and (own := _uuid(told.get("uuid"))):
        return Machine(own, told, disks, _rows(blobs.get("cards", "")))
    own = vm_of_group(occasion.group)
    return Machine(own, {"name_label": occasion.group, **_plain(blobs)}, {}, ())


def metadata_of(
    machine: Machine, occasion: Occasion, created: float, disks: Sequence[StoredDisk]
) -> dict[str, Any]:
    """The point's JSON, version 2.0.0.

    Args:
        machine: the VM.
        occasion: what the point is made for.
        created: seconds since 1970, whole.
        disks: in the VM's order.
    """
    refs = {disk.name: _ref("vdi", disk.unique_id) for disk in disks}
    vm = _vm(machine, occasion.group)
    snapshot = {
        **vm,
        "uuid": _made(machine.uuid, "snapshot", str(int(created))),
        "is_a_snapshot": True,
        "snapshot_of": _ref("vm", machine.uuid),
        "suspend_VDI": NULL,
        "power_state": "Halted",
    }
    return {
        "includeNonNbdQcow2Fix": True,
        "isVhdDifferencing": {refs[disk.name]: bool(disk.parent) for disk in disks},
        "jobId": JOB,
        "mode": "delta",
        "scheduleId": SCHEDULE,
        "timestamp": int(created) * 1000,
        "vbds": dict(_vbd(machine, n, disk, refs) for n, disk in enumerate(disks)),
        "vdis": {refs[disk.name]: _vdi(machine, disk) for disk in disks},
        "version": "2.0.0",
        "vifs": dict(_vif(machine, n, card) for n, card in enumerate(machine.cards)),
        "vhds": {refs[disk.name]: disk.path for disk in disks},
        "vm": vm,
        "vmSnapshot": snapshot,
        "vtpms": [],
        "tags": [],
        "size": sum(disk.stored for disk in disks),
    }


# --- records --------------------------------------------------------------------------------------


def _vm(machine: Machine, group: str) -> dict[str, Any]:
    memory = machine.record.get("memory_static_max", MEMORY)
    return {
        "name_label": group,
        "name_description": "",
        "tags": [],
        "power_state": "Running",
        "user_version": 1,
        "memory_static_max": memory,
        "memory_dynamic_max": memory,
        "memory_dynamic_min": memory,
        "memory_static_min": memory,
        "VCPUs_max": 1,
        "VCPUs_at_startup": 1,
        "VCPUs_params": {},
        "actions_after_shutdown": "destroy",
        "actions_after_reboot": "restart",
        "actions_after_crash": "restart",
        "PV_bootloader": "",
        "PV_kernel": "",
        "PV_ramdisk": "",
        "PV_args": "",
        "PV_bootloader_args": "",
        "PV_legacy_args": "",
        "HVM_boot_policy": "BIOS order",
        "HVM_boot_params": {"order": "cd", "firmware": "bios"},
        "HVM_shadow_multiplier": 1.0,
        "domain_type": "hvm",
        "platform": {
            "acpi": "1",
            "apic": "true",
            "pae": "true",
            "nx": "true",
            "viridian": "true",
            "stdvga": "0",
            "videoram": "8",
        },
        "PCI_bus": "",
        "other_config": {},
        "xenstore_data": {},
        "recommendations": "",
        "blocked_operations": {},
        "affinity": NULL,
        "ha_always_run": False,
        "ha_restart_priority": "",
        "has_vendor_device": False,
        "order": 0,
        "start_delay": 0,
        "shutdown_delay": 0,
        "bios_strings": {},
        "VTPMs": [],
        **machine.record,
        "uuid": machine.uuid,
        "is_a_template": False,
        "is_a_snapshot": False,
        "is_control_domain": False,
    }


def _vdi(machine: Machine, disk: StoredDisk) -> dict[str, Any]:
    told = machine.disks.get(disk.name, {})
    base = {"xo:base_delta": disk.parent} if disk.parent else {}
    live = machine.vdi(disk.name)
    return {
        "uuid": disk.unique_id,
        "name_label": str(told.get("name") or disk.name),
        "name_description": "",
        "virtual_size": -(-disk.size // 512) * 512,
        "physical_utilisation": disk.stored,
        "type": "user",
        "sharable": False,
        "read_only": False,
        "is_a_snapshot": True,
        "snapshot_of": _ref("live", live),
        "sm_config": {},
        "xenstore_data": {},
        "tags": [],
        "other_config": {**base, "xo:vm": machine.uuid},
        "$snapshot_of$uuid": live,
    }


def _vbd(
    machine: Machine, number: int, disk: StoredDisk, refs: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    told = machine.disks.get(disk.name, {})
    own = _made(machine.uuid, "vbd", disk.name)
    # Userdevice 3 is the CD drive's in all templates.
    device = str(number if number < 3 else number + 1)
    return _ref("vbd", own), {
        "uuid": own,
        "type": "Disk",
        "mode": str(told.get("mode") or "RW"),
        "bootable": bool(told.get("bootable", number == 0)),
        "userdevice": str(told.get("userdevice") or device),
        "device": disk.name,
        "empty": False,
        "unpluggable": True,
        "currently_attached": False,
        "other_config": {},
        "qos_algorithm_type": "",
        "qos_algorithm_params": {},
        "VDI": refs[disk.name],
        "VM": _ref("vm", machine.uuid),
    }


def _vif(machine: Machine, number: int, card: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    own = _made(machine.uuid, "vif", str(card.get("device") or number))
    return _ref("vif", own), {
        "uuid": own,
        "device": str(card.get("device") or number),
        "MAC": str(card.get("MAC") or ""),
        "MAC_autogenerated": False,
        "MTU": card.get("MTU") or 1500,
        "currently_attached": False,
        "other_config": {},
        "locking_mode": "network_default",
        "ipv4_allowed": [],
        "ipv6_allowed": [],
        "qos_algorithm_type": "",
        "qos_algorithm_params": {},
        "network": NULL,
        "VM": _ref("vm", machine.uuid),
        "$network$name_label": str(card.get("network") or ""),
    }


# --- what blobs say -------------------------------------------------------------------------------


def _plain(blobs: Mapping[str, str]) -> dict[str, Any]:
    """Memory and processors of a VM of QEMU or libvirt."""
    memory, processors = 0, 0
    definition = blobs.get("domain_xml", "")
    if found := _MEMORY_XML.search(definition):
        memory = int(found[2]) * _UNITS.get(found[1] or "KiB", 1024)
    if found := _VCPU_XML.search(definition):
        processors = int(found[1])
    memory = memory or _number(blobs.get("memory", ""))
    processors = processors or _number(blobs.get("processors", ""))
    known: dict[str, Any] = {}
    if 0 < memory < MAX_NUMBER:
        known |= dict.fromkeys(
            ("memory_static_max", "memory_dynamic_max", "memory_dynamic_min", "memory_static_min"),
            memory,
        )
    if 0 < processors <= MAX_PROCESSORS:
        known |= {"VCPUs_max": processors, "VCPUs_at_startup": processors}
    return known


MAX_PROCESSORS = 1024


def _number(text: str) -> int:
    return int(text) if text.isdigit() and len(text) < 19 else 0


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {}


def _rows(text: str) -> Sequence[Mapping[str, Any]]:
    try:
        return msgspec.json.decode(text, type=list[dict[str, Any]])
    except (msgspec.MsgspecError, RecursionError):
        return []


def _uuid(value: object) -> str:
    """As text in the usual form; "" if it is none."""
    if not isinstance(value, str) or len(value) != len(str(_OURS)):
        return ""
    try:
        return str(UUID(value))
    except ValueError:
        return ""


def _made(*parts: str) -> str:
    return str(uuid5(_OURS, "/".join(parts)))


def _ref(kind: str, name: str) -> str:
    return f"OpaqueRef:{uuid5(_OURS, f'{kind}/{name}')}"
