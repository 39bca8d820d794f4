"""Repositories made by the real restic.

::

    two hosts    alpha: vm1/disk.raw (three states), vm1/other.img, vm1/notes.txt (small)
                 beta:  vm1/disk.raw
"""

import json
import os
import random
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

__all__ = ["PASSWORD", "SIZE", "Made", "copied", "make", "restic"]

PASSWORD = "secret words"
MIB = 1 << 20
SIZE = 9 * MIB + 12_345


@dataclass(frozen=True)
class Made:
    """A repository, and what its snapshots hold.

    Attributes:
        path: of the repository.
        states: snapshot's short id to path to content, in the order they were made.
        beta: short id of the snapshot of the other host.
    """

    path: Path
    states: dict[str, dict[str, bytes]] = field(default_factory=dict)
    beta: str = ""

    @property
    def points(self) -> list[str]:
        """Short ids of alpha's."""
        return [each for each in self.states if each != self.beta]


def restic(repository: Path, *arguments: str | Path, directory: Path | None = None) -> str:
    """Run it."""
    program = shutil.which("restic")
    if program is None:
        if os.environ.get("CI") == "true":
            raise AssertionError("restic is not installed")
        pytest.skip("restic is not installed")
    command = [program, "-q", "--no-cache", "-r", str(repository), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "RESTIC_PASSWORD": PASSWORD},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(directory: Path, *, version: int) -> Made:
    """A repository with four snapshots."""
    repository, files = directory / "repository", directory / "files"
    (files / "vm1").mkdir(parents=True)
    restic(repository, "init", "--repository-version", str(version))
    chance = random.Random(version)
    disk = bytearray(SIZE)
    disk[:600_000] = chance.randbytes(600_000)
    disk[5 * MIB : 6 * MIB] = b"some text, " * (MIB // 11) + b"."
    disk[-100:] = chance.randbytes(100)
    other = bytes(2 * MIB + 1)
    states: list[dict[str, bytes]] = []
    for number, host in enumerate(("alpha", "alpha", "alpha", "beta")):
        if number:
            at = number * 2 * MIB
            disk[at : at + 70_000] = chance.randbytes(70_000)
        content = {"vm1/disk.raw": bytes(disk), "vm1/notes.txt": b"small"}
        if host == "alpha":
            content["vm1/other.img"] = other
        for path in ("vm1/disk.raw", "vm1/notes.txt", "vm1/other.img"):
            (files / path).unlink(missing_ok=True)
            if path in content:
                (files / path).write_bytes(content[path])
        time = f"2026-03-0{number + 1} 10:00:00"
        tags = ("--tag", "nightly,vm")
        restic(repository, "backup", "--host", host, "--time", time, *tags, "vm1", directory=files)
        states.append(content)
    listed = json.loads(restic(repository, "snapshots", "--json"))
    listed.sort(key=lambda each: each["time"])
    names = [each["short_id"] for each in listed]
    return Made(repository, dict(zip(names, states, strict=True)), names[-1])


def copied(made: Made, to: Path) -> Made:
    """The same elsewhere, to be changed."""
    shutil.copytree(made.path, to)
    for directory, _, names in os.walk(to):
        os.chmod(directory, 0o755)
        for name in names:
            os.chmod(os.path.join(directory, name), 0o644)
    return replace(made, path=to)
