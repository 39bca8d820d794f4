"""The command line: ``backup --to xo:`` and ``proxy --tee xo:``, read back by another's decoder."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv, refusal, serving
from tests.repository.native.read_back import noise
from tests.repository.xo.independent import all_points
from tests.repository.xo.written import KEY, MIB, make_remote


def test_backup_into_two_kinds(tmp_path: Path) -> None:
    disk, native, remote = tmp_path / "web.raw", tmp_path / "native", tmp_path / "r"
    disk.write_bytes(noise(3 * MIB) + bytes(2 * MIB))
    remote.mkdir()  # empty: it becomes one
    assert nbdsrv("init", f"repo:{native}", "--quiet").returncode == 0
    words = ("backup", disk, "--to", f"repo:{native}", "--to", f"xo:{remote}")
    for number in range(2):
        done = nbdsrv(*words, "--json")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert [row["repository"] for row in rows] == [f"repo:{native}", f"xo:{remote}"]
        assert [row["mode"] for row in rows] == ["scan" if number else "full"] * 2
        assert [*all_points(remote).values()][-1] == {"web": disk.read_bytes()}
        with disk.open("r+b") as file:
            file.write(noise(MIB))
    done = nbdsrv(*words, "--dry-run")
    assert done.returncode == 0
    assert f"xo:{remote}#web/web: scan" in done.stdout
    assert len(all_points(remote)) == 2


def test_refusals(tmp_path: Path) -> None:
    disk = tmp_path / "web.raw"
    disk.write_bytes(noise(MIB))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x").write_bytes(b"x")
    said = refusal(1, "backup", disk, "--to", f"xo:{tmp_path}/none")
    assert "neither empty nor a backup repository of Xen Orchestra" in said
    assert "takes a repository" in refusal(2, "backup", disk, "--to", f"pbs:{tmp_path}")
    said = refusal(2, "backup", disk, "--to", f"xo:{tmp_path}/none", "--layout", "qcow2")
    assert "--layout" in said
    said = refusal(2, "backup", disk, "--to", f"repo:{tmp_path}", "--layout", "vhd")
    assert "only xo: repositories" in said
    words = ("backup", disk, "--to", f"xo:{tmp_path}", "--layout", "vhd", "--packing", "gzip")
    assert "are not packed" in refusal(2, *words)
    root = make_remote(tmp_path / "r", "chacha20-poly1305")
    assert "NBDSRV_PASSPHRASE" in refusal(2, "backup", disk, "--to", f"xo:{root}")
    env = {"NBDSRV_PASSPHRASE": KEY[::-1]}
    assert "does not open" in refusal(1, "backup", disk, "--to", f"xo:{root}", env=env)
    env = {"NBDSRV_PASSPHRASE": KEY}
    words = ("backup", disk, "--to", f"xo:{root}", "--layout", "vhd")
    assert "cannot be" in refusal(2, *words, env=env)
    same = ("--to", f"xo:{root}", "--to", f"xo:{root}/.")
    assert "names this repository twice" in refusal(2, "backup", disk, *same, env=env)
    done = nbdsrv("backup", disk, "--to", f"xo:{root}", env=env)
    assert done.returncode == 0, done.stderr
    assert [*all_points(root, KEY).values()] == [{"web": disk.read_bytes()}]


@pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="needs nbdcopy")
def test_what_a_client_reads_is_kept(tmp_path: Path) -> None:
    image, root = tmp_path / "vda.raw", make_remote(tmp_path / "r")
    image.write_bytes(noise(3 * MIB) + bytes(2 * MIB) + noise(MIB))
    up = ("--listen", f"unix:{tmp_path}/up.sock")
    options = ("--listen", f"unix:{tmp_path}/down.sock", "--tee", f"xo:{root}", "--json")
    with serving(image, *up) as upstream:
        source = str(upstream.uris[0])
        with serving(source, *options, "--group", "vm", verb="proxy") as served:
            words = ["nbdcopy", str(served.uris[0]), str(tmp_path / "copy.raw")]
            subprocess.run(words, check=True, timeout=30)
            served.process.send_signal(signal.SIGTERM)
            assert served.process.stdout is not None
            (row,) = json.loads(served.process.stdout.read())
            assert served.process.wait(20) == 0
        assert row["reread_bytes"] == 0
        assert (tmp_path / "copy.raw").read_bytes() == image.read_bytes()
    (point,) = all_points(root).values()
    assert [*point.values()] == [image.read_bytes()]
