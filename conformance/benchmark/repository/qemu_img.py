"""``qemu-img convert -c``: a directory of compressed qcow2 files, served by qemu-nbd.

A backup after a change is another full one: that is what is done with this program nightly. (A
difference by ``-B`` and rebase needs both images at hand and reads both.) Compression is zstd,
qemu's only level; the default, zlib, is slower.
"""

import os
import shutil
from contextlib import AbstractContextManager

from conformance.benchmark.cells import Transport
from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import run, timed
from conformance.benchmark.repository.disk import State
from conformance.benchmark.repository.service import Target, listening
from conformance.benchmark.repository.subject import Restored, Subject

__all__ = ["QemuImg"]

CLIENTS = 8


class QemuImg(Subject):
    program = Program.QEMU

    @classmethod
    def unavailable(cls) -> str | None:
        both = shutil.which("qemu-img") and shutil.which("qemu-nbd")
        return None if both else "qemu-img or qemu-nbd is not installed"

    def version(self) -> str:
        return run(["qemu-img", "--version"]).split()[2]

    def create(self) -> None:
        pass

    def backup(self, state: State) -> float:
        options = ["-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"]
        command = ["qemu-img", "convert", *options, self.source, self._file(state)]
        return timed(command, directory=self.directory).seconds

    def restore(self, state: State) -> Restored:
        target = os.path.join(self.empty_target(), "disk.raw")
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", self._file(state), target]
        return Restored(timed(command, directory=self.directory).seconds, target)

    def serve(self, state: State) -> AbstractContextManager[Target]:
        return listening(
            lambda path: [
                *("qemu-nbd", "-r", "-t", "-e", str(CLIENTS), "-f", "qcow2"),
                *("-k", path, self._file(state)),
            ],
            "",
            over=Transport.UNIX,
            directory=self.directory,
        )

    def _file(self, state: State) -> str:
        return os.path.join(self.repository, f"{state.name}.qcow2")
