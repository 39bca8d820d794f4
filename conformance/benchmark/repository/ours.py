"""nbdsrv's own repository, by its command line with its defaults: once plain, once encrypted.

A backup that is told what changed reads a qcow2's dirty bitmap, and 1 % of the rest to check it;
it has to name the point the bitmap counts from.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from conformance.benchmark.cells import Transport
from conformance.benchmark.report import BenchmarkError
from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import Timed, run, timed
from conformance.benchmark.repository.disk import BITMAP, Disks, State
from conformance.benchmark.repository.service import Target, listening
from conformance.benchmark.repository.subject import Restored, Subject
from conformance.benchmark.servers import ROOT

__all__ = ["Encrypted", "Ours"]

NBDSRV = (sys.executable, "-m", "nbdsrv")
GROUP, DISK = "vm", "disk"


class Ours(Subject):
    program = Program.OURS
    creation: Sequence[str] = ()
    """Options of ``init``."""

    def __init__(self, directory: str, disks: Disks) -> None:
        super().__init__(directory, disks)
        self._last = ""

    @classmethod
    def unavailable(cls) -> str | None:
        tried = subprocess.run(
            [*NBDSRV, "backup", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return "nbdsrv has no backup command" if tried.returncode else None

    def version(self) -> str:
        return run([*NBDSRV, "--version"], directory=ROOT).split()[-1]

    def create(self) -> None:
        command = [*NBDSRV, "init", f"repo:{self.repository}", *self.creation]
        run(command, directory=self.directory, environment=self.environment())

    def inputs(self, state: State) -> Sequence[str]:
        return [state.raw, state.qcow2]

    def backup(self, state: State) -> float:
        took = self._backup(self.source)
        self._last = _outcome(took)["point"]
        return took.seconds

    def backup_told(self, state: State) -> float:
        changed = f"qemu:dirty-bitmap:{BITMAP}"
        took = self._backup(state.qcow2, "--changed", changed, "--since", self._last)
        outcome = _outcome(took)
        if outcome["mode"] != "incremental":
            raise BenchmarkError(f"the backup is a {outcome['mode']}: {outcome.get('reason')}")
        return took.seconds

    def restore(self, state: State) -> Restored:
        target = os.path.join(self.empty_target(), "disk.raw")
        return Restored(self._timed("restore", self._point, target).seconds, target)

    def serve(self, state: State) -> AbstractContextManager[Target]:
        return listening(
            lambda path: [*NBDSRV, "serve", self._point, "--listen", f"unix:{path}"],
            "",
            over=Transport.UNIX,
            directory=self.directory,
            environment=self.environment(),
        )

    def environment(self) -> dict[str, str]:
        """What the command line cannot say."""
        return {"PYTHONPATH": ROOT}

    @property
    def _point(self) -> str:
        return f"repo:{self.repository}#{GROUP}/{DISK}@latest"

    def _backup(self, source: str, *options: str) -> Timed:
        to = ["--to", f"repo:{self.repository}", "--group", GROUP, "--json"]
        return self._timed("backup", "--disk", f"{DISK}={source}", *to, *options)

    def _timed(self, *words: str) -> Timed:
        command = [*NBDSRV, *words]
        return timed(command, directory=self.directory, environment=self.environment())


class Encrypted(Ours):
    program = Program.ENCRYPTED
    creation = ("--encrypt",)

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "NBDSRV_PASSPHRASE": "benchmark"}


def _outcome(took: Timed) -> dict[str, Any]:
    """What ``backup --json`` says of the disk."""
    try:
        found = json.loads(took.output)
        only = found[0] if isinstance(found, list) else found
        assert isinstance(only, dict)
        return only
    except (ValueError, IndexError, AssertionError) as error:
        raise BenchmarkError(f"backup --json: not understood: {took.output[:200]}") from error
