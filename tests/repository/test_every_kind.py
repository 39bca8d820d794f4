"""What all kinds of repositories have in common: the words of ls and info, migration, comparing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv
from tests.repository.benji.storage import Storage
from tests.repository.casync.encoder import written
from tests.repository.fixtures import unpack_fixture
from tests.repository.pbs.encoder import Datastore
from tests.repository.pbs.opened import T0
from tests.repository.virtnbdbackup.backups import Backups, random_disk

MIB = 1 << 20
SIZE = 3 * MIB + 1024


@dataclass
class Kind:
    """A repository of some kind: a disk, its three states.

    Attributes:
        source: names it.
        disk: the selector of the disk without a point.
        counted: does the tool tell how much a point has added?
    """

    source: str
    disk: str
    counted: bool = False


def _states() -> Sequence[bytes]:
    """A disk that goes on: data that changes, data that is zeroed."""
    first = bytearray(random_disk(SIZE, 7))
    second = bytearray(first)
    second[MIB : MIB + 5000] = b"second" * 833 + b"ab"
    third = bytearray(second)
    third[2 * MIB : 2 * MIB + 200_000] = bytes(200_000)
    return [bytes(first), bytes(second), bytes(third)]


def _pbs(root: Path) -> Kind:
    store = Datastore(root)
    for number, state in enumerate(_states()):
        store.snapshot("ns/vm/100", T0 + 86400 * number, {"drive-scsi0": state})
    return Kind(f"pbs:{root}", "ns/vm/100/scsi0")


def _casync(root: Path) -> Kind:
    root.mkdir()
    sizes = (1024, 65536, 65536)
    for number, state in enumerate(_states(), 1):
        cuts = [*range(65536, SIZE, 65536), SIZE]
        written(root / f"vm1-2026-01-0{number}.caibx", state, cuts, sizes=sizes)
    return Kind(f"casync:{root}", "vm1")


def _benji(root: Path) -> Kind:
    storage = Storage(root)
    for number, state in enumerate(_states(), 1):
        storage.version(f"V{number:010d}", state)
    return Kind(f"benji:{root}", "pool/vm 1/disk", counted=True)


def _virtnbdbackup(root: Path) -> Kind:
    root.mkdir()
    first, *later = _states()
    backups = Backups(root, bytearray(first), packed=1)
    backups.full()
    for state in later:
        for at in range(0, SIZE, 4096):
            if backups.disk[at : at + 4096] != state[at : at + 4096]:
                backups.change(at, state[at : at + 4096])
        backups.increment()
        assert bytes(backups.disk) == state
    return Kind(f"virtnbdbackup:{root}", f"{root.name}/vda", counted=True)


KINDS = [_pbs, _casync, _benji, _virtnbdbackup]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__[1:])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    make: Callable[[Path], Kind] = request.param
    return make(tmp_path / "theirs")


def test_points_are_migrated_with_their_times(kind: Kind, tmp_path: Path) -> None:
    target = f"repo:{tmp_path / 'ours'}"
    assert nbdsrv("init", target).returncode == 0
    first = nbdsrv("copy", kind.source, target, "--json", "--quiet")
    assert first.returncode == 0, first.stderr
    said = json.loads(first.stdout)
    assert said["damaged"] == []
    modes = [mode for point in said["points"] for mode in point["modes"].values()]
    assert modes == ["full", "incremental", "incremental"]
    again = json.loads(nbdsrv("copy", kind.source, target, "--json", "--quiet").stdout)
    assert [point["copied"] for point in again["points"]] == [False] * 3
    theirs, ours = (
        [(row["group"], row["time"]) for row in json.loads(nbdsrv("ls", each, "--json").stdout)]
        for each in (kind.source, target)
    )
    assert theirs == ours
    raw = tmp_path / "second.raw"
    raw.write_bytes(_states()[1])
    _, second, third = said["points"]
    (disk,) = second["modes"]
    mine = [f"{target}#{each['group']}/{disk}@{each['id']}" for each in (second, third)]
    assert nbdsrv("compare", mine[0], raw).returncode == 0
    assert nbdsrv("compare", mine[1], f"{kind.source}#{kind.disk}@latest").returncode == 0


def test_backup_keeps_name_and_time(kind: Kind, tmp_path: Path) -> None:
    """One point as a SOURCE; a migration finds it there later."""
    target = f"repo:{tmp_path / 'ours'}"
    assert nbdsrv("init", target).returncode == 0
    theirs = json.loads(nbdsrv("ls", kind.source, "--json").stdout)[1]
    one = f"{kind.source}#{kind.disk}@{theirs['point']}"
    done = nbdsrv("backup", one, "--to", target, "--quiet")
    assert done.returncode == 0, done.stderr
    (ours,) = json.loads(nbdsrv("ls", target, "--json").stdout)
    assert ours["group"] == theirs["group"]
    assert ours["time"] == theirs["time"]
    assert [disk["name"] for disk in ours["disks"]] == [disk["name"] for disk in theirs["disks"]]
    said = json.loads(nbdsrv("copy", kind.source, target, "--json", "--quiet").stdout)
    assert [point["copied"] for point in said["points"]] == [True, False, True]


def test_the_same_words_for_the_same_facts(kind: Kind) -> None:
    run = nbdsrv("info", f"{kind.source}#{kind.disk}@latest", "--json")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert {"group", "disk", "point", "created"} <= facts["details"].keys()
    assert facts["details"]["created"].endswith("Z")
    assert facts["size"] == SIZE
    head, *rows = nbdsrv("ls", kind.source).stdout.splitlines()
    new = head.index("NEW")
    assert [row[new] == "-" for row in rows] == [not kind.counted] * 3


def test_a_remote_is_known_by_its_id(tmp_path: Path) -> None:
    """It was moved meanwhile: its points are there already."""
    key = {"NBDSRV_PASSPHRASE": "0123456789abcdef0123456789abcdef"}
    repos = unpack_fixture("xo-repositories.tar.zst", tmp_path) / "repos"
    target = f"repo:{tmp_path / 'ours'}"
    assert nbdsrv("init", target).returncode == 0
    one = f"xo:{repos / 'enc-aes256'}#research-vm/odd@20260101"
    assert nbdsrv("copy", one, target, "--quiet", env=key).returncode == 0
    (repos / "enc-aes256").rename(repos / "moved")
    said = nbdsrv("copy", one.replace("enc-aes256", "moved"), target, "--json", env=key)
    assert [each["copied"] for each in json.loads(said.stdout)["points"]] == [False]
