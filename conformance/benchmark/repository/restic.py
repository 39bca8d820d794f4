"""restic: one file in one snapshot, read back through its FUSE mount.

It always encrypts (AES-256-CTR, Poly1305-AES). Repository version 2, compression ``auto``, which
is its fastest zstd level. It has no NBD server. Debian 12's version restores holes as zeroes
written out: it has no ``--sparse`` yet.
"""

import os
import shutil
from contextlib import AbstractContextManager

from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import chill, run, timed
from conformance.benchmark.repository.disk import State
from conformance.benchmark.repository.service import Target, mounted
from conformance.benchmark.repository.subject import Restored, Subject

__all__ = ["Restic"]


class Restic(Subject):
    program = Program.RESTIC

    @classmethod
    def unavailable(cls) -> str | None:
        return None if shutil.which("restic") else "restic is not installed"

    def version(self) -> str:
        return run(["restic", "version"]).split()[1]

    def create(self) -> None:
        run(["restic", "-q", "init", "--repository-version", "2"], environment=self._environment())

    def backup(self, state: State) -> float:
        return timed(
            ["restic", "-q", "backup", "--tag", state.name, os.path.basename(self.source)],
            directory=os.path.dirname(self.source),
            environment=self._environment(),
        ).seconds

    def restore(self, state: State) -> Restored:
        target = self.empty_target()
        command = ["restic", "-q", "restore", "latest", "--tag", state.name, "--target", target]
        took = timed(command, directory=self.directory, environment=self._environment())
        return Restored(took.seconds, os.path.join(target, os.path.basename(self.source)))

    def chill(self) -> None:
        super().chill()
        if os.path.isdir(self._cache):
            chill(self._cache)

    def serve(self, state: State) -> AbstractContextManager[Target]:
        mount = os.path.join(self.directory, "mount")
        return mounted(
            ["restic", "-q", "mount", mount],
            mount,
            os.path.join("tags", state.name, "latest", os.path.basename(self.source)),
            directory=self.directory,
            environment=self._environment(),
        )

    @property
    def _cache(self) -> str:
        return os.path.join(self.directory, "cache")

    def _environment(self) -> dict[str, str]:
        return {
            "RESTIC_REPOSITORY": self.repository,
            "RESTIC_PASSWORD": "benchmark",
            "RESTIC_CACHE_DIR": self._cache,
        }
