"""A datastore through the program itself: ls, info, verify, and served to nbdcopy and nbdinfo."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv, refusal, serving
from tests.repository.pbs.encoder import Datastore, Key, key_file
from tests.repository.pbs.opened import T0, golden, rewritten

GOLDEN = golden()
LATER = rewritten(GOLDEN, 3)


def _peers() -> None:
    for name in ("nbdcopy", "nbdinfo"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def _copied(uri: str, target: Path) -> str:
    subprocess.run(["nbdcopy", uri, target], check=True, timeout=30)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def test_served_whole(store: Datastore, tmp_path: Path) -> None:
    _peers()
    key = Key(b"k" * 32)
    (tmp_path / "key").write_text(key_file(key))
    store.snapshot("vm/100", T0, {"drive-scsi0": GOLDEN})
    store.snapshot("vm/100", T0 + 86400, {"drive-scsi0": LATER}, notes="später", protected=True)
    store.snapshot("lab/vm/7", T0, {"drive-virtio0": GOLDEN}, key=key)
    source, socket = f"pbs:{store.root}", tmp_path / "s"
    secret = {"NBDSRV_PBS_KEYFILE": str(tmp_path / "key")}
    with serving(source, "--listen", f"unix:{socket}", env=secret) as served:
        uri = f"nbd+unix:///%s?socket={socket}"
        run = ["nbdinfo", "--list", "--json", uri % ""]
        listed = json.loads(subprocess.check_output(run, timeout=30))["exports"]
        assert {each["export-name"] for each in listed} == {
            "vm/100/drive-scsi0@latest",
            "vm/100/drive-scsi0@2026-01-01T00:00:00Z",
            "vm/100/drive-scsi0@2026-01-02T00:00:00Z",
            "lab/vm/7/drive-virtio0@latest",
            "lab/vm/7/drive-virtio0@2026-01-01T00:00:00Z",
        }
        for name, content in (
            ("vm/100/drive-scsi0@2026-01-01T00:00:00Z", GOLDEN),
            ("vm/100/drive-scsi0@latest", LATER),
            ("vm/100/scsi0@2026-01-02", LATER),
            ("lab/vm/7/drive-virtio0@latest", GOLDEN),
        ):
            wanted = hashlib.sha256(content).hexdigest()
            assert _copied(uri % name, tmp_path / "out") == wanted
        since = "nbdsrv:changed-since:2026-01-01T00:00:00Z"
        run = ["nbdinfo", f"--map={since}", "--json", uri % "vm/100/drive-scsi0@latest"]
        rows = json.loads(subprocess.check_output(run, timeout=30))
        assert [(row["offset"], row["type"]) for row in rows] == [(0, 0), (196608, 1), (262144, 0)]
        assert served.stop() == (0, "")


def test_on_the_command_line(store: Datastore, tmp_path: Path) -> None:
    key = Key(b"k" * 32)
    kdf = {"Scrypt": {"n": 1024, "r": 8, "p": 1, "salt": "AAAA"}}
    (tmp_path / "key").write_text(key_file(key, kdf, b"open sesame"))
    store.snapshot("vm/100", T0, {"drive-scsi0": GOLDEN}, key=key, notes="before the upgrade")
    source = f"pbs:{store.root}"
    (row,) = json.loads(nbdsrv("ls", source, "--json").stdout)
    assert (row["group"], row["point"]) == ("vm/100", "2026-01-01T00:00:00Z")
    assert (row["notes"], row["encrypted"], row["signature"]) == (
        "before the upgrade",
        True,
        "not checked",
    )
    disk = f"{source}#vm/100/scsi0"
    assert "name its key file in NBDSRV_PBS_KEYFILE" in refusal(1, "info", disk)
    secret = {"NBDSRV_PBS_KEYFILE": str(tmp_path / "key")}
    assert "NBDSRV_PASSPHRASE" in refusal(2, "info", disk, env=secret)
    wrong = {**secret, "PBS_ENCRYPTION_PASSWORD": "wrong"}
    assert "the passphrase does not open it" in refusal(1, "info", disk, env=wrong)
    right = {**secret, "PBS_ENCRYPTION_PASSWORD": "open sesame"}
    facts = json.loads(nbdsrv("info", disk, "--json", env=right).stdout)
    assert facts["size"] == len(GOLDEN)
    assert facts["details"]["signature"] == "valid"
    target = tmp_path / "out.img"
    assert nbdsrv("copy", disk, f"raw:{target}", env=right).returncode == 0
    assert target.read_bytes() == GOLDEN
    assert "no datastore" in refusal(1, "ls", f"pbs:{tmp_path}")
