"""A VM on a real QEMU whose guest never stops writing, and what its disks held at any moment.

::

    qemu-system-x86_64 -S ── backup.sock   the monitor that nbdsrv is given
                          └─ guest.sock    ours: qemu-io -d /machine/peripheral/vda/... "write ..."

    log    w0 w1 w2 w3 w4 w5 ...           all writes of all disks, in the order QEMU does them
    point  ── which prefix of the log is it, on all disks at once? ──> w0..w3: exact

There is no guest system. The writes go through the virtio devices all the same, one after the
other, as fast as the monitor takes them, from before the first backup to after the last.
"""

import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.context import Context
from conformance.image import KIB, MIB
from conformance.outcome import CheckFailedError
from conformance.process import find_program, kill_group, tail

__all__ = ["DISKS", "VM", "Guest", "Monitor", "Replay", "Write", "touched"]

VM = "web one"
DISKS = {"vda": 12 * MIB, "vdb": 5 * MIB + 512}
START_S = 20.0
ANSWER_S = 60.0
PAUSE_S = 0.004
"""Between two writes: some hundred a second, for the backups have to have a processor as well."""
HOT = 0.7
"""Of the writes that go to the first third of a disk, so that backups differ in size."""


@dataclass(frozen=True, slots=True)
class Write:
    """Of one byte value, over and over."""

    disk: str
    offset: int
    length: int
    value: int


class Guest:
    """A running VM. Its writes come from a thread of this process, between ``start`` and ``stop``.

    Attributes:
        monitor: the socket that nbdsrv is given.
        log: all writes so far; one is there before it is done.
    """

    def __init__(self, context: Context, seed: int, disks: Mapping[str, int] = DISKS) -> None:
        """Start QEMU; it ends with the context."""
        self.monitor = context.directory / "backup.sock"
        self.log: list[Write] = []
        self._disks = dict(disks)
        self._source = random.Random(seed)
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write_on, daemon=True)
        self._said = context.directory / "qemu.log"
        ours = context.directory / "guest.sock"
        self._process = self._launched(context, ours)
        context.at_end(self._end)
        self._monitor = Monitor(self._connected(ours))

    def _launched(self, context: Context, ours: Path) -> "subprocess.Popen[bytes]":
        words = [find_program("qemu-system-x86_64"), "-accel", "tcg", "-machine", "q35", "-S"]
        words += ["-nodefaults", "-display", "none", "-m", "32", "-name", VM]
        for path in (self.monitor, ours):
            words += ["-qmp", f"unix:{path},server=on,wait=off"]
        for name, size in self._disks.items():
            image = context.directory / f"{name}.qcow2"
            context.run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
            blocks = f"driver=qcow2,node-name=node-{name},file.driver=file,file.filename={image}"
            words += ["-blockdev", blocks, "-device", f"virtio-blk-pci,drive=node-{name},id={name}"]
        with self._said.open("wb") as said:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def _connected(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + START_S
        while True:
            stream = socket.socket(socket.AF_UNIX)
            try:
                stream.connect(str(path))
                return stream
            except OSError:
                stream.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = tail(self._said.read_text(errors="replace"))
                    raise CheckFailedError(f"QEMU does not start: {said}") from None
                time.sleep(0.02)

    # --- writing -------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write no more.

        Raises:
            CheckFailedError: a write has failed.
        """
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_S)
        if self._failure is not None:
            raise CheckFailedError(f"a write of the guest's has failed: {self._failure}")

    def await_writes(self, count: int) -> None:
        """Return when so many more have begun."""
        until, deadline = len(self.log) + count, time.monotonic() + ANSWER_S
        while len(self.log) < until:
            if self._failure is not None or time.monotonic() > deadline:
                raise CheckFailedError(f"the guest hangs: {self._failure}")
            time.sleep(PAUSE_S)

    def _write_on(self) -> None:
        try:
            while not self._over.is_set():
                self._write(self._chosen())
                self._over.wait(PAUSE_S)
        except BaseException as error:  # noqa: BLE001 - told by ``stop``
            self._failure = error

    def _chosen(self) -> Write:
        source = self._source
        disk = source.choice(list(self._disks))
        length = source.choice((512, 4 * KIB, 4 * KIB, 64 * KIB, 200 * KIB))
        size = self._disks[disk]
        last = (size // 3 if source.random() < HOT else size) - length
        value = source.choice((0, source.randrange(1, 256), source.randrange(1, 256)))
        return Write(disk, source.randrange(0, last, 512), length, value)

    def _write(self, write: Write) -> None:
        self.log.append(write)
        what = f"write -P {write.value}" if write.value else "write -z"
        self._tell(write.disk, f"{what} {write.offset} {write.length}")

    def load(self, disk: str, offset: int, content: Path) -> None:
        """Write a file's content, which is not in the log; before ``start``."""
        self._tell(disk, f"write -s {content} {offset} {content.stat().st_size}")

    def _tell(self, disk: str, what: str) -> None:
        line = f"/machine/peripheral/{disk}/virtio-backend"
        line = f'qemu-io -d {line} "{what}"'
        said = self._monitor.ask("human-monitor-command", {"command-line": line})
        if said:
            raise CheckFailedError(str(said).strip())

    # --- looking -------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Whatever of a backup is in this QEMU, but for checkpoints."""
        ask = self._monitor.ask
        names = [node["node-name"] for node in ask("query-named-block-nodes", {"flat": True})]
        names += [job["id"] for job in ask("query-jobs")]
        names += [export["id"] for export in ask("query-block-exports")]
        return [name for name in names if name.startswith("nbdsrv")]

    def checkpoints(self) -> int:
        """Bitmaps of the disk that has most."""
        nodes = self._monitor.ask("query-named-block-nodes", {"flat": True})
        return max(len(node.get("dirty-bitmaps", ())) for node in nodes)

    def _end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_S)
        self._monitor.close()
        kill_group(self._process)


