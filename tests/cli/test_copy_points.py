"""``nbdsrv copy`` from one repository to another, as it is run."""

import json
import signal
import subprocess
import time
from pathlib import Path
from random import Random

import pytest

from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.directory import DirectoryStore
from tests.cli.program import COMMAND, PATIENCE, environment, nbdsrv, refusal
from tests.repository.native.made import PASSPHRASE, add_point, content, made

SECRET = {"NBDSRV_PASSPHRASE": PASSPHRASE}
FIRST, SECOND = content(1, 2, 0, 3, tail=100), content(1, 4, 0, 3, tail=100)


@pytest.fixture
def points(tmp_path: Path) -> list[PointRecord]:
    """Of two groups, in ``one``; ``other`` is empty."""
    vault = made(DirectoryStore(str(tmp_path / "one")))
    first = add_point(vault, "vm", {"sda": FIRST, "sdb": SECOND})
    second = add_point(vault, "vm", {"sda": SECOND}, parent=first.id, created=1_700_000_100.0)
    third = add_point(vault, "web/1", {"sda": FIRST}, created=1_700_000_200.0)
    made(DirectoryStore(str(tmp_path / "other")))
    return [first, second, third]


def there(path: Path) -> list[tuple[str, list[str]]]:
    found, damaged = Vault.open(DirectoryStore(str(path)), lambda: PASSPHRASE).points()
    assert [] == damaged
    return [(record.id, [disk.name for disk in record.disks]) for record in found]


def test_everything_then_nothing(tmp_path: Path, points: list[PointRecord]) -> None:
    arguments = ("copy", f"repo:{tmp_path}/one", f"repo:{tmp_path}/other")
    process = nbdsrv(*arguments)
    assert (0, "") == (process.returncode, process.stderr)
    assert 3 == len(process.stdout.splitlines())
    assert f"vm@{points[0].id}: " in process.stdout
    assert there(tmp_path / "one") == there(tmp_path / "other")
    process = nbdsrv(*arguments, "--json")
    said = json.loads(process.stdout)
    assert [False] * 3 == [each["copied"] for each in said["points"]]
    assert ([], 0) == (said["damaged"], sum(each["read_bytes"] for each in said["points"]))
    restored = tmp_path / "restored.img"
    source = f"repo:{tmp_path}/other#vm/sda@{points[0].id}"
    assert 0 == nbdsrv("copy", source, restored).returncode
    assert FIRST == restored.read_bytes()


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("vm", [(0, ["sda", "sdb"]), (1, ["sda"])]),
        ("vm/sdb", [(0, ["sdb"])]),
        ("vm@latest", [(1, ["sda"])]),
        ("web/1", [(2, ["sda"])]),
        ("vm/sda@2023-11-14T22:13:20", [(0, ["sda"])]),
    ],
)
def test_what_is_copied(
    tmp_path: Path,
    points: list[PointRecord],
    selector: str,
    expected: list[tuple[int, list[str]]],
) -> None:
    process = nbdsrv("copy", f"repo:{tmp_path}/one#{selector}", f"repo:{tmp_path}/other")
    assert (0, "") == (process.returncode, process.stderr)
    assert [(points[n].id, disks) for n, disks in expected] == there(tmp_path / "other")


def test_from_a_plain_one_to_an_encrypted_one(tmp_path: Path, points: list[PointRecord]) -> None:
    made(DirectoryStore(str(tmp_path / "secret")), encrypted=True)
    arguments = ("copy", f"repo:{tmp_path}/one", f"repo:{tmp_path}/secret")
    assert "set NBDSRV_TARGET_PASSPHRASE" in refusal(2, *arguments)
    wrong = SECRET | {"NBDSRV_TARGET_PASSPHRASE": "wrong"}
    assert "opens none" in refusal(1, *arguments, env=wrong)
    assert 0 == nbdsrv(*arguments, "--quiet", env=SECRET).returncode
    assert there(tmp_path / "one") == there(tmp_path / "secret")


def test_a_damaged_point_is_left_out_and_told(tmp_path: Path, points: list[PointRecord]) -> None:
    path = next((tmp_path / "one" / "points" / "vm").glob(f"{points[0].id}*"))
    path.write_bytes(b"x" + path.read_bytes()[1:])
    process = nbdsrv("copy", f"repo:{tmp_path}/one", f"repo:{tmp_path}/other", "--json")
    assert 3 == process.returncode
    said = json.loads(process.stdout)
    assert 1 == len(said["damaged"])
    assert points[0].id in process.stderr
    assert [points[1].id, points[2].id] == [each[0] for each in there(tmp_path / "other")]
    text = refusal(1, "copy", f"repo:{tmp_path}/one#vm@{points[0].id}", f"repo:{tmp_path}/other")
    assert "corrupt repository" in text


def test_told_to_stop_it_holds_no_lease(tmp_path: Path, points: list[PointRecord]) -> None:
    noise = Random(1).randbytes(64 << 20)
    source, target = tmp_path / "one", tmp_path / "other"
    add_point(Vault.open(DirectoryStore(str(source)), lambda: ""), "large", {"sda": noise})
    command = [*COMMAND, "copy", f"repo:{source}#large", f"repo:{target}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    with process:
        deadline = time.monotonic() + PATIENCE
        while not any((target / "leases").glob("*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert (128 + signal.SIGTERM, "") == (process.returncode, out), err
    assert "stopped by SIGTERM" in err
    assert 1 == err.count("\n")
    assert [] == list((target / "leases").iterdir())
    assert [] == there(target)


def test_refusals(tmp_path: Path, points: list[PointRecord], disk: Path) -> None:
    one, other = f"repo:{tmp_path}/one", f"repo:{tmp_path}/other"
    assert "`nbdsrv backup`" in refusal(2, "copy", disk, other)
    assert "leave out #x" in refusal(2, "copy", one, f"{other}#x")
    assert "leave out the options" in refusal(2, "copy", one, other, "--to", "raw")
    assert "is the same repository" in refusal(1, "copy", one, one)
    assert "no repository there" in refusal(1, "copy", one, f"repo:{tmp_path}/none")
    assert "no such group" in refusal(1, "copy", f"{one}#nobody", other)
    assert "means 2 points; say which" in refusal(2, "copy", f"{one}#vm@2023-11-14", other)
    assert [] == there(tmp_path / "other")
