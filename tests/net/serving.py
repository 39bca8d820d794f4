"""``nbdsrv serve`` as a process, watched from outside: /proc, its clients, what it logs.

Rule: a server that logged a bug of its own (``session.bug``, a traceback) fails the test that
made it, whatever the client saw.
"""

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wire import Address, Wire

from protocol import uri

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0
STOP_S = 20.0
POLL_S = 0.005
_OUR_FAULT = re.compile(
    r"Traceback|session\.bug|Exception ignored|never retrieved|[a-zA-Z]Warning:"
)


def eventually(what: Callable[[], bool], *, within: float = 10.0) -> bool:
    """Poll until ``what()``; False if it never came true."""
    deadline = time.monotonic() + within
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def command(*arguments: str | Path) -> list[str]:
    """The command line of this checkout's ``nbdsrv serve``."""
    return [sys.executable, "-W", "default", "-m", "nbdsrv", "serve", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """Ours, without what would configure the server behind the test's back."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NBDSRV_")}
    for key in ("LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET"):
        kept.pop(key, None)
    return {**kept, "PYTHONPATH": str(ROOT), **extra}


class ServerProcess:
    """A running server. ``stop`` it, or leave that to the fixture.

    Attributes:
        uris: what it printed, one per export and listener.
        clients: connections made through ``connect``, closed by ``hang_up``.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        uris: int = 1,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int | None = subprocess.DEVNULL,
    ) -> None:
        self.clients: list[Wire] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._seen = 0
        self.process = subprocess.Popen(
            arguments,
            env=dict(env or environment()),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=self._log,
            pass_fds=pass_fds,
        )
        self.pid = self.process.pid
        try:
            lines = self._read_lines(uris)
        except BaseException:
            self._kill()
            raise
        self.uris = [uri.parse(line) for line in lines]

    def _read_lines(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + START_S
        data = b""
        while data.count(b"\n") < count:
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(fd, 65536) if ready else b""
            assert chunk, f"no URI from the server; it said: {self.log()}"
            data += chunk
        return data.decode().splitlines()

    # --- clients ---------------------------------------------------------------------------

    def address(self, index: int = 0) -> Address:
        """Where the ``index``-th URI points."""
        found = self.uris[index]
        if found.socket is not None:
            return found.socket
        assert found.host is not None
        return found.host, found.port or 10809

    def connect(self, index: int = 0, *, receive_buffer: int = 0) -> Wire:
        """A new client, before its handshake."""
        client = Wire.connect(self.address(index), receive_buffer=receive_buffer)
        self.clients.append(client)
        return client

    def hang_up(self) -> None:
        """Close all clients made by ``connect``."""
        for client in self.clients:
            client.close()
        self.clients.clear()

    # --- from outside ------------------------------------------------------------------------

    def descriptors(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def opened(self, path: Path) -> bool:
        """Has it this file open?"""
        folder = f"/proc/{self.pid}/fd"
        for name in os.listdir(folder):
            try:
                if os.readlink(f"{folder}/{name}") == str(path):
                    return True
            except FileNotFoundError:
                continue
        return False

    def resident(self) -> int:
        """Bytes of memory (VmRSS)."""
        with open(f"/proc/{self.pid}/status") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) << 10
        raise AssertionError("no VmRSS")

    def log(self) -> str:
        """All it has logged."""
        return os.pread(self._log.fileno(), 1 << 22, 0).decode(errors="replace")

    def check_log(self) -> None:
        """Nothing new in the log is our own fault."""
        new = self.log()[self._seen :]
        self._seen += len(new)
        assert not _OUR_FAULT.search(new), new[-4000:]

    def is_alive(self) -> bool:
        """Still running?"""
        return self.process.poll() is None

    # --- ending --------------------------------------------------------------------------------

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(STOP_S)

    def stop(self) -> None:
        """SIGTERM unless it has ended already; exit code 0 and a clean log are demanded."""
        self.hang_up()
        try:
            if self.is_alive():
                self.terminate()
            assert self.wait() == 0, self.log()[-4000:]
            self.check_log()
        finally:
            self._kill()

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