class Monitor:
    """QMP, one command after the other. Thread-safe."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._turn = threading.Lock()
        stream.settimeout(ANSWER_S)
        self._lines = stream.makefile("rb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What it returns; events are passed over."""
        message = {"execute": command, "arguments": dict(arguments or {})}
        with self._turn:
            self._stream.sendall(json.dumps(message).encode() + b"\n")
            while line := self._lines.readline():
                answer = json.loads(line)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise CheckFailedError(f"QEMU refuses {command}: {answer['error']}")
        raise CheckFailedError("QEMU is gone")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._stream.close()


class Replay:
    """The log played back, of some disks or all, to find the moment that a point is of.

    Attributes:
        moment: how many writes have been played.
    """

    def __init__(self, guest: Guest, disks: Mapping[str, int] = DISKS) -> None:
        self.moment = 0
        self._log = guest.log
        self._held = {name: bytearray(size) for name, size in disks.items()}

    def advance_to(self, held: Mapping[str, bytes], what: str) -> int:
        """Play until the disks hold just that; how many writes it took.

        Raises:
            CheckFailedError: they never did, after the moment that was found last.
        """
        began, last = self.moment, len(self._log)
        while True:
            if all(self._held[name] == content for name, content in held.items()):
                return self.moment - began
            if self.moment == last:
                text = f"{what} is no state of the disks after {began} to {last} writes"
                raise CheckFailedError(text)
            self._play()

    def _play(self) -> None:
        write = self._log[self.moment]
        content = self._held.get(write.disk)
        if content is not None:
            end = write.offset + write.length
            content[write.offset : end] = bytes([write.value]) * write.length
        self.moment += 1


def touched(writes: Sequence[Write], unit: int) -> int:
    """Bytes of the blocks of ``unit`` bytes that these writes are in."""
    blocks = {
        (write.disk, block)
        for write in writes
        for block in range(write.offset // unit, -(-(write.offset + write.length) // unit))
    }
    return len(blocks) * unit
