"""XAPI's methods, those a backup uses and what a person would look with.

``session.login_with_password``, getters and setters of VM, VDI, VBD, SR, VIF and task, snapshots,
CBT, NBD, and ``Async.`` of all that take time. Errors are XAPI's codes with XAPI's details.
"""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

from conformance.xapi.pool import Host, Pool, Record, Vdi, XapiFailure, new_ref
from conformance.xapi.tracking import changed_between

__all__ = ["Calls"]

READ = "get_"
CLASSES = ("VM", "VBD", "VDI", "SR", "VIF", "network", "task")


class Calls:
    """One host's XAPI."""

    def __init__(self, pool: Pool, host: Host) -> None:
        self.pool = pool
        self.host = host
        self._session = ""
        self._methods: dict[str, Callable[..., Any]] = {
            "session.logout": self._logout,
            "VM.snapshot": self._snapshot_vm,
            "VM.destroy": self._destroy_vm,
            "VDI.snapshot": lambda ref: self.pool.snapshot_vdi(self.pool.vdi(ref)).ref,
            "VDI.destroy": self._destroy_vdi,
            "VDI.data_destroy": self._data_destroy,
            "VDI.enable_cbt": self._enable_cbt,
            "VDI.disable_cbt": self._disable_cbt,
            "VDI.list_changed_blocks": self._list_changed_blocks,
            "VDI.get_nbd_info": self._nbd_info,
            "VDI.create": self._create_vdi,
            "task.create": self._create_task,
            "task.destroy": self._destroy_task,
        }

    def call(self, method: str, parameters: list[Any]) -> Any:
        """Answer one call.

        Raises:
            XapiFailure: what XAPI answers with instead.
        """
        with self.pool.lock:
            if method == "session.login_with_password":
                return self._login(*parameters)
            if not parameters or parameters[0] not in self.pool.sessions:
                raise XapiFailure("SESSION_INVALID", str(parameters[0]) if parameters else "")
            if self.host is not self.pool.hosts[0]:
                raise XapiFailure("HOST_IS_SLAVE", self.pool.hosts[0].address)
            self._session = parameters[0]
            if method.startswith("Async."):
                return self._begin(method.removeprefix("Async."), parameters[1:])
            return self._now(method, parameters[1:])

    def _now(self, method: str, parameters: list[Any]) -> Any:
        known = self._methods.get(method)
        if known is not None:
            try:
                return known(*parameters)
            except TypeError as error:
                if "positional argument" not in str(error):
                    raise
                expected = str(known.__code__.co_argcount)
                raise XapiFailure(
                    "MESSAGE_PARAMETER_COUNT_MISMATCH", method, expected, str(len(parameters))
                ) from error
        kind, _, verb = method.partition(".")
        if kind in CLASSES:
            return self._accessor(kind, verb, parameters)
        raise XapiFailure("MESSAGE_METHOD_UNKNOWN", method)

    # --- sessions and tasks ------------------------------------------------------------------

    def _login(self, user: str, password: str, *_: str) -> str:
        if self.host is not self.pool.hosts[0]:
            raise XapiFailure("HOST_IS_SLAVE", self.pool.hosts[0].address)
        if (user, password) != (self.pool.user, self.pool.password):
            raise XapiFailure("SESSION_AUTHENTICATION_FAILED", user, "Authentication failure")
        session = new_ref()
        self.pool.sessions.add(session)
        self.pool.logins += 1
        return session

    def _logout(self) -> str:
        self.pool.sessions.discard(self._session)
        return ""

    def _create_task(self, label: str, _: str) -> str:
        return self._new_task(label)

    def _destroy_task(self, ref: str) -> str:
        if self.pool.tables["task"].pop(ref, None) is None:
            raise XapiFailure("HANDLE_INVALID", "task", ref)
        return ""

    def _new_task(self, label: str) -> str:
        ref = new_ref()
        self.pool.tables["task"][ref] = {
            "uuid": str(uuid.uuid4()),
            "name_label": label,
            "status": "pending",
            "progress": 0.0,
            "result": "",
            "error_info": [],
        }
        return ref

    def _begin(self, method: str, parameters: list[Any]) -> str:
        ref = self._new_task(f"Async.{method}")
        # Daemon: a task that is under way when the simulator ends ends with it.
        threading.Thread(target=self._work, args=(ref, method, parameters), daemon=True).start()
        return ref

    def _work(self, ref: str, method: str, parameters: list[Any]) -> None:
        time.sleep(self.pool.trouble.task_s)
        with self.pool.lock:
            task = self.pool.tables["task"].get(ref, {})
            try:
                result = self._now(method, parameters)
            except XapiFailure as failure:
                task.update(status="failure", error_info=failure.words)
            else:
                # Results of tasks are XML in every dialect, and nothing for nothing.
                text = f"<value>{escape(str(result))}</value>" if result != "" else ""
                task.update(status="success", progress=1.0, result=text)

    # --- records -----------------------------------------------------------------------------

    def _records(self, kind: str) -> dict[str, Record]:
        if kind == "VDI":
            return {ref: vdi.record for ref, vdi in self.pool.vdis.items()}
        return self.pool.tables[kind]

    def _accessor(self, kind: str, verb: str, parameters: list[Any]) -> Any:
        records = self._records(kind)
        if verb == "get_all_records":
            return records
        if verb == "get_all":
            return list(records)
        if verb == "get_by_uuid":
            for ref, record in records.items():
                if record["uuid"] == parameters[0]:
                    return ref
            raise XapiFailure("UUID_INVALID", kind, str(parameters[0]))
        if verb == "get_by_name_label":
            return [ref for ref, each in records.items() if each["name_label"] == parameters[0]]
        found = records.get(parameters[0]) if parameters else None
        if found is None:
            raise XapiFailure("HANDLE_INVALID", kind, str(parameters[0]) if parameters else "")
        return self._on_record(f"{kind}.{verb}", verb, found, parameters[1:])

    def _on_record(self, method: str, verb: str, record: Record, values: list[Any]) -> Any:
        if verb == "get_record":
            return record
        if verb.startswith(READ) and verb.removeprefix(READ) in record:
            return record[verb.removeprefix(READ)]
        if verb == "add_to_other_config":
            if values[0] in record["other_config"]:
                raise XapiFailure("MAP_DUPLICATE_KEY", method, *map(str, values))
            record["other_config"][values[0]] = values[1]
            return ""
        if verb == "remove_from_other_config":
            record["other_config"].pop(values[0], None)
            return ""
        if verb == "set_name_label":
            record["name_label"] = values[0]
            return ""
        raise XapiFailure("MESSAGE_METHOD_UNKNOWN", method)

    # --- VMs ---------------------------------------------------------------------------------

    def _snapshot_vm(self, vm: str, name: str, ignored: list[str] | None = None) -> str:
        if ignored is not None and self.pool.trouble.no_ignore_vdis:
            raise XapiFailure("MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "3", "4")
        record = self.pool.tables["VM"].get(vm)
        if record is None:
            raise XapiFailure("HANDLE_INVALID", "VM", vm)
        config = {**record["other_config"]}
        ref = self.pool.add_vm(name, is_a_snapshot=True, snapshot_of=vm, other_config=config)
        self.pool.tables["VM"][ref]["power_state"] = "Halted"
        record["snapshots"].append(ref)
        for each in record["VBDs"]:
            vbd = self.pool.tables["VBD"][each]
            if vbd["type"] != "Disk" or vbd["VDI"] in (ignored or ()):
                continue
            snapshot = self.pool.snapshot_vdi(self.pool.vdi(vbd["VDI"]))
            self.pool.add_vbd(ref, snapshot.ref, vbd["userdevice"])
        return ref

    def _destroy_vm(self, ref: str) -> str:
        """XAPI leaves the disks alone."""
        record = self.pool.tables["VM"].pop(ref, None)
        if record is None:
            raise XapiFailure("HANDLE_INVALID", "VM", ref)
        for each in record["VBDs"]:
            vbd = self.pool.tables["VBD"].pop(each)
            if vbd["VDI"] in self.pool.vdis:
                self.pool.vdis[vbd["VDI"]].record["VBDs"].remove(each)
        parent = self.pool.tables["VM"].get(record["snapshot_of"])
        if parent is not None:
            parent["snapshots"].remove(ref)
        return ""

    # --- disks -------------------------------------------------------------------------------

    def _create_vdi(self, record: Record) -> str:
        size = int(record["virtual_size"])
        return self.pool.add_vdi(str(record["name_label"]), size).ref

    def _destroy_vdi(self, ref: str) -> str:
        vdi = self.pool.vdi(ref)
        self._refuse_in_use(vdi, "destroy")
        self.pool.destroy_vdi(vdi)
        return ""

    def _refuse_in_use(self, vdi: Vdi, operation: str) -> None:
        attached = [self.pool.tables["VBD"][ref] for ref in vdi.record["VBDs"]]
        if vdi.readers or any(vbd["currently_attached"] for vbd in attached):
            raise XapiFailure("VDI_IN_USE", vdi.ref, operation)

    def _enable_cbt(self, ref: str) -> str:
        vdi = self.pool.vdi(ref)
        if vdi.record["is_a_snapshot"]:
            raise XapiFailure("OPERATION_NOT_ALLOWED", "VDI is a snapshot")
        self.pool.enable_cbt(vdi)
        return ""

    def _disable_cbt(self, ref: str) -> str:
        self.pool.disable_cbt(self.pool.vdi(ref))
        return ""

    def _data_destroy(self, ref: str) -> str:
        vdi = self.pool.vdi(ref)
        if not vdi.record["is_a_snapshot"]:
            raise XapiFailure("OPERATION_NOT_ALLOWED", "VDI is not a snapshot")
        if not vdi.record["cbt_enabled"]:
            raise XapiFailure("VDI_NO_CBT_METADATA", ref)
        if vdi.record["VBDs"] or vdi.readers or vdi.busy > 0:  # also those of a VM's snapshot
            vdi.busy -= not vdi.record["VBDs"]
            raise XapiFailure("VDI_IN_USE", ref, "data_destroy")
        vdi.data = None
        vdi.record.update(type="cbt_metadata", cbt_enabled=True)
        return ""

    def _list_changed_blocks(self, older: str, newer: str) -> str:
        source, target = self.pool.vdi(older), self.pool.vdi(newer)
        for vdi in (source, target):
            if not vdi.record["cbt_enabled"] or vdi.log is None:
                raise XapiFailure("VDI_NO_CBT_METADATA", vdi.ref)
        if any(self._attached(ref) for ref in target.record["VBDs"]) or target.readers:
            raise XapiFailure("VDI_IN_USE", newer, "list_changed_blocks")
        trouble, self.pool.trouble.cbt_error = self.pool.trouble.cbt_error, ""
        if trouble:
            text = f"Failed to calculate changed blocks for given VDIs. [opterr={trouble}]"
            raise XapiFailure("SR_BACKEND_FAILURE_460", "", text, "")
        assert source.log is not None
        assert target.log is not None
        bits = changed_between(source.log, target.log)
        if bits is None:
            text = "Failed to calculate changed blocks for given VDIs."
            unrelated = f"{text} [opterr=Source and target VDI are unrelated]"
            raise XapiFailure("SR_BACKEND_FAILURE_460", "", unrelated, "")
        return self.pool.bitmap_text(bits)

    def _attached(self, vbd: str) -> bool:
        return bool(self.pool.tables["VBD"][vbd]["currently_attached"])

    def _nbd_info(self, ref: str) -> list[Record]:
        vdi = self.pool.vdi(ref)
        if vdi.record["type"] == "cbt_metadata":
            raise XapiFailure("VDI_INCOMPATIBLE_TYPE", ref, "cbt_metadata")
        if not self.pool.trouble.nbd:
            return []
        return [
            {
                "exportname": f"/{vdi.uuid}?session_id={self._session}",
                "address": host.address,
                "port": self.pool.nbd_port,
                "cert": host.certificate,
                "subject": host.subject,
            }
            for host in self.pool.hosts
        ]
