"""Ceph's RADOS Gateway as an S3 service: a monitor, one OSD in memory, the gateway.

::

    radosgw  beast on loopback ──> ceph-osd  memstore, one replica ──> ceph-mon  no authentication

As small as a cluster gets: no manager, no messenger v2, everything below the check's directory
and nothing in /etc/ceph. Ready in some fifteen seconds. Debian's ``radosgw ceph-mon ceph-osd``.
"""

import os
import subprocess
import time
import uuid

from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.process import find_program, kill_group, tail
from conformance.service import ObjectService, free_ports, is_listening

__all__ = ["RadosGateway"]

LIFE_S = 900
START_TIMEOUT_S = 60.0
USER = "tester"

_CONFIG = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor}
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
mon allow pool size one = true
osd crush chooseleaf type = 0
osd crush initial weight = 1
osd objectstore = memstore
memstore device bytes = 1073741824
run dir = {home}
admin socket = {home}/$name.sock
log file = {home}/$name.log
keyring = {home}/keyring
mon data = {home}/mon
osd data = {home}/osd
rgw data = {home}/rgw
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


class RadosGateway(ObjectService):
    """A running gateway. Ends with the check, and by itself after ``LIFE_S``."""

    NEEDS = (
        *("timeout", "ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool"),
        *("radosgw", "radosgw-admin"),
    )
    name = "Ceph RGW"
    access_key = USER
    secret_key = "not-a-secret"

    def __init__(self, context: Context) -> None:
        """Start it.

        Raises:
            MissingPeerError: it is not installed.
            CheckFailedError: it did not start.
        """
        self._context = context
        self._home = context.directory / "ceph"
        for name in ("mon", "osd", "rgw"):
            (self._home / name).mkdir(parents=True)
        monitor, gateway = free_ports(2)
        self.endpoint = f"http://127.0.0.1:{gateway}"
        self._cluster = str(uuid.uuid4())
        config = _CONFIG.format(
            fsid=self._cluster, home=self._home, monitor=monitor, gateway=gateway
        )
        (self._home / "ceph.conf").write_text(config)
        self._variables = {"CEPH_CONF": str(self._home / "ceph.conf")}
        self._start_monitor(monitor)
        self._start_disk()
        self._start_gateway(gateway)

    def said(self) -> str:
        """The end of what the daemons logged, in one line."""
        logs = sorted(self._home.glob("*.out"))
        return "; ".join(f"{log.stem}: {tail(log.read_text(errors='replace'), 2)}" for log in logs)

    def _start_monitor(self, port: int) -> None:
        keyring, initial = self._home / "keyring", self._home / "monmap"
        self._run("ceph-authtool", "--create-keyring", keyring, "-n", "mon.", "--gen-key")
        address = ("--addv", "a", f"[v1:127.0.0.1:{port}]")
        self._run("monmaptool", "--create", *address, "--fsid", self._cluster, initial)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", initial)
        self._start("ceph-mon", "-i", "a", "-f")

    def _start_disk(self) -> None:
        name = str(uuid.uuid4())
        self._run("ceph", "osd", "new", name)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)
        self._start("ceph-osd", "-i", "0", "-f")

    def _start_gateway(self, port: int) -> None:
        process = self._start("radosgw", "-n", "client.rgw", "-f")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise CheckFailedError(f"radosgw did not get ready: {self.said()}")
            time.sleep(0.1)
        keys = ("--access-key", self.access_key, "--secret-key", self.secret_key)
        self._run("radosgw-admin", "user", "create", "--uid", USER, "--display-name", USER, *keys)

    def _run(self, *words: object) -> None:
        arguments = [str(word) for word in words]
        self._context.run(*arguments, environment=self._variables, timeout_s=START_TIMEOUT_S)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        limited = (find_program("timeout"), "--kill-after=5", str(LIFE_S), *words)
        with (self._home / f"{words[0]}.out").open("wb") as log:
            process = subprocess.Popen(
                limited,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._variables},
                start_new_session=True,
            )
        self._context.at_end(kill_group, process)
        return process
