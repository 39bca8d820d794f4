"""borg: one file in one archive, read back through its FUSE mount.

Without encryption; zstd level 1; fixed chunks of 4 MiB and ``--sparse``, which its manual names for
disk images. It has no NBD server.
"""

import os
import shutil
from contextlib import AbstractContextManager

from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import chill, run, timed
from conformance.benchmark.repository.disk import State
from conformance.benchmark.repository.service import Target, mounted
from conformance.benchmark.repository.subject import Restored, Subject

__all__ = ["Borg"]

CREATE = ("--compression", "zstd,1", "--chunker-params", "fixed,4194304", "--sparse")


class Borg(Subject):
    program = Program.BORG

    @classmethod
    def unavailable(cls) -> str | None:
        return None if shutil.which("borg") else "borg is not installed"

    def version(self) -> str:
        return run(["borg", "--version"]).split()[1]

    def create(self) -> None:
        run(["borg", "init", "-e", "none", self.repository], environment=self._environment())

    def backup(self, state: State) -> float:
        return timed(
            ["borg", "create", *CREATE, self._archive(state), os.path.basename(self.source)],
            directory=os.path.dirname(self.source),
            environment=self._environment(),
        ).seconds

    def restore(self, state: State) -> Restored:
        target = self.empty_target()
        command = ["borg", "extract", "--sparse", self._archive(state)]
        took = timed(command, directory=target, environment=self._environment())
        return Restored(took.seconds, os.path.join(target, os.path.basename(self.source)))

    def chill(self) -> None:
        super().chill()
        chill(self._base)

    def serve(self, state: State) -> AbstractContextManager[Target]:
        mount = os.path.join(self.directory, "mount")
        return mounted(
            ["borg", "mount", "-f", self._archive(state), mount],
            mount,
            os.path.basename(self.source),
            directory=self.directory,
            environment=self._environment(),
        )

    @property
    def _base(self) -> str:
        return os.path.join(self.directory, "base")

    def _archive(self, state: State) -> str:
        return f"{self.repository}::{state.name}"

    def _environment(self) -> dict[str, str]:
        return {"BORG_BASE_DIR": self._base, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
