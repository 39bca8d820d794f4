"""The test's hand in the simulator: lines of JSON on a Unix socket, one answer to each.

::

    {"do": "vm", "name": "web", "disks": [{"name": "root", "size": 8388608, "cbt": true}]}
    {"do": "write", "vdi": UUID, "offset": 0, "data": BASE64}
    {"do": "trouble", "nbd": false}                 any attribute of ``pool.Trouble``
    {"do": "guest", "vdi": UUID, "seed": 1}         writes at random places until "quiet"

What was done is ``{"ok": ...}``, what could not be ``{"error": TEXT}``.
"""

import base64
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from conformance.xapi.pool import NULL, Pool, XapiFailure

__all__ = ["Control"]

GUEST_PAUSE_S = 0.001
GUEST_WRITE = 12_288


class Control:
    """Listens until the process ends."""

    def __init__(self, pool: Pool, path: str) -> None:
        self._pool = pool
        self._guests: dict[str, threading.Event] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._verbs: dict[str, Callable[..., Any]] = {
            "vm": self._vm,
            "write": self._write,
            "content": self._content,
            "archived": self._archived,
            "trouble": self._trouble,
            "guest": self._guest,
            "quiet": self._quiet,
            "cbt": self._cbt,
            "resize": self._resize,
            "destroy": self._destroy,
            "move": self._move,
            "sm_config": self._sm_config,
            "stop_nbd": self._stop_nbd,
            "expire": self._expire,
            "state": self._state,
            "vdis": self._vdis,
        }
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rwb") as lines:
            for line in lines:
                order = json.loads(line)
                try:
                    verb = self._verbs[order.pop("do")]
                    with self._pool.lock:
                        answer = {"ok": verb(**order)}
                except (XapiFailure, KeyError, TypeError, AssertionError) as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                lines.write(json.dumps(answer).encode() + b"\n")
                lines.flush()

    def _vm(self, name: str, disks: list[dict[str, Any]]) -> dict[str, Any]:
        pool = self._pool
        vm = pool.add_vm(name)
        found = []
        for number, disk in enumerate(disks):
            vdi = pool.add_vdi(disk["name"], disk["size"], cbt=disk.get("cbt", False))
            pool.add_vbd(vm, vdi.ref, str(disk.get("device", number)))
            found.append(vdi.uuid)
        pool.add_vbd(vm, NULL, "9", "CD")
        pool.add_vif(vm, "02:00:00:12:34:56")
        return {"uuid": pool.tables["VM"][vm]["uuid"], "vdis": found}

    def _write(self, vdi: str, offset: int, data: str) -> None:
        self._pool.write(self._pool.vdi_by_uuid(vdi), offset, base64.b64decode(data))

    def _content(self, vdi: str) -> str | None:
        data = self._pool.vdi_by_uuid(vdi).data
        return None if data is None else base64.b64encode(data).decode()

    def _archived(self, vdi: str) -> str:
        """A snapshot as it was taken, though it may be gone."""
        return base64.b64encode(self._pool.archive[vdi]).decode()

    def _trouble(self, **changes: Any) -> None:
        for name, value in changes.items():
            assert hasattr(self._pool.trouble, name), name
            setattr(self._pool.trouble, name, value)

    def _guest(self, vdi: str, seed: int) -> None:
        stop = self._guests[vdi] = threading.Event()
        threading.Thread(target=self._scribble, args=(vdi, seed, stop), daemon=True).start()

    def _scribble(self, uuid: str, seed: int, stop: threading.Event) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            with self._pool.lock:
                vdi = self._pool.vdi_by_uuid(uuid)
                size = len(vdi.data or b"")
                length = chance.randrange(1, min(GUEST_WRITE, size))
                data = bytes(length) if chance.random() < 0.2 else chance.randbytes(length)
                self._pool.write(vdi, chance.randrange(size - length + 1), data)
            time.sleep(GUEST_PAUSE_S)

    def _quiet(self, vdi: str) -> None:
        self._guests.pop(vdi).set()

    def _cbt(self, vdi: str, on: bool) -> None:  # noqa: FBT001 - a key in a line of JSON
        found = self._pool.vdi_by_uuid(vdi)
        (self._pool.enable_cbt if on else self._pool.disable_cbt)(found)

    def _resize(self, vdi: str, size: int) -> None:
        self._pool.resize(self._pool.vdi_by_uuid(vdi), size)

    def _destroy(self, vdi: str) -> None:
        self._pool.destroy_vdi(self._pool.vdi_by_uuid(vdi))

    def _move(self, vdi: str) -> str:
        """As a migration does it: the same disk in a new VDI without a history."""
        pool = self._pool
        old = pool.vdi_by_uuid(vdi)
        new = pool.add_vdi(old.record["name_label"], len(old.data or b""), cbt=True)
        assert old.data is not None
        assert new.data is not None
        new.data[:] = old.data
        for ref in old.record["VBDs"]:
            pool.tables["VBD"][ref]["VDI"] = new.ref
            new.record["VBDs"].append(ref)
        old.record["VBDs"].clear()
        return new.uuid

    def _sm_config(self, vdi: str, key: str, value: str) -> None:
        self._pool.vdi_by_uuid(vdi).record["sm_config"][key] = value

    def _stop_nbd(self, host: int) -> None:
        self._pool.trouble.dead.append(host)

    def _expire(self) -> None:
        """All sessions die."""
        self._pool.sessions.clear()

    def _state(self) -> dict[str, Any]:
        pool = self._pool
        return {
            "sessions": len(pool.sessions),
            "logins": pool.logins,
            "tasks": len(pool.tables["task"]),
            "snapshots": [
                vm["name_label"] for vm in pool.tables["VM"].values() if vm["is_a_snapshot"]
            ],
            "served": dict(pool.served),
            "most_connections": pool.most_connections,
            "connections": [host.connections for host in pool.hosts],
        }

    def _vdis(self) -> list[dict[str, Any]]:
        keys = ("uuid", "name_label", "type", "is_a_snapshot", "cbt_enabled", "other_config")
        return [{key: vdi.record[key] for key in keys} for vdi in self._pool.vdis.values()]
