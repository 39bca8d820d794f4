"""Our server for a machine: on one socket, with overlays, killed and started again at will."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.process import kill_group, tail
from conformance.server import server_command, server_environment

__all__ = ["ServedOverlay"]

START_S = 30.0
STOP_S = 30.0


class ServedOverlay:
    """``nbdsrv serve SOURCE --overlay ov``, again and again with the same words.

    Attributes:
        socket: where it listens.
        overlays: the directory.
        started_s: seconds from the start of the process until it accepted clients, of the last.
        began: when that was, on the monotonic clock.
    """

    def __init__(
        self,
        context: Context,
        source: str,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it."""
        self.socket = context.directory / f"n{time.monotonic_ns() % 10**9}"
        self.overlays = context.directory / "ov"
        self.started_s = self.began = 0.0
        self._environment = {**os.environ, **server_environment(), **(environment or {})}
        self._directory = context.directory
        self._errors = context.directory / f"{self.socket.name}.stderr"
        words: tuple[str | Path, ...] = (source, "--overlay", self.overlays)
        self._words = server_command(*words, "--listen", f"unix:{self.socket}", *options)
        self._process: subprocess.Popen[bytes] | None = None
        context.at_end(self.stop)
        self.start()

    def uri(self, export: str) -> str:
        """Of an export."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def start(self) -> None:
        """Start it, and return when it accepts clients."""
        self.socket.unlink(missing_ok=True)  # of one that was killed
        self.began = time.monotonic()
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                self._words,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment,
                start_new_session=True,
            )
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        stdout = self._process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=START_S)
        except queue.Empty:
            line = b""
        if not line.startswith(b"nbd"):
            raise CheckFailedError(f"nbdsrv does not serve: {self._tail()}")
        self.started_s = time.monotonic() - self.began

    def _tail(self) -> str:
        return tail(self._errors.read_text(errors="replace"), lines=6)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self._process is not None
        process, self._process = self._process, None
        kill_group(process)
        if process.stdout is not None:
            process.stdout.close()

    def stop(self) -> None:
        """SIGTERM; it must leave with 0 and have printed no traceback. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            kill_group(process)
            raise CheckFailedError(f"nbdsrv stays after SIGTERM: {self._tail()}") from None
        finally:
            if process.stdout is not None:
                process.stdout.close()
        said = self._errors.read_text(errors="replace")
        if code or "Traceback" in said:
            raise CheckFailedError(f"nbdsrv ended with {code}: {self._tail()}")

    def overlay(self, export: str) -> Path:
        """The directory of an export's overlay, as `overlay` commands take it."""
        return self.overlays / export
