"""The pool's database and its disks, in memory.

::

    Host ── sees ──> Sr <── Vdi ── data, log          Vbd joins a Vm and a Vdi
    Session                                           Task: what an Async call left

Rule: whoever touches anything holds ``Pool.lock``. A record is what ``X.get_record`` answers;
what it does not have (bytes, logs) are attributes of their own.
"""

import base64
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from conformance.xapi.tracking import Log, merge_into_next, unlink

__all__ = ["NULL", "Host", "Pool", "Trouble", "Vdi", "XapiFailure", "new_ref"]

NULL = "OpaqueRef:NULL"
Record = dict[str, Any]


class XapiFailure(Exception):
    """An error as XAPI reports it: a code and strings."""

    def __init__(self, code: str, *details: str) -> None:
        super().__init__(code, *details)
        self.words = [code, *details]


def new_ref() -> str:
    """An opaque reference."""
    return f"OpaqueRef:{uuid.uuid4()}"


@dataclass(eq=False)
class Host:
    """A host: an address, and the certificate its services show."""

    ref: str
    address: str
    certificate: str
    key: str
    subject: str
    connections: int = 0


@dataclass(eq=False)
class Vdi:
    """A disk. ``data`` is None once it is ``cbt_metadata``."""

    ref: str
    record: Record
    data: bytearray | None
    log: Log | None = None
    readers: int = 0
    busy: int = 0

    @property
    def uuid(self) -> str:
        """Its uuid."""
        return str(self.record["uuid"])


@dataclass
class Trouble:
    """What a test has broken.

    Attributes:
        nbd: whether there is any network that serves NBD.
        insecure_nbd: serve without TLS.
        busy: so often ``data_destroy`` answers VDI_IN_USE for each VDI.
        cbt_error: ``list_changed_blocks`` fails with this SR_BACKEND_FAILURE, once.
        export_error: the export stream is an HTTP error within its 200's body.
        export_cut: the export stream ends after so many bytes.
        import_error: what is imported is lost.
        import_status: the answer to an import, without reading it.
        import_stall_s: before an import is read.
        bad: ranges (vdi uuid or "", offset, length) that NBD cannot read.
        nbd_delay_s: before each NBD reply.
        task_s: how long tasks are pending.
        no_ignore_vdis: VM.snapshot does not know its third parameter (before XAPI 21).
        cap: NBD connections per host.
        redirect: hosts whose export answers 302 to another one.
        location: to this address instead.
        dead: hosts that close every NBD connection.
    """

    nbd: bool = True
    insecure_nbd: bool = False
    busy: int = 1
    cbt_error: str = ""
    export_error: bool = False
    export_cut: int = 0
    import_error: bool = False
    import_status: int = 0
    import_stall_s: float = 0.0
    bad: list[tuple[str, int, int]] = field(default_factory=list)
    nbd_delay_s: float = 0.0
    task_s: float = 0.02
    no_ignore_vdis: bool = False
    cap: int = 16
    dead: list[int] = field(default_factory=list)
    redirect: list[str] = field(default_factory=list)
    location: str = ""


