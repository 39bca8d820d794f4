"""init, backup and restore as a user types them."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import COMMAND, environment, hidden_from, nbdsrv, refusal, serving


def made(tmp_path: Path, *options: str, env: dict[str, str] | None = None) -> str:
    repository = f"repo:{tmp_path / 'repository'}"
    done = nbdsrv("init", repository, *options, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return repository


def backed_up(*arguments: str | Path, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    done = nbdsrv("backup", *arguments, "--json", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_there_and_back(tmp_path: Path, disk: Path) -> None:
    repository = made(tmp_path)
    (row,) = backed_up(disk, "--to", repository)
    assert {key: row[key] for key in ("repository", "group", "disk", "mode", "size")} == {
        "repository": repository,
        "group": "disk",
        "disk": "disk",
        "mode": "full",
        "size": 100_001,
    }
    assert set(row) >= {
        "point",
        "reason",
        "read_bytes",
        "new_bytes",
        "zero_bytes",
        "unchanged_bytes",
        "duplicate_bytes",
        "rechecked_bytes",
        "duration_s",
    }
    done = nbdsrv("backup", disk, "--to", repository)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{repository}#disk/disk@")
    assert "scan (nothing tells what changed)" in done.stdout
    out = tmp_path / "out.img"
    done = nbdsrv("restore", f"{repository}#disk/disk@{row['point']}", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_bytes() == disk.read_bytes()
    assert "exists" in refusal(1, "restore", f"{repository}#disk", out)


def test_only_what_differs_is_restored(tmp_path: Path, disk: Path) -> None:
    repository = made(tmp_path, "--chunk-size", "64K")
    (first,) = backed_up(disk, "--to", repository)
    target = tmp_path / "target.img"
    target.write_bytes(disk.read_bytes())
    with disk.open("r+b") as file:
        file.seek(70_000)
        file.write(b"changed")
    backed_up(disk, "--to", repository)
    done = nbdsrv("restore", repository + "#", target, "--changed-since", first["point"], "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["written_bytes"] == 100_001 - 65_536
    assert target.read_bytes() == disk.read_bytes()


def test_several_repositories_one_of_which_cannot_be_written(tmp_path: Path, disk: Path) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    prefix = hidden_from()
    path = tmp_path / "other" / "repository"
    for each in (path, *path.rglob("*")):
        if each.is_dir():
            each.chmod(0o555)
    command = [*prefix, *COMMAND, "backup", str(disk), "--to", one, "--to", other, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=20, env=environment()
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr
    good, bad = json.loads(done.stdout)
    assert (good["repository"], bad["repository"]) == (one, other)
    assert "Permission denied" in bad["error"]
    said = refusal(1, "backup", disk, "--to", other, prefix=prefix)
    assert "Permission denied" in said
    path.chmod(0o755)


def test_encrypted(tmp_path: Path, disk: Path) -> None:
    key = {"NBDSRV_PASSPHRASE": "correct horse"}
    where = f"repo:{tmp_path / 'repository'}"
    said = refusal(2, "init", where, "--encrypt")
    assert "NBDSRV_PASSPHRASE" in said
    assert not (tmp_path / "repository").exists()
    made(tmp_path, "--encrypt", "--hash", "sha256", env=key)
    backed_up(disk, "--to", where, env=key)
    assert "NBDSRV_PASSPHRASE" in refusal(2, "backup", disk, "--to", where)
    said = refusal(1, "backup", disk, "--to", where, env={"NBDSRV_PASSPHRASE": "wrong"})
    assert "opens none" in said
    out = tmp_path / "out.img"
    assert nbdsrv("restore", f"{where}#disk", out, env=key).returncode == 0
    assert out.read_bytes() == disk.read_bytes()


def test_a_served_point_tells_what_changed(tmp_path: Path, disk: Path) -> None:
    """Over NBD: the export's name says which point it is, its context what has changed."""
    there = made(tmp_path / "there", "--chunk-size", "64K")
    here = made(tmp_path / "here", "--chunk-size", "64K")
    (first,) = backed_up(disk, "--to", there)
    with disk.open("r+b") as file:
        file.write(b"changed")
    (second,) = backed_up(disk, "--to", there)
    with serving(there, "--listen", f"unix:{tmp_path / 'socket'}") as server:
        del server
        uri = f"nbd+unix:///disk/disk@{{}}?socket={tmp_path / 'socket'}"
        (row,) = backed_up(uri.format(first["point"]), "--to", here)
        assert (row["disk"], row["mode"]) == ("disk", "full")
        (row,) = backed_up(uri.format(second["point"]), "--to", here)
    assert row["mode"] == "incremental", row["reason"]
    assert row["read_bytes"] == 65_536
    out = tmp_path / "out.img"
    assert nbdsrv("restore", f"{here}#disk", out).returncode == 0
    assert out.read_bytes() == disk.read_bytes()


@pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")) and not os.environ.get("CI"),
    reason="QEMU makes the bitmap",
)
def test_a_bitmap_of_qemu_tells_what_changed(tmp_path: Path, disk: Path) -> None:
    repository = made(tmp_path, "--chunk-size", "64K")
    image = tmp_path / "vm.qcow2"

    def qemu(*command: str | Path) -> None:
        subprocess.run([str(word) for word in command], check=True, capture_output=True)

    qemu("qemu-img", "convert", "-O", "qcow2", disk, image)
    qemu("qemu-img", "resize", image, "4M")
    qemu("qemu-io", "-c", "write -P 7 0 1M", image)
    qemu("qemu-img", "bitmap", "--add", image, "since")
    (first,) = backed_up(image, "--to", repository)
    qemu("qemu-io", "-c", "write -P 9 300k 1k", "-c", "write -z 512k 128k", image)
    changed = ("--changed", "qemu:dirty-bitmap:since")
    (doubted,) = backed_up(image, "--to", repository, *changed)
    assert doubted["mode"] == "scan"
    (row,) = backed_up(image, "--to", repository, *changed, "--since", first["point"][:22])
    assert (row["mode"], row["read_bytes"], row["zero_bytes"]) == ("incremental", 65_536, 131_072)
    assert row["rechecked_bytes"] > 0
    out = tmp_path / "out.img"
    assert nbdsrv("restore", f"{repository}#", out).returncode == 0
    assert nbdsrv("compare", out, image).returncode == 0


def test_bad_use_is_one_line(tmp_path: Path, disk: Path) -> None:
    repository = made(tmp_path)
    assert "there is a repository" in refusal(1, "init", repository)
    assert "repo:/path" in refusal(2, "init", tmp_path / "x")
    assert "leave out" in refusal(2, "init", f"{repository}#vm")
    assert "power of two" in refusal(2, "init", f"repo:{tmp_path}/y", "--chunk-size", "100K")
    assert "not a size" in refusal(2, "init", f"repo:{tmp_path}/y", "--chunk-size", "many")
    assert "4 MiB" in refusal(2, "init", f"repo:{tmp_path}/y", "--chunk-size", "8M")
    assert "nothing to back up" in refusal(2, "backup", "--to", repository)
    assert "--to" in refusal(2, "backup", disk)
    assert "two disks" in refusal(2, "backup", disk, disk, "--to", repository)
    assert "twice" in refusal(2, "backup", disk, "--to", repository, "--to", repository)
    assert "--rate" in refusal(2, "backup", disk, "--to", repository, "--rate", "fast")
    assert "--label" in refusal(2, "backup", disk, "--to", repository, "--label", "x")
    assert "nbdsrv init" in refusal(1, "backup", disk, "--to", f"repo:{tmp_path}/none")
    assert "No such file" in refusal(1, "backup", tmp_path / "none", "--to", repository)
    assert "200 bytes" in refusal(1, "backup", disk, "--to", repository, "--group", "x" * 300)
    assert "--since full" in refusal(
        2, "backup", disk, "--to", repository, "--since", "full", "--changed", "x:y"
    )
    said = refusal(2, "backup", disk, "--to", repository, "--changed", "base:allocation")
    assert "not what has changed" in said
    assert "no point" in refusal(1, "backup", disk, "--to", repository, "--since", "0123")
    assert "use copy" in refusal(2, "restore", disk, tmp_path / "out")
    assert "has no restore points" in refusal(1, "restore", f"{repository}#", tmp_path / "out")
    assert "--force" in refusal(
        2, "restore", f"{repository}#", tmp_path / "out", "--changed-since", "0", "--force"
    )
    nbdsrv("backup", disk, "--to", repository)
    since = ("--changed-since", "0123")
    said = refusal(1, "restore", f"{repository}#", disk, *since)
    assert "no other point matches 0123" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_point_and_no_lease(tmp_path: Path, number: int) -> None:
    repository = made(tmp_path)
    disk = tmp_path / "big.img"
    disk.write_bytes(os.urandom(8 << 20))
    process = subprocess.Popen(
        [*COMMAND, "backup", str(disk), "--to", repository, "--rate", "1M/s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    leases = tmp_path / "repository" / "leases"
    end = time.monotonic() + 20
    while not (leases.is_dir() and list(leases.glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"nbdsrv: stopped by {signal.Signals(number).name}: no restore point was made\n"
    assert list(leases.glob("*.json")) == []
    assert nbdsrv("ls", repository, "--json").returncode == 0
    backed_up(disk, "--to", repository)


def test_names_of_disks(tmp_path: Path, disk: Path) -> None:
    repository = made(tmp_path)
    rows = backed_up(
        disk, "--disk", f"root={disk}", "--to", repository, "--group", "vm/1", "--label", "a=b"
    )
    assert [(row["group"], row["disk"]) for row in rows] == [("vm/1", "disk"), ("vm/1", "root")]
    out = tmp_path / "out.img"
    assert nbdsrv("restore", f"{repository}#vm/1/root", out).returncode == 0
    assert out.read_bytes() == disk.read_bytes()


def test_names_that_are_not_utf8_are_refused_before_anything_is_read(
    tmp_path: Path, disk: Path
) -> None:
    repository, odd = made(tmp_path), tmp_path / os.fsdecode(b"latin\xe9.img")
    shutil.copy(disk, odd)
    assert "a group's name is UTF-8" in refusal(1, "backup", odd, "--to", repository)
    given: tuple[list[str | Path], ...] = (
        [odd, "--group", "vm"],
        [disk, "--disk", f"{odd.stem}={disk}"],
    )
    for arguments in given:
        text = refusal(1, "backup", *arguments, "--to", repository)
        assert r"a disk's name is UTF-8, and 'latin\udce9' is not" in text
    text = refusal(1, "backup", disk, "--label", f"of={odd.stem}", "--to", repository)
    assert r"a label is UTF-8, and 'of=latin\udce9' is not" in text
    assert not list((tmp_path / "repository" / "packs").glob("*/*"))
    backed_up("--disk", f"disk={odd}", "--to", repository)
