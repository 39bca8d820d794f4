"""``nbdsrv prune``, ``gc`` and ``verify`` as their users run them."""

import json
import random
from pathlib import Path

import pytest

from nbdsrv.repository.native.layout import LEASES, PACKS, POINTS
from nbdsrv.repository.native.lease import Lease
from nbdsrv.store.directory import DirectoryStore
from tests.cli.program import nbdsrv, refusal
from tests.repository.native.building import CHUNK, Building

PASSPHRASE = "correct horse"
SECRET = {"NBDSRV_PASSPHRASE": PASSPHRASE}


def disk(seed: int, chunks: int = 6) -> bytes:
    return random.Random(seed).randbytes(chunks * CHUNK)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def build(place: Path, passphrase: str | None = None) -> Building:
    """Three points of one VM, one of another."""
    made = Building.fresh(DirectoryStore(str(place)), passphrase=passphrase)
    for day in range(3):
        made.point("vm", {"sda": disk(day)}, created=1_700_000_000.0 + 86400 * day)
    made.point("db", {"sda": disk(9), "sdb": disk(10)}, created=1_700_000_000.0)
    return made


def objects(place: Path, prefix: str) -> list[str]:
    return [stored.key for stored in DirectoryStore(str(place)).list(prefix)]


def flip(place: Path, key: str, at: int) -> None:
    path = place / key
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_prune_says_what_stays_and_why(place: Path) -> None:
    build(place)
    run = nbdsrv("prune", f"repo:{place}#vm", "--keep-last", "1", "--keep-daily", "2", "--utc")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[0] == "vm"
    assert lines[1].endswith("kept: last, daily")
    assert lines[2].endswith("kept: daily")
    assert lines[3].endswith("deleted")
    assert lines[4] == "1 point deleted; days are those of UTC"
    assert len(objects(place, POINTS)) == 3


