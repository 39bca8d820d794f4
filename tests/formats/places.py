"""Where test images lie: file systems and devices that behave differently.

====== ==================================== =======================================
place  RWF_NOWAIT                           fallocate
====== ==================================== =======================================
disk   yes (ext4, XFS, Btrfs)               punch, zero range
memory no, but plain reads cannot block     punch; no zero range
loop   yes                                  punch and zero, whole sectors only
====== ==================================== =======================================
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["PLACES", "disk", "loop_device", "memory", "mounted", "need_root"]


def need_root() -> None:
    """Skip on a developer's machine without root; CI runs as root and must not skip."""
    if os.geteuid():
        assert os.environ.get("CI") != "true", "CI is expected to run as root"
        pytest.skip("needs root")


@contextmanager
def disk(tmp_path: Path) -> Iterator[str]:
    """pytest's directory: whatever file system TMPDIR is on."""
    yield str(tmp_path)


@contextmanager
def memory(tmp_path: Path) -> Iterator[str]:
    """A directory on tmpfs."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    directory = tempfile.mkdtemp(prefix="nbdsrv-test-", dir="/dev/shm")
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


PLACES = (disk, memory)


@contextmanager
def loop_device(path: str) -> Iterator[str]:
    """A loop block device over ``path``; skips, saying why, where there can be none."""
    need_root()
    command = ["losetup", "--find", "--show", path]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], timeout=20, check=True)


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    """``mount ARGUMENTS where`` for the time of the block; skips where mounting is forbidden."""
    need_root()
    where.mkdir(exist_ok=True)
    command = ["mount", *arguments, str(where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], timeout=20, check=True)
