"""What casync made, through the program itself: ls, info, and served to nbdcopy and nbdinfo."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv, refusal, serving
from tests.repository.casync.conftest import Make
from tests.repository.casync.opening import golden

GOLDEN = golden()
LATER = GOLDEN[:50_000] + b"changed" + GOLDEN[50_007:]


def test_served_whole(make: Make, tmp_path: Path) -> None:
    for name in ("nbdcopy", "nbdinfo"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    make(GOLDEN, "repo/vm1-2026-01-01.caibx")
    root = make(LATER, "repo/vm1-2026-01-02.caibx").parent
    socket = tmp_path / "s"
    with serving(f"casync:{root}", "--listen", f"unix:{socket}") as served:
        uri = f"nbd+unix:///%s?socket={socket}"
        run = ["nbdinfo", "--list", "--json", uri % ""]
        listed = json.loads(subprocess.check_output(run, timeout=30))["exports"]
        assert {each["export-name"] for each in listed} == {
            "vm1/disk@latest",
            "vm1/disk@2026-01-01",
            "vm1/disk@2026-01-02",
        }
        for point, content in (("2026-01-01", GOLDEN), ("latest", LATER)):
            target = tmp_path / "out"
            subprocess.run(["nbdcopy", uri % f"vm1/disk@{point}", target], check=True, timeout=30)
            assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()
            extracted = tmp_path / "extracted"
            index = root / f"vm1-{'2026-01-02' if point == 'latest' else point}.caibx"
            store = f"--store={root / 'default.castr'}"
            command = ["casync", store, "extract", str(index), str(extracted)]
            subprocess.run(command, check=True, timeout=30, capture_output=True)
            assert extracted.read_bytes() == target.read_bytes()
            extracted.unlink()
        assert served.stop() == (0, "")


def test_on_the_command_line(make: Make, tmp_path: Path) -> None:
    path = make(GOLDEN, "repo/disk.caibx")
    os.utime(path, (0, 1767225600))
    (row,) = json.loads(nbdsrv("ls", f"casync:{path}", "--json").stdout)
    assert (row["group"], row["point"], row["time"]) == ("disk", "current", "2026-01-01T00:00:00Z")
    facts = json.loads(nbdsrv("info", f"casync:{path}#", "--json").stdout)
    assert facts["points"] == 1
    facts = json.loads(nbdsrv("info", f"casync:{path}#disk", "--json").stdout)
    assert facts["size"] == len(GOLDEN)
    assert facts["hole_bytes"] >= 768 << 10
    target = tmp_path / "out.img"
    assert nbdsrv("copy", f"casync:{path}#disk", f"raw:{target}").returncode == 0
    assert target.read_bytes() == GOLDEN
    shutil.rmtree(path.parent / "default.castr")
    assert "NBDSRV_CASYNC_STORE" in refusal(1, "copy", f"casync:{path}#disk", f"raw:{target}")