class Pool:
    """Everything there is."""

    def __init__(self, hosts: list[Host], user: str, password: str) -> None:
        self.lock = threading.RLock()
        self.hosts = hosts
        self.user, self.password = user, password
        self.trouble = Trouble()
        self.sessions: set[str] = set()
        self.tables: dict[str, dict[str, Record]] = {
            name: {} for name in ("VM", "VBD", "SR", "VIF", "network", "task")
        }
        self.vdis: dict[str, Vdi] = {}
        self.archive: dict[str, bytes] = {}
        self.served: dict[str, int] = {}
        self.most_connections = 0
        self.logins = 0
        self.web_port = 0
        self.nbd_port = 0
        self.sr = new_ref()
        self.tables["SR"][self.sr] = {
            "uuid": str(uuid.uuid4()),
            "name_label": "Local storage",
            "type": "ext",
            "VDIs": [],
        }

    # --- making things -----------------------------------------------------------------------

    def add_vm(self, name: str, **more: Any) -> str:
        """A running VM without disks."""
        ref = new_ref()
        self.tables["VM"][ref] = {
            "uuid": str(uuid.uuid4()),
            "name_label": name,
            "name_description": "",
            "power_state": "Running",
            "is_a_snapshot": False,
            "is_a_template": False,
            "is_control_domain": False,
            "snapshot_of": NULL,
            "snapshots": [],
            "VBDs": [],
            "VIFs": [],
            "VCPUs_max": 1,
            "memory_static_max": 1 << 30,
            "other_config": {},
            "tags": [],
            **more,
        }
        return ref

    def add_vdi(self, name: str, size: int, *, cbt: bool = False, **more: Any) -> Vdi:
        """An empty disk."""
        ref = new_ref()
        record = {
            "uuid": str(uuid.uuid4()),
            "name_label": name,
            "name_description": "",
            "SR": self.sr,
            "virtual_size": size,
            "type": "user",
            "read_only": False,
            "managed": True,
            "is_a_snapshot": False,
            "snapshot_of": NULL,
            "snapshots": [],
            "snapshot_time": "19700101T00:00:00Z",
            "cbt_enabled": cbt,
            "other_config": {},
            "sm_config": {},
            "VBDs": [],
            **more,
        }
        vdi = Vdi(ref, record, bytearray(size), Log(size) if cbt else None)
        self.vdis[ref] = vdi
        self.tables["SR"][self.sr]["VDIs"].append(ref)
        return vdi

    def add_vbd(self, vm: str, vdi: str, userdevice: str, kind: str = "Disk") -> str:
        """Attach a disk."""
        ref = new_ref()
        running = self.tables["VM"][vm]["power_state"] == "Running"
        self.tables["VBD"][ref] = {
            "uuid": str(uuid.uuid4()),
            "VM": vm,
            "VDI": vdi,
            "userdevice": userdevice,
            "device": f"xvd{chr(97 + int(userdevice))}" if running else "",
            "bootable": userdevice == "0",
            "mode": "RW" if kind == "Disk" else "RO",
            "type": kind,
            "empty": vdi == NULL,
            "currently_attached": running,
        }
        self.tables["VM"][vm]["VBDs"].append(ref)
        if vdi != NULL:
            self.vdis[vdi].record["VBDs"].append(ref)
        return ref

    def add_vif(self, vm: str, mac: str) -> None:
        """A network card, on a network of its own."""
        network, vif = new_ref(), new_ref()
        self.tables["network"][network] = {"uuid": str(uuid.uuid4()), "name_label": "Pool-wide"}
        self.tables["VIF"][vif] = {
            "uuid": str(uuid.uuid4()),
            "VM": vm,
            "device": "0",
            "MAC": mac,
            "MTU": 1500,
            "network": network,
        }
        self.tables["VM"][vm]["VIFs"].append(vif)

    # --- the storage manager -----------------------------------------------------------------

    def vdi(self, ref: str) -> Vdi:
        """By reference."""
        if ref not in self.vdis:
            raise XapiFailure("HANDLE_INVALID", "VDI", ref)
        return self.vdis[ref]

    def vdi_by_uuid(self, text: str) -> Vdi:
        """By uuid or reference."""
        for vdi in self.vdis.values():
            if text in {vdi.uuid, vdi.ref}:
                return vdi
        raise XapiFailure("UUID_INVALID", "VDI", text)

    def write(self, vdi: Vdi, offset: int, data: bytes) -> None:
        """A guest's write."""
        assert vdi.data is not None
        assert offset + len(data) <= len(vdi.data)
        vdi.data[offset : offset + len(data)] = data
        if vdi.log is not None:
            vdi.log.mark(offset, len(data))

    def snapshot_vdi(self, live: Vdi) -> Vdi:
        """As sm does it: the log goes with the snapshot, the live disk begins a new one."""
        snapshot = self.add_vdi(live.record["name_label"], len(live.data or b""))
        assert live.data is not None
        snapshot.data = bytearray(live.data)
        snapshot.record.update(
            is_a_snapshot=True,
            snapshot_of=live.ref,
            snapshot_time=time.strftime("%Y%m%dT%H:%M:%SZ", time.gmtime()),
            cbt_enabled=live.record["cbt_enabled"],
            other_config=dict(live.record["other_config"]),
            virtual_size=live.record["virtual_size"],
        )
        live.record["snapshots"].append(snapshot.ref)
        if live.log is not None:
            snapshot.log = live.log
            live.log = live.log.split()
        snapshot.busy = self.trouble.busy
        self.archive[snapshot.uuid] = bytes(live.data)
        return snapshot

    def enable_cbt(self, vdi: Vdi) -> None:
        """From now on."""
        if not vdi.record["cbt_enabled"]:
            vdi.log = Log(vdi.record["virtual_size"])
            vdi.record["cbt_enabled"] = True

    def disable_cbt(self, vdi: Vdi) -> None:
        """By somebody, or by sm itself after an error."""
        if vdi.log is not None:
            unlink(vdi.log)
        vdi.log = None
        vdi.record["cbt_enabled"] = False

    def resize(self, vdi: Vdi, size: int) -> None:
        """Grow a disk; its log grows with it."""
        assert vdi.data is not None
        old = len(vdi.data)
        vdi.data.extend(bytes(size - old))
        vdi.record["virtual_size"] = size
        if vdi.log is not None:
            grown = Log(size, vdi.log.before, vdi.log.after)
            grown.bits[: len(vdi.log.bits)] = vdi.log.bits
            if vdi.log.before is not None:
                vdi.log.before.after = grown
            vdi.log = grown

    def destroy_vdi(self, vdi: Vdi) -> None:
        """Gone, with its attachments."""
        if vdi.readers:
            raise XapiFailure("VDI_IN_USE", vdi.ref, "destroy")
        if vdi.log is not None:
            merge_into_next(vdi.log)
        for ref in vdi.record["VBDs"]:
            vbd = self.tables["VBD"].pop(ref, None)
            if vbd is not None and vbd["VM"] in self.tables["VM"]:
                self.tables["VM"][vbd["VM"]]["VBDs"].remove(ref)
        parent = self.vdis.get(vdi.record["snapshot_of"])
        if parent is not None and vdi.ref in parent.record["snapshots"]:
            parent.record["snapshots"].remove(vdi.ref)
        self.tables["SR"][self.sr]["VDIs"].remove(vdi.ref)
        del self.vdis[vdi.ref]

    def bitmap_text(self, bits: bytes) -> str:
        """As ``list_changed_blocks`` returns it."""
        return base64.b64encode(bits).decode()
