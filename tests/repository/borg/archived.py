"""Repositories made by the real borg."""

import os
import random
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

__all__ = ["DISK", "PASSPHRASE", "Archived", "archive", "borg", "copied"]

PASSPHRASE = "secret words"
DISK = "vm1/disk.raw"
MIB = 1 << 20


@dataclass(frozen=True)
class Archived:
    """A repository, and what its archives hold.

    Attributes:
        path: of the repository.
        base: of borg's own files: its keys.
        states: archive to path to content, in the order they were made.
    """

    path: Path
    base: Path
    states: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def keys(self) -> Path:
        return self.base / ".config" / "borg" / "keys"


def borg(archived: Archived, *arguments: str | Path, directory: Path | None = None) -> str:
    """Run it."""
    program = shutil.which("borg")
    if program is None:
        if os.environ.get("CI") == "true":
            raise AssertionError("borg is not installed")
        pytest.skip("borg is not installed")
    done = subprocess.run(
        [program, *map(str, arguments)],
        cwd=directory or archived.path.parent,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "BORG_BASE_DIR": str(archived.base),
            "BORG_REPO": str(archived.path),
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
            "BORG_DELETE_I_KNOW_WHAT_I_AM_DOING": "YES",
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def archive(directory: Path, encryption: str, count: int = 3) -> Archived:
    """A repository with three archives, the last cut and packed differently."""
    made = Archived(directory / "repository", directory / "base")
    made.base.mkdir()
    files = directory / "files"
    (files / "vm1").mkdir(parents=True)
    borg(made, "init", "-e", encryption)
    chance = random.Random(encryption)
    disk = bytearray(9 * MIB + 12_345)
    disk[:700_000] = chance.randbytes(700_000)
    disk[5 * MIB : 6 * MIB] = b"some text, " * (MIB // 11) + b"."
    disk[-100:] = chance.randbytes(100)
    cuts = (("fixed,1048576", "none"), ("fixed,1048576", "none"), ("buzhash,10,18,16,4095", "zstd"))
    for number, (cut, packing) in enumerate(cuts[:count]):
        if number:
            at = number * 2 * MIB
            disk[at : at + 70_000] = chance.randbytes(70_000)
        content = {
            DISK: bytes(disk),
            "vm1/other.img": bytes(2 * MIB + 1),
            "vm1/notes.txt": b"small",
        }
        for path, data in content.items():
            (files / path).write_bytes(data)
        name = f"night-{number + 1}"
        time = f"2026-03-0{number + 1}T10:00:00"
        options = ("--chunker-params", cut, "-C", packing, "--timestamp", time)
        borg(
            made, "create", *options, "--comment", "a comment", f"::{name}", "vm1", directory=files
        )
        made.states[name] = content
    return made


def copied(archived: Archived, to: Path) -> Archived:
    """The same elsewhere, to be changed."""
    shutil.copytree(archived.path, to)
    return replace(archived, path=to)
