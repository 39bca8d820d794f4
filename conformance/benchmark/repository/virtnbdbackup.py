"""virtnbdbackup: a stream file per backup, by its own code without libvirt (``virtnbd_driver``).

Sources are qcow2, as a hypervisor's would be: of raw disks it makes plain copies. Compression is
lz4, all it has. It cannot read a whole disk and keep what changed: its second backup goes by a
dirty bitmap. It restores to qcow2 only, through qemu-nbd.

What it serves is a full backup *without* compression (its ``virtnbdmap`` refuses others), by the
nbdkit command ``virtnbdmap`` starts; that backup is made off the clock and is not in any size.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager

from conformance.benchmark.cells import Transport
from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import chill, run, timed
from conformance.benchmark.repository.disk import BITMAP, State
from conformance.benchmark.repository.service import Target, listening
from conformance.benchmark.repository.subject import Restored, Subject

__all__ = ["VirtNbdBackup"]

PYTHON = "/usr/bin/python3"
DRIVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "virtnbd_driver.py")
EXPORT = "sda"
COMPRESSED = {"COMPRESS": "1"}
MODULES = "import libvirt, libvirtnbdbackup, nbd"


class VirtNbdBackup(Subject):
    program = Program.VIRTNBD

    @classmethod
    def unavailable(cls) -> str | None:
        missing = [
            name
            for name in ("virtnbdbackup", "virtnbdrestore", "qemu-nbd", "nbdkit", PYTHON)
            if shutil.which(name) is None
        ]
        if missing:
            return f"not installed: {', '.join(missing)}"
        tried = subprocess.run([PYTHON, "-c", MODULES], capture_output=True, text=True, check=False)
        return f"{PYTHON}: {tried.stderr.strip()[-200:]}" if tried.returncode else None

    def version(self) -> str:
        return run([PYTHON, "-c", "import libvirtnbdbackup as it; print(it.__version__)"]).strip()

    def create(self) -> None:
        pass

    def inputs(self, state: State) -> Sequence[str]:
        return [state.qcow2]

    def backup(self, state: State) -> float:
        return self._backup(state.qcow2, self.repository, "full", environment=COMPRESSED)

    def backup_told(self, state: State) -> float:
        return self._backup(state.qcow2, self.repository, "inc", BITMAP, environment=COMPRESSED)

    def restore(self, state: State) -> Restored:
        target = self.empty_target()
        files = ["vda.full.data", f"vda.inc.{BITMAP}.data"]
        command = [PYTHON, DRIVER, "restore", self.repository, target, *files]
        took = timed(command, directory=self.directory)
        return Restored(took.seconds, os.path.join(target, "vda"), "qcow2")

    def chill(self) -> None:
        super().chill()
        if os.path.isdir(self._plain):
            chill(self._plain)

    def serve(self, state: State) -> AbstractContextManager[Target]:
        disk = os.path.join(self._plain, "vda.full.data")
        blocks = os.path.join(self._plain, "blocks.map")
        if not os.path.exists(disk):
            os.makedirs(self._plain, exist_ok=True)
            self._backup(state.qcow2, self._plain, "full")
            run([PYTHON, DRIVER, "map", disk, blocks])
            self.chill()
        plugin = os.path.join(
            os.path.dirname(shutil.which("virtnbdmap") or ""), "virtnbd-nbdkit-plugin"
        )
        return listening(
            lambda port: [
                *("nbdkit", "-f", "-i", "127.0.0.1", "-p", port, "-e", EXPORT),
                *("--filter=blocksize", "--filter=cow", "-v", "python", plugin, "maxlen=4096"),
                *(f"blockmap={blocks}", f"disk={disk}", "debug=0", "-t", "1"),
            ],
            EXPORT,
            over=Transport.TCP,
            directory=self.directory,
        )

    @property
    def _plain(self) -> str:
        return os.path.join(self.directory, "uncompressed")

    def _backup(
        self, image: str, target: str, *level: str, environment: dict[str, str] | None = None
    ) -> float:
        command = [PYTHON, DRIVER, "backup", image, target, *level]
        return timed(command, directory=self.directory, environment=environment).seconds
