"""OpenStack Swift as an S3 service: four real servers on loopback, one device, one user.

::

    proxy-server   s3api (signatures, If-None-Match) + tempauth        http://127.0.0.1:PORT
      ├── account-server      lists of buckets
      ├── container-server    lists of objects
      └── object-server       objects: files with extended attributes, each put fsynced

Swift comes from PyPI into an environment of its own in the cache directory, made once; nothing
of this machine's own configuration is read or written (``swift_dir`` in each server's file takes
the place of /etc/swift). A server ends with its check, and by itself after ``LIFE_S``.
"""

import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

from conformance.context import Context
from conformance.download import cached
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import kill_group, run, tail
from conformance.service import ObjectService, free_ports, is_listening

__all__ = ["Swift"]

VERSION = "2.38.3"
REQUIREMENTS = (f"swift=={VERSION}", "setuptools<81")
"""pyeclib needs pkg_resources, which later setuptools do not have."""

LIFE_S = 900
START_TIMEOUT_S = 20.0
INSTALL_TIMEOUT_S = 300
SERVERS = ("account", "container", "object", "proxy")
ACCESS_KEY = "nbdsrv:tester"
SECRET_KEY = "not-a-secret"

_COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {home}
devices = {home}/devices
mount_check = false
workers = 0
user = {user}
fallocate_reserve = 0
log_level = WARNING
"""

_BACKEND = """
[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
"""

_PROXY = """
[pipeline:main]
pipeline = catch_errors s3api tempauth slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:slo]
use = egg:swift#slo

[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
"""

_RINGS = """\
import sys
from swift.common.ring import RingBuilder
home, *rings = sys.argv[1:]
for ring in rings:
    name, port = ring.split("=")
    builder = RingBuilder(4, 1, 0)  # 16 partitions, one replica, moved without a pause
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "disk",
                     "ip": "127.0.0.1", "port": int(port)})
    builder.rebalance()
    builder.get_ring().save(f"{home}/{name}.ring.gz")
"""

_SERVER = """\
import signal, sys
signal.alarm({life})
from swift.{module}.server import main
sys.exit(main())
"""
"""A server makes itself the leader of a session: timeout(1) around it would not end it."""


def _environment() -> Path:
    """Swift's own virtual environment, made first if need be."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"

    def fill(place: Path) -> None:
        run((sys.executable, "-m", "venv", place), directory=place, timeout_s=60)
        pip = (place / "bin" / "python", "-m", "pip", "install", "--quiet", *REQUIREMENTS)
        run(pip, directory=place, timeout_s=INSTALL_TIMEOUT_S)

    return cached(f"swift-{VERSION}-python{python}", fill)


class Swift(ObjectService):
    """A running Swift. Ends with the check."""

    name = "Swift"
    access_key = ACCESS_KEY
    secret_key = SECRET_KEY

    def __init__(self, context: Context) -> None:
        """Start it, and wait until all four servers accept connections: two seconds or so.

        Raises:
            MissingPeerError: Swift cannot be installed, or the check's directory has no xattrs.
            CheckFailedError: it did not start.
        """
        self._context = context
        self._home = context.directory / "swift"
        (self._home / "devices" / "disk").mkdir(parents=True)
        _require_xattrs(self._home)
        # The scripts pip made name the place they were made in; the interpreter does not.
        self._python = _environment() / "bin" / "python"
        self._ports = dict(zip(SERVERS, free_ports(len(SERVERS)), strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = {name: self._home / f"{name}.log" for name in SERVERS}
        self.endpoint = f"http://127.0.0.1:{self._ports['proxy']}"
        self._configure()
        for name in SERVERS:
            self._start(name)
        self._await()

    def said(self) -> str:
        """The end of what the servers logged, in one line."""
        ends = {name: tail(log.read_text(errors="replace"), 2) for name, log in self._logs.items()}
        return "; ".join(f"{name}: {end}" for name, end in ends.items() if end != "(silent)")

    def _configure(self) -> None:
        suffix = "[swift-hash]\nswift_hash_path_suffix = conformance\n"
        (self._home / "swift.conf").write_text(suffix)
        for name, port in self._ports.items():
            user = _user_name()
            text = _COMMON.format(port=port, home=self._home, user=user)
            proxy = _PROXY.format(user=ACCESS_KEY.replace(":", "_"), secret=SECRET_KEY)
            text += proxy if name == "proxy" else _BACKEND.format(name=name)
            (self._home / f"{name}.conf").write_text(text)
        rings = [f"{name}={self._ports[name]}" for name in SERVERS[:3]]
        self._context.run(self._python, "-c", _RINGS, self._home, *rings)

    def _start(self, name: str) -> None:
        code = _SERVER.format(module="obj" if name == "object" else name, life=LIFE_S)
        words = (self._python, "-c", code, self._home / f"{name}.conf", "--verbose")
        with self._logs[name].open("ab") as log:
            process = subprocess.Popen(
                words,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        self._context.at_end(kill_group, process)

    def crash(self) -> None:
        """SIGKILL to what answers requests; connections are refused from now on."""
        kill_group(self._processes["proxy"])

    def revive(self) -> None:
        """Start it again, at the same place."""
        self._start("proxy")
        self._await()

    def _await(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for name, port in self._ports.items():
            while not is_listening(port):
                if time.monotonic() > deadline:
                    raise CheckFailedError(f"Swift's {name} server did not start: {self.said()}")
                time.sleep(0.05)


def _require_xattrs(directory: Path) -> None:
    try:
        os.setxattr(directory, "user.nbdsrv", b"1")
    except OSError as error:
        raise MissingPeerError(f"Swift needs extended attributes in {directory}: {error}") from None


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise MissingPeerError(f"Swift needs the user {os.geteuid()} to have a name") from None
