"""The disk as a restore point, and what a machine that boots off it must still have afterwards.

::

    boot_disk ── backup ──> repo: / xo: / repo+s3: ── serve --overlay ── QEMU
                                                          │
                         e2fsck of the second partition <─┘  and the files, by SHA-256
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from conformance.boot.disk import boot_disk
from conformance.boot.machine import BootedMachine, drive_of
from conformance.boot.served import ServedOverlay
from conformance.context import Context
from conformance.outcome import CheckFailedError
from conformance.process import Finished
from conformance.registry import expect
from conformance.server import server_environment

__all__ = ["DISK", "EXPORT", "GROUP", "RestorePoint", "Witness", "check_file_system", "nbdsrv"]

GROUP, DISK = "web", "sda"
EXPORT = f"{GROUP}/{DISK}@latest"


def nbdsrv(
    context: Context,
    *words: str | Path,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run one of our commands; no traceback, whatever it says."""
    command = (sys.executable, "-m", "nbdsrv", *words)
    variables = {**server_environment(), **(environment or {})}
    finished = context.run(*command, code=code, environment=variables, timeout_s=120)
    if "Traceback" in finished.stderr:
        raise CheckFailedError(f"a traceback: {finished.describe()}")
    return finished


@dataclass
class RestorePoint:
    """One, of the boot disk, in a repository.

    Attributes:
        target: the repository.
        environment: what its commands need.
        disk: the raw image it was made of.
    """

    context: Context
    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    disk: Path = field(init=False)

    def __post_init__(self) -> None:
        """Make the disk and back it up."""
        self.disk = boot_disk(self.context)
        if not self.target.startswith("xo:"):
            self.run("init", self.target, "--quiet")
        words = ("--disk", f"{DISK}={self.disk}", "--to", self.target, "--group", GROUP)
        self.run("backup", *words, "--quiet")

    def run(self, *words: str | Path, code: int = 0) -> Finished:
        """A command with what the repository needs."""
        return nbdsrv(self.context, *words, code=code, environment=self.environment)

    def serve(self, *options: str) -> ServedOverlay:
        """With overlays."""
        return ServedOverlay(self.context, self.target, *options, environment=self.environment)

    def boot(self, served: ServedOverlay, export: str = EXPORT) -> BootedMachine:
        """Boot off an export and wait until the guest is up."""
        machine = BootedMachine(self.context, drive_of(served.socket, export=export))
        machine.await_boot()
        return machine


class Witness:
    """Files that a guest has written and synced, by SHA-256: they must be there for ever."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._number = 0

    def write(self, machine: BootedMachine, kib: int = 512) -> None:
        """Have the guest write one more file, and sync."""
        self._number += 1
        name = f"/root/file.{self._number}"
        random = f"dd if=/dev/urandom of={name} bs=4k count={kib // 4} 2>/dev/null"
        machine.shell(f"{random} && sync")
        self._known[name] = machine.shell(f"sha256sum <{name}").split()[0]

    def check(self, machine: BootedMachine) -> None:
        """All of them, read from the disk and not from the guest's memory.

        Raises:
            CheckFailedError: one is not what it was.
        """
        machine.shell("sync; echo 3 >/proc/sys/vm/drop_caches")
        for name, digest in self._known.items():
            found = machine.shell(f"sha256sum <{name}", code=None)
            expect(f"{digest}  -", found, f"sha256 of {name} in the guest")
        told = machine.shell("dmesg | grep -i -c -E 'I/O error|ext4-fs error'", code=None)
        expect("0", told, "errors in the guest's log")


def check_file_system(context: Context, source: str, environment: Mapping[str, str]) -> None:
    """e2fsck of the second partition of a SOURCE: clean, once its journal has been replayed."""
    part = context.directory / "part.ext4"
    words = ("copy", f"{source}~p2", f"raw:{part}", "--quiet", "--force")
    nbdsrv(context, *words, environment=environment)
    context.run("e2fsck", "-y", "-E", "journal_only", part, code=None)
    context.run("e2fsck", "-f", "-n", part, timeout_s=60)
