"""End to end: the program serves a repository, nbdcopy and nbdinfo read it."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv, refusal, serving
from tests.repository.fixtures import unpack_fixture
from tests.repository.xo.test_xo_fixtures import REPOSITORIES

KEY = {"NBDSRV_PASSPHRASE": "0123456789abcdef0123456789abcdef"}
LATEST = "20260103T020304Z"

pytestmark = pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="needs nbdcopy")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_fixture("xo-repositories.tar.zst", tmp_path_factory.mktemp("xo")) / "repos"


def run(*words: str | Path) -> str:
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.parametrize("name", REPOSITORIES)
def test_every_point_through_nbdcopy(whole: Path, tmp_path: Path, name: str) -> None:
    expected = json.loads((whole / "EXPECTED.json").read_text())[name]["points"]
    socket = tmp_path / "s"
    source = f"xo:{whole / name}"
    with serving(source, "--listen", f"unix:{socket}", env=KEY) as served:
        base = f"nbd+unix:///%s?socket={socket}"
        listed = json.loads(run("nbdinfo", "--list", "--json", base % ""))["exports"]
        names = {each["export-name"] for each in listed}
        assert names == {
            f"research-vm/{disk}@{point}"
            for point in [*expected, "latest"]
            for disk in ("root", "odd")
        }
        for point, disks in expected.items():
            for disk, row in disks.items():
                target = tmp_path / "copy"
                run("nbdcopy", base % f"research-vm/{disk}@{point}", target)
                data = target.read_bytes()[: row["size"]]  # an XVA's disks are padded
                assert row["sha256"] == hashlib.sha256(data).hexdigest()
                target.unlink()
        assert served.stop()[0] == 0


def test_commands(whole: Path, tmp_path: Path) -> None:
    source = f"xo:{whole / 'vhddir-gzip'}"
    rows = json.loads(nbdsrv("ls", "--json", source).stdout)
    assert [row["point"] for row in rows][-1] == LATEST
    assert rows[-1]["disks"][0]["device"] == "xvda"
    assert rows[-1]["compression"] == "gzip"
    facts = json.loads(nbdsrv("info", "--json", f"{source}#research-vm/xvda@latest").stdout)
    assert (facts["format"], facts["size"]) == ("xo", 64 << 20)
    assert facts["details"]["chain"] == 3
    target = tmp_path / "x.img"
    uuid = "b0a7e4c2-5d1f-4c8e-9a53-0000000000aa"
    assert nbdsrv("copy", f"{source}#{uuid}/odd@20260102", target).returncode == 0
    expected = json.loads((whole / "EXPECTED.json").read_text())["vhddir-gzip"]["points"]
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    assert found == expected["20260102T020304Z"]["odd"]["sha256"]
    assert nbdsrv("verify", source, "--level", "chunks").returncode == 0


def test_keys(whole: Path) -> None:
    source = f"xo:{whole / 'enc-chacha20'}"
    assert "NBDSRV_PASSPHRASE" in refusal(2, "ls", source)
    said = refusal(1, "ls", source, env={"NBDSRV_PASSPHRASE": "f" * 32})
    assert "does not open" in said
    said = refusal(1, "ls", source, env={"NBDSRV_PASSPHRASE": "short"})
    assert "32 characters" in said


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_fixture("xo-damaged.tar.zst", tmp_path_factory.mktemp("xo")) / "broken"


@pytest.mark.parametrize("name", ["wrongparent", "midmerge"])
def test_a_damaged_point_is_an_error_that_the_log_explains(
    broken: Path, tmp_path: Path, name: str
) -> None:
    """The client is told that it cannot be opened, not that there is none; the log names a file."""
    socket = tmp_path / "s"
    with serving(f"xo:{broken / name}", "--listen", f"unix:{socket}") as served:
        told = []
        for point in ("20260101T020304Z", "19990101"):
            done = subprocess.run(
                ["nbdinfo", f"nbd+unix:///research-vm/root@{point}?socket={socket}"],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
                env={**os.environ, "LIBNBD_DEBUG": "1"},  # what the server says is told there
            )
            assert done.returncode
            told.append("cannot be opened" in done.stderr)
        assert told == [True, False]
        code, said = served.stop()
    assert code == 0
    assert "export.unopened" in said
    assert "20260101T020304Z" in said
    assert "Traceback" not in said


def test_a_block_that_is_missing_is_logged(broken: Path, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with serving(f"xo:{broken / 'missingblock'}", "--listen", f"unix:{socket}") as served:
        uri = f"nbd+unix:///research-vm/root@latest?socket={socket}"
        done = subprocess.run(["nbdcopy", uri, "null:"], capture_output=True, check=False)
        assert done.returncode
        code, said = served.stop()
    assert code == 0
    assert "request.failed" in said
    assert "blocks/0/15" in said
    assert said.count("request.failed") <= 8 * 4
