"""QEMU that boots from a disk, and a shell on its serial console.

::

    qemu-system-x86_64 ── serial ── BIOS, kernel, "RESULT booted N", then: line in, output, "END 0"
                       └─ qmp.sock  when was the first sector read?

Nothing is handed to the machine but the disk: boot loader, kernel and all come from there.
"""

import queue
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from conformance.boot.disk import SERVICES
from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.process import find_program, kill_group, tail
from conformance.virtual_machine import Monitor

__all__ = ["BootedMachine", "drive_of"]

BOOT_S = 150.0
COMMAND_S = 90.0
RECONNECT_S = 60
"""Seconds QEMU holds requests back while the export's server is away."""


def drive_of(path: Path | str, *, export: str | None = None, format_: str = "raw") -> str:
    """A value of ``-drive``: an image, or an export on a Unix socket."""
    if export is None:
        return f"file={path},format={format_},if=none,id=disk"
    server = f"file.driver=nbd,file.server.type=unix,file.server.path={path},file.export={export}"
    return f"driver=raw,{server},file.reconnect-delay={RECONNECT_S},if=none,id=disk"


class BootedMachine:
    """One machine; started by ``__init__``, killed with the context.

    Attributes:
        monitor: a QMP socket that nobody else uses.
        first_sector_s: seconds from the start of QEMU until its disk had been read from.
        booted_s: likewise until init said that it is up.
    """

    def __init__(self, context: Context, drive: str, name: str = "vm") -> None:
        """Start it; returns at once."""
        directory = context.directory
        number = time.monotonic_ns() % 10**9
        self.monitor = directory / f"q{number}"
        self.first_sector_s = 0.0
        self.booted_s = 0.0
        self._own = directory / f"o{number}"
        words: Sequence[str] = (
            *(find_program("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", "1", "-m", "256", "-display", "none", "-no-reboot", "-nodefaults"),
            *("-name", name, "-serial", "stdio"),
            *("-qmp", f"unix:{self.monitor},server=on,wait=off"),
            *("-qmp", f"unix:{self._own},server=on,wait=off"),
            *("-drive", drive, "-device", "virtio-blk-pci,drive=disk,id=vda"),
        )
        self._said: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = directory / f"e{number}"
        self._began = time.monotonic()
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        context.at_end(self.kill)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode(errors="replace").strip("\r\n"))
        self._lines.put(None)

    def _line(self, deadline: float) -> str:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise CheckFailedError(f"the guest says nothing more: {self._tail()}") from None
        if line is None:
            raise CheckFailedError(f"QEMU has ended: {self._tail()}")
        self._said.append(line)
        return line

    def _tail(self) -> str:
        said = tail("\n".join(self._said), lines=6)
        return f"{said}; {tail(self._errors.read_text(errors='replace'))}"

    def await_first_sector(self) -> None:
        """Return when the machine has read from its disk; ``first_sector_s`` tells when."""
        stats = self._ask_until_read()
        if not stats:
            raise CheckFailedError(f"QEMU reads nothing from its disk: {self._tail()}")
        self.first_sector_s = time.monotonic() - self._began

    def _ask_until_read(self) -> int:
        deadline = time.monotonic() + BOOT_S
        try:
            with self._connected(deadline) as stream, closing(Monitor(stream)) as monitor:
                while time.monotonic() < deadline:
                    rows = monitor.ask("query-blockstats")
                    if count := max((row["stats"]["rd_operations"] for row in rows), default=0):
                        return int(count)
                    time.sleep(0.002)
        except OSError:
            raise CheckFailedError(f"QEMU has ended: {self._tail()}") from None
        return 0

    def _connected(self, deadline: float) -> socket.socket:
        while True:
            stream = socket.socket(socket.AF_UNIX)
            try:
                stream.connect(str(self._own))
                return stream
            except OSError:
                stream.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise CheckFailedError(f"QEMU does not start: {self._tail()}") from None
                time.sleep(0.005)

    def await_boot(self) -> float:
        """Return when init is up: seconds since QEMU was started.

        Raises:
            CheckFailedError: not within 150 s, or it has not read everything it should have.
        """
        deadline = time.monotonic() + BOOT_S
        while True:
            line = self._line(deadline)
            if line.startswith("RESULT booted "):
                break
        self.booted_s = time.monotonic() - self._began
        if line != f"RESULT booted {SERVICES}":
            raise CheckFailedError(f"the guest came up with: {line}")
        return self.booted_s

    def shell(self, command: str, *, code: int | None = 0) -> str:
        """Run a line in the guest; what it printed.

        Raises:
            CheckFailedError: it ended with another code, or did not within 90 s.
        """
        self.begin(command)
        return self.end(command, code=code)

    def begin(self, command: str) -> None:
        """Run a line in the guest and do not wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()

    def end(self, command: str, *, code: int | None = 0) -> str:
        """Wait for a line that was begun."""
        deadline = time.monotonic() + COMMAND_S
        said: list[str] = []
        while not (line := self._line(deadline)).startswith("END "):
            said.append(line)
        if code is not None and line != f"END {code}":
            raise CheckFailedError(f"in the guest `{command}` ended with {line}: {said[-4:]}")
        return "\n".join(said)

    def kill(self) -> None:
        """As a power cut does."""
        kill_group(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
