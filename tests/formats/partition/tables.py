"""Disks with partition tables, made by sfdisk, sgdisk and parted, and what these say of them.

::

    disk.img ── sfdisk script ──> table ── sfdisk --json ──> (number, offset, length)
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["listed_by_sfdisk", "numbered", "run", "with_table"]

MIB = 1 << 20
UNIT = 4096
"""Bytes; each has its own number in it, so that a wrong offset cannot look right."""


def run(*command: str, script: str = "") -> str:
    """Run a partitioning tool; what it printed. CI must have it, a laptop need not."""
    if shutil.which(command[0]) is None:
        assert os.environ.get("CI") != "true", f"{command[0]} is not installed"
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        command, input=script, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbered(path: Path, size: int) -> None:
    """A disk whose every unit holds its own number."""
    units = b"".join(
        number.to_bytes(8, "big") * (UNIT // 8) for number in range(1, size // UNIT + 1)
    )
    path.write_bytes(units + bytes(size % UNIT))


def with_table(path: Path, script: str, size: int = 16 * MIB) -> Path:
    """The same with what an sfdisk script says."""
    numbered(path, size)
    run("sfdisk", "-q", str(path), script=script)
    return path


def listed_by_sfdisk(path: Path) -> list[tuple[int, int, int]]:
    """(number, offset, length) of each partition."""
    table = json.loads(run("sfdisk", "--json", str(path)))["partitiontable"]
    sector = table["sectorsize"]
    return [
        (int(p["node"].removeprefix(str(path))), p["start"] * sector, p["size"] * sector)
        for p in table.get("partitions", [])
    ]
