"""What ``qemu-img check`` says of an image that we have written."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.formats.qcow2.peer import qemu_img

__all__ = ["check", "leaks"]


def check(path: str | Path) -> None:
    """Neither errors nor leaks."""
    qemu_img("check", "-f", "qcow2", path)


def leaks(path: str | Path) -> int:
    """Leaked clusters; there are no errors."""
    if shutil.which("qemu-img") is None:
        assert os.environ.get("CI") != "true", "qemu-img is expected here"
        pytest.skip("qemu-img is not installed")
    command = ["qemu-img", "check", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in {0, 3}, f"{path}: {done.stdout}{done.stderr}"
    found = json.loads(done.stdout)
    assert not found.get("corruptions"), done.stdout
    assert not found["check-errors"], done.stdout
    return int(found.get("leaks", 0))