def test_prune_and_collect_in_one(place: Path) -> None:
    build(place)
    packs = len(objects(place, PACKS))
    run = nbdsrv("prune", f"repo:{place}", "--keep-last", "1", "--gc", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    facts = json.loads(run.stdout)
    assert facts["deleted"] == 2
    assert facts["gc"]["condemned_packs"] > 0
    assert len(objects(place, PACKS)) == packs  # within the time of grace
    run = nbdsrv("gc", f"repo:{place}", "--grace", "0", "--json")
    assert json.loads(run.stdout)["deleted_packs"] == facts["gc"]["condemned_packs"]
    assert len(objects(place, PACKS)) == packs - 2


def test_a_dry_run_of_prune_and_gc_changes_nothing(place: Path) -> None:
    build(place)
    before = objects(place, "")
    run = nbdsrv("prune", f"repo:{place}", "--keep-last", "1", "--gc", "--dry-run")
    assert run.returncode == 0
    assert run.stdout.count("would be deleted") == 4
    assert objects(place, "") == before


def test_prune_without_a_rule_deletes_nothing(place: Path) -> None:
    build(place)
    assert "no rule" in refusal(2, "prune", f"repo:{place}")
    assert "--keep-within" in refusal(2, "prune", f"repo:{place}", "--keep-within", "soon")
    assert "--keep-label" in refusal(2, "prune", f"repo:{place}", "--keep-label", "=x")
    refusal(2, "prune", f"repo:{place}", "--keep-last", "0")
    said = refusal(2, "prune", f"repo:{place}#nobody", "--keep-last", "1")
    assert "db, vm" in said
    assert len(objects(place, POINTS)) == 4


def test_what_is_read_is_spared(place: Path) -> None:
    made = build(place)
    oldest = objects(place, f"{POINTS}vm/")[0].removeprefix(POINTS).removesuffix(".pt")
    with Lease(made.vault.store, "reader", [oldest]):
        run = nbdsrv("prune", f"repo:{place}#vm", "--keep-last", "1")
    assert "kept: it is being read on" in run.stdout
    assert len(objects(place, f"{POINTS}vm/")) == 2
    assert objects(place, LEASES) == []


def test_damaged_points_hold_up_the_collector_until_they_are_deleted(place: Path) -> None:
    build(place)
    key = objects(place, f"{POINTS}vm/")[0]
    flip(place, key, 150)
    said = refusal(1, "gc", f"repo:{place}", "--grace", "0")
    assert key in said
    assert "prune --damaged" in said
    run = nbdsrv("prune", f"repo:{place}", "--keep-last", "5")
    assert run.returncode == 3
    run = nbdsrv("prune", f"repo:{place}", "--damaged")
    assert run.returncode == 0
    assert nbdsrv("gc", f"repo:{place}", "--grace", "0").returncode == 0


@pytest.mark.parametrize("level", ["structure", "packs", "chunks"])
def test_a_sound_repository_verifies(place: Path, level: str) -> None:
    build(place, PASSPHRASE)
    run = nbdsrv("verify", f"repo:{place}", "--level", level, env=SECRET)
    assert (run.returncode, run.stderr) == (0, "")
    assert "no damage found" in run.stdout
    assert run.stdout.startswith("4 points, 5 disks, ")


def test_verify_names_what_is_damaged_and_whom_it_hurts(place: Path) -> None:
    build(place)
    key = objects(place, PACKS)[0]
    flip(place, key, 1000)
    assert nbdsrv("verify", f"repo:{place}").returncode == 0  # chunks are not read
    run = nbdsrv("verify", f"repo:{place}", "--level", "packs", "--json")
    assert (run.returncode, run.stderr) == (3, "")
    facts = json.loads(run.stdout)
    (finding,) = facts["findings"]
    assert (finding["key"], finding["offset"]) == (key, 64)
    assert [hurt["length"] for hurt in finding["hurts"]] == [CHUNK]
    run = nbdsrv("verify", f"repo:{place}", "--level", "chunks", "--quiet")
    assert run.returncode == 3
    hurt = finding["hurts"][0]
    assert f"damaged: {key} at 64: " in run.stdout
    assert f"  hurts {hurt['point']} {hurt['disk']}: {CHUNK} at " in run.stdout


def test_verify_of_what_is_selected(place: Path) -> None:
    build(place)
    for selector, points, disks in (
        ("vm", 3, 3),
        ("vm@latest", 1, 1),
        ("db/sdb", 1, 1),
        ("db", 1, 2),
    ):
        run = nbdsrv("verify", f"repo:{place}#{selector}", "--level", "chunks", "--json")
        facts = json.loads(run.stdout)
        assert (facts["points"], facts["disks"], facts["findings"]) == (points, disks, [])
        assert 0 < facts["checked"] < len(objects(place, ""))
    refusal(1, "verify", f"repo:{place}#nobody")


def test_a_budget_is_kept_and_resumed(place: Path) -> None:
    build(place)
    seen = 0
    for _ in range(20):
        run = nbdsrv("verify", f"repo:{place}", "--level", "packs", "--max-bytes", "600K", "--json")
        facts = json.loads(run.stdout)
        seen += facts["checked"]
        if facts["completed"]:
            break
        assert facts["read_bytes"] <= 600 * 1024 + 7 * CHUNK
    assert facts["completed"]
    assert facts["packs"] <= seen < 2 * facts["packs"]  # the last run has begun another round


def test_verify_without_the_key(place: Path) -> None:
    build(place, PASSPHRASE)
    run = nbdsrv("verify", f"repo:{place}", "--level", "packs", "--without-key")
    assert (run.returncode, run.stderr) == (0, "")
    assert "NBDSRV_PASSPHRASE" in refusal(2, "verify", f"repo:{place}")
    refusal(2, "verify", f"repo:{place}", "--without-key")
    flip(place, objects(place, PACKS)[0], 1000)
    assert nbdsrv("verify", f"repo:{place}", "--level", "packs", "--without-key").returncode == 3


def test_bad_use_of_verify_and_gc(place: Path, tmp_path: Path) -> None:
    build(place)
    refusal(2, "verify", "disk.img")
    refusal(2, "verify", f"repo:{place}", "--sample", "0")
    assert "--time-budget" in refusal(2, "verify", f"repo:{place}", "--time-budget", "x")
    assert "--max-bytes" in refusal(2, "verify", f"repo:{place}", "--max-bytes", "x")
    assert "--grace" in refusal(2, "gc", f"repo:{place}", "--grace", "-1")
    for words in (("--sample", "5"), ("--time-budget", "5m"), ("--max-bytes", "5M")):
        assert "--level packs" in refusal(2, "verify", f"repo:{place}", *words)
    refusal(2, "gc", f"repo:{place}#vm")
    for command in ("verify", "gc"):
        assert "no repository" in refusal(1, command, f"repo:{tmp_path}/nothing")
