"""Files of the real virtnbdbackup, where it is installed, and the program as a user runs it."""

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import conformance.benchmark.repository.virtnbd_driver as driver
from tests.cli.program import nbdsrv, serving
from tests.repository.virtnbdbackup.backups import random_disk
from tests.repository.virtnbdbackup.test_virtnbd_points import chain

PYTHON = "/usr/bin/python3"
"""The distribution's, which has libnbd's bindings and virtnbdbackup's modules."""
MODULES = "import libvirt, libvirtnbdbackup, nbd"
SIZE = (12 << 20) + 65536


def run(words: Sequence[str | Path], **environment: str) -> None:
    subprocess.run(
        [str(word) for word in words],
        check=True,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PATH": f"/usr/bin:{os.environ['PATH']}"} | environment,
    )


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A directory with a full backup, and one with it and an increment; the disk at each."""
    for program in ("virtnbdbackup", "qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            _missing(program)
    if subprocess.run([PYTHON, "-c", MODULES], capture_output=True, check=False).returncode:
        _missing("virtnbdbackup's modules")
    base = tmp_path_factory.mktemp("genuine")
    raw, image = base / "disk.raw", base / "disk.qcow2"
    disk = random_disk(SIZE, 11)
    raw.write_bytes(disk)
    run(["qemu-img", "convert", "-O", "qcow2", raw, image])
    for name, compress in (("plain", ""), ("lz4", "1")):
        (base / name).mkdir()
        words = [PYTHON, driver.__file__, "backup", image, base / name, "full", "virtnbdbackup.0"]
        run(words, COMPRESS=compress)
    run(["qemu-img", "bitmap", "--add", image, "virtnbdbackup.0"])
    (base / "piece").write_bytes(random.Random(3).randbytes(70_000))
    run(["qemu-io", "-c", f"write -s {base / 'piece'} 5111808 70144", image])
    run(["qemu-io", "-c", "write -z 1048576 131072", image])
    run(["qemu-img", "convert", "-O", "raw", image, raw])
    after = raw.read_bytes()
    words = [PYTHON, driver.__file__, "backup", image]
    for name, compress in (("plain", ""), ("lz4", "1")):
        run([*words, base / name, "inc", "virtnbdbackup.0"], COMPRESS=compress)
    return base, [bytes(random_disk(SIZE, 11)), after]


def _missing(what: str) -> None:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@pytest.mark.parametrize("kind", ["plain", "lz4"])
def test_genuine_backups_are_what_the_disk_was(
    genuine: tuple[Path, list[bytes]], tmp_path: Path, kind: str
) -> None:
    base, states = genuine
    source = f"virtnbdbackup:{base / kind}"
    listed = nbdsrv("ls", source).stdout
    assert "incremental, offline" in listed
    points = [line.split()[1] for line in listed.splitlines()[1:]]
    assert len(points) == 2
    for point, state in zip(points, states, strict=True):
        target = tmp_path / point
        copied = nbdsrv("copy", f"{source}#@{point}", f"raw:{target}")
        assert copied.returncode == 0, copied.stderr
        assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(state).digest(), point


def test_a_directory_is_served(tmp_path: Path) -> None:
    if shutil.which("nbdcopy") is None:
        _missing("nbdcopy")
    directory = tmp_path / "web"
    directory.mkdir()
    made = chain(directory, packed=2)
    listen = f"unix:{tmp_path / 's'}"
    with serving(f"virtnbdbackup:{tmp_path}", "--listen", listen):
        for point, golden in made.golden.items():
            uri = f"nbd+unix:///web/vda@{point}?socket={tmp_path / 's'}"
            run(["nbdcopy", uri, tmp_path / "out"])
            assert hashlib.sha256((tmp_path / "out").read_bytes()).digest() == (
                hashlib.sha256(golden).digest()
            ), point
