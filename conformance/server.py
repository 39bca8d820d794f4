"""Our server as a process: started by its command line, ended by SIGTERM.

The URIs handed to peers are built here from the addresses the server was told to listen on;
the ones it prints are what tells us that it is ready, and are checked on their own.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

from conformance.outcome import CheckFailedError
from conformance.process import PROJECT, kill_group, tail

__all__ = ["Server", "Tls", "server_command", "server_environment"]

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server does TLS: its key pair, the CA it demands of clients, and when."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    mode: str = "required"
    only_for: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command line of ``nbdsrv serve`` for this."""
        words = ["--tls-cert", str(self.certificate), "--tls-key", str(self.key)]
        if self.client_ca is not None:
            words += ["--tls-ca", str(self.client_ca)]
        words += ["--tls", self.mode]
        for name in self.only_for:
            words += ["--tls-export", name]
        return words


def server_command(*arguments: str | Path) -> list[str]:
    """``nbdsrv serve`` of this checkout, by this interpreter."""
    return [sys.executable, "-m", "nbdsrv", "serve", *map(str, arguments)]


def server_environment() -> dict[str, str]:
    """What that command needs to find this checkout from any directory."""
    path = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


def _free_port(family: socket.AddressFamily, host: str) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Server:
    """One ``nbdsrv serve``. Not reusable: start once, stop or close once."""

    def __init__(
        self,
        directory: Path,
        *,
        sources: Sequence[str | Path],
        exports: Mapping[str, Path],
        listen: Sequence[str],
        write: bool,
        tls: Tls | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.tls = tls
        self._environment = {**os.environ, **server_environment(), **(environment or {})}
        self.socket = directory / f"s{time.monotonic_ns() % 10**9}"
        self.host = ""
        self.port = 0
        self.printed: list[str] = []
        self._expected_lines = len(sources) + len(exports)
        self._errors = directory / f"{self.socket.name}.stderr"
        self._directory = directory
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        words: list[str | Path] = list(sources)
        for name, path in exports.items():
            words += ["--export", f"{name}={path}"]
        for kind in listen:
            words += ["--listen", self._address(kind)]
        words += ["--write"] if write else []
        words += tls.arguments() if tls else []
        self._command = server_command(*words)

    def _address(self, kind: str) -> str:
        if kind == "unix":
            return f"unix:{self.socket}"
        if kind == "tcp":
            self.host, self.port = "127.0.0.1", _free_port(socket.AF_INET, "127.0.0.1")
        else:
            self.host, self.port = "[::1]", _free_port(socket.AF_INET6, "::1")
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def start(self) -> None:
        """Start it and wait for its URIs.

        Raises:
            CheckFailedError: it ended instead, or said nothing for 20 s.
        """
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment,
                start_new_session=True,
            )
        threading.Thread(target=self._read_lines, daemon=True).start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self.printed) < self._expected_lines:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise CheckFailedError(
                    f"nbdsrv printed {len(self.printed)} of {self._expected_lines} URIs in "
                    f"{START_TIMEOUT_S:g} s; stderr: {self.stderr()}"
                ) from None
            if line is None:
                raise CheckFailedError(f"nbdsrv did not start: {self.stderr()}")
            self.printed.append(line)

    def _read_lines(self) -> None:
        stdout = self._running().stdout
        if stdout is not None:
            for line in stdout:
                self._lines.put(line.decode(errors="replace").strip())
        self._lines.put(None)

    def stderr(self) -> str:
        """The end of what the server wrote to stderr."""
        return tail(self._errors.read_text(errors="replace"), lines=6)

    def uri(self, name: str = "", *, tcp: bool = False, tls: bool = False, **query: str) -> str:
        """The URI of one export; ``query`` adds parameters, with ``_`` standing for ``-``."""
        scheme = "nbds" if tls else "nbd"
        parameters = {key.replace("_", "-"): value for key, value in query.items()}
        export = quote(name, safe="")
        if tcp:
            base = f"{scheme}://{self.host}:{self.port}/{export}"
        else:
            base = f"{scheme}+unix:///{export}"
            parameters = {"socket": str(self.socket), **parameters}
        return f"{base}?{urlencode(parameters, safe='/')}" if parameters else base

    def stop(self) -> None:
        """SIGTERM, then wait; idempotent.

        Raises:
            CheckFailedError: it stayed for 20 s, left with another code than 0, or had a
                traceback on its stderr.
        """
        process = self._running()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        self.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash; nothing is judged, now or when the check is over."""
        kill_group(self._running())
        self._process = None

    def wait(self) -> None:
        """Wait for its end and judge it, as :meth:`stop` does."""
        process = self._running()
        try:
            code = process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill_group(process)
            raise CheckFailedError(
                f"nbdsrv was still there {STOP_TIMEOUT_S:g} s after SIGTERM; "
                f"stderr: {self.stderr()}"
            ) from None
        if code != 0:
            raise CheckFailedError(f"nbdsrv exited {code}; stderr: {self.stderr()}")
        if "Traceback" in self._errors.read_text(errors="replace"):
            raise CheckFailedError(f"nbdsrv printed a traceback: {self.stderr()}")

    def close(self) -> None:
        """Stop it if it ever started; errors as :meth:`stop`."""
        if self._process is not None:
            self.stop()
