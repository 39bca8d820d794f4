"""Benji: blocks of 4 MiB in files, the block lists in SQLite; its own NBD server.

zstd level 1, no encryption, everything else its defaults: three readers and writers, BLAKE2b, an
NBD block cache of 2 GiB on the disk. Cold is an empty cache.
"""

import json
import os
import shutil
from contextlib import AbstractContextManager

from conformance.benchmark.cells import Transport
from conformance.benchmark.repository.benji_setup import VERSION, benji_command
from conformance.benchmark.repository.cells import Program
from conformance.benchmark.repository.command import run, timed
from conformance.benchmark.repository.disk import PIECE, Disks, State
from conformance.benchmark.repository.service import Target, listening
from conformance.benchmark.repository.subject import Restored, Subject

__all__ = ["Benji"]

CONFIGURATION = """\
configurationVersion: '1'
databaseEngine: sqlite:///{repository}/benji.sqlite
defaultStorage: store
storages:
  - name: store
    storageId: 1
    module: file
    configuration:
      path: {repository}/data
      activeTransforms: [zstd]
transforms:
  - name: zstd
    module: zstd
    configuration:
      level: 1
ios:
  - name: file
    module: file
nbd:
  blockCache:
    directory: {directory}/block-cache
  cowStore:
    directory: {directory}/cow-store
"""


class Benji(Subject):
    program = Program.BENJI

    def __init__(self, directory: str, disks: Disks) -> None:
        super().__init__(directory, disks)
        self._file = os.path.join(directory, "benji.yaml")
        self._command: list[str] = []

    @classmethod
    def unavailable(cls) -> str | None:
        return None  # it is installed when it is wanted

    def version(self) -> str:
        return VERSION

    def create(self) -> None:
        self._command = benji_command(self.disks.directory)
        os.mkdir(os.path.join(self.repository, "data"))
        with open(self._file, "w", encoding="utf-8") as file:
            file.write(CONFIGURATION.format(repository=self.repository, directory=self.directory))
        run(self._benji("database-init"))

    def backup(self, state: State) -> float:
        return self._backup(state)

    def backup_told(self, state: State) -> float:
        """By a list of changed extents in ``rbd diff``'s format, as it is used with Ceph."""
        hints = os.path.join(self.directory, "hints.json")
        extents = [{"offset": at, "length": PIECE, "exists": "true"} for at in state.changed]
        with open(hints, "w", encoding="utf-8") as file:
            json.dump(extents, file)
        return self._backup(state, "-r", hints, "-f", self.disks.changed.name)

    def restore(self, state: State) -> Restored:
        target = os.path.join(self.empty_target(), "disk.raw")
        command = self._benji("restore", "--sparse", state.name, f"file:{target}")
        return Restored(timed(command, directory=self.directory).seconds, target)

    def chill(self) -> None:
        super().chill()
        shutil.rmtree(os.path.join(self.directory, "block-cache"), ignore_errors=True)

    def serve(self, state: State) -> AbstractContextManager[Target]:
        return listening(
            lambda port: self._benji("nbd", "--read-only", "--bind-port", port),
            state.name,
            over=Transport.TCP,
            directory=self.directory,
        )

    def _backup(self, state: State, *options: str) -> float:
        words = ["backup", "-u", state.name, *options, f"file:{self.source}", "vm"]
        return timed(self._benji(*words), directory=self.directory).seconds

    def _benji(self, *words: str) -> list[str]:
        return [*self._command, "-c", self._file, "--log-level", "ERROR", *words]
