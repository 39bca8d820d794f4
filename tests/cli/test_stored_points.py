"""Repositories on the command line: ls, info, map, copy, compare, and served whole."""

import json
import os
import re
from pathlib import Path

import pytest

from nbdsrv.repository.native.layout import PACKS
from nbdsrv.store.directory import DirectoryStore
from tests.cli.program import nbdsrv, refusal, serving
from tests.repository.native.building import CHUNK, Building

GOLDEN = bytes(2 * CHUNK) + os.urandom(3 * CHUNK + 99) + b"-"  # not the "x" of the next point


@pytest.fixture
def build(tmp_path: Path) -> Building:
    """Two VMs; the first with two points."""
    made = Building.fresh(DirectoryStore(str(tmp_path / "repo")))
    made.point("vm 1", {"sda": GOLDEN})
    made.point("vm 1", {"sda": GOLDEN[:-1] + b"x"}, lock_until=9e9)
    made.point("vm2", {"sda": b"a" * 100, "sdb": b""})
    return made


def _source(build: Building) -> str:
    return f"repo:{build.vault.name}"


def test_ls(build: Building) -> None:
    run = nbdsrv("ls", _source(build))
    assert (run.returncode, run.stderr) == (0, "")
    head, *rows = run.stdout.splitlines()
    assert head.split() == ["GROUP", "POINT", "TIME", "DISKS", "MODE", "NEW", "FLAGS"]
    assert len(rows) == 3
    assert rows[1].endswith("locked")
    assert "sda 100 B, sdb 0 B" in rows[2]
    run = nbdsrv("ls", _source(build) + "#vm 1", "--json")
    points = json.loads(run.stdout)
    assert [point["group"] for point in points] == ["vm 1", "vm 1"]
    assert points[0]["disks"][0]["size"] == len(GOLDEN)
    assert points[1]["flags"] == ["locked"]


def test_ls_without_what_is_pinned(build: Building, tmp_path: Path) -> None:
    """That pins cannot be listed is told, and is no reason to list nothing."""
    (tmp_path / "repo" / "pins").symlink_to("pins")  # leads nowhere, also for root
    run = nbdsrv("ls", _source(build))
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == 4
    assert re.fullmatch(r"nbdsrv: .*pins.*\n", run.stderr)


def test_info_of_a_repository(build: Building) -> None:
    facts = json.loads(nbdsrv("info", _source(build), "--json").stdout)
    assert facts["format"] == "repo"
    assert facts["id"] == str(build.vault.config.id)
    assert (facts["hash"], facts["cipher"], facts["chunk_size"]) == ("blake3", "none", CHUNK)
    assert (facts["points"], facts["groups"]) == (3, ["vm 1", "vm2"])
    stored = sum(each.size for each in build.vault.store.list(""))
    assert facts["stored_bytes"] == stored
    text = nbdsrv("info", _source(build)).stdout
    assert re.search(r"^groups +2 \(vm 1, vm2\)$", text, re.MULTILINE)


def test_points_are_not_served_for_writing(build: Building) -> None:
    for selector in ("", "#vm 1", "#vm 1/sda@latest"):
        said = refusal(1, "serve", "--write", _source(build) + selector)
        assert "a restore point is only read; `nbdsrv serve --overlay DIR`" in said


def test_a_disk_of_a_point_is_a_source(build: Building, tmp_path: Path) -> None:
    source = _source(build) + "#vm 1/sda@latest"
    facts = json.loads(nbdsrv("info", source, "--json").stdout)
    assert facts["details"]["created"].endswith("Z"), "as ls shows it, and for every kind"
    assert (facts["size"], facts["hole_bytes"]) == (len(GOLDEN), 2 * CHUNK)
    assert facts["details"]["group"] == "vm 1"
    (since,) = [name for name in facts["contexts"] if name.startswith("nbdsrv:changed-since:")]
    rows = json.loads(nbdsrv("map", source, "--json", "--context", since).stdout)
    assert [(row["start"], row["type"]) for row in rows] == [(0, 0), (5 * CHUNK, 1)]
    target = tmp_path / "out.img"
    assert nbdsrv("copy", source, f"raw:{target}").returncode == 0
    assert target.read_bytes() == GOLDEN[:-1] + b"x"
    assert nbdsrv("compare", source, str(target)).returncode == 0
    leases = tmp_path / "repo" / "leases"
    assert list(leases.iterdir()) == []


def test_bad_use(build: Building, tmp_path: Path) -> None:
    source = _source(build)
    assert "the groups are vm 1, vm2" in refusal(1, "info", source + "#vm3")
    assert "vm2/sda, vm2/sdb; say which" in refusal(1, "map", source + "#vm2")
    assert "no repository there" in refusal(1, "ls", f"repo:{tmp_path}")
    assert "not a repository" in refusal(2, "ls", str(tmp_path))
    assert "not a repository" in refusal(2, "ls", source + "#vm2~p1")


def test_damage_is_one_line(build: Building, tmp_path: Path) -> None:
    for pack in (tmp_path / "repo" / PACKS).rglob("*.pk"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.write_bytes(data)
    line = refusal(1, "copy", _source(build) + "#vm 1", f"raw:{tmp_path / 'out'}")
    assert "corrupt repository: packs/" in line


def test_a_whole_repository_is_served(build: Building, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 's'}"
    with serving(_source(build), "--listen", listen) as served:
        (uri,) = served.uris
        assert str(uri) == f"nbd+unix:///?socket={tmp_path / 's'}"
        base = f"nbd+unix:///%s?socket={tmp_path / 's'}"
        name = "vm%201/sda@latest"
        facts = json.loads(nbdsrv("info", base % name, "--json").stdout)
        assert facts["size"] == len(GOLDEN)
        new = build.point("vm 3", {"root": b"new" * 1000})
        facts = json.loads(nbdsrv("info", base % f"vm%203/root@{new.id}", "--json").stdout)
        assert facts["size"] == 3000
        line = refusal(1, "info", base % "vm3/root")
        assert "vm3/root" in line
        assert str(tmp_path / "repo") not in line


def test_one_disk_is_served_as_the_default_export(build: Building, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 's'}"
    with serving(_source(build) + "#vm2/sda", "--listen", listen) as served:
        (uri,) = served.uris
        assert json.loads(nbdsrv("info", str(uri), "--json").stdout)["size"] == 100
        again = f"nbd+unix:///vm2/sda?socket={tmp_path / 's'}"
        assert json.loads(nbdsrv("info", again, "--json").stdout)["size"] == 100


def test_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    made = Building.fresh(DirectoryStore(str(path)), passphrase="open sesame")
    made.point("vm", {"sda": GOLDEN})
    source = f"repo:{path}#vm"
    assert "NBDSRV_PASSPHRASE" in refusal(2, "info", source)
    secret = {"NBDSRV_PASSPHRASE": "open sesame"}
    assert nbdsrv("map", source, env=secret).returncode == 0
    assert "opens none of its 1 key slots" in refusal(
        1, "info", source, env={"NBDSRV_PASSPHRASE": "wrong"}
    )
