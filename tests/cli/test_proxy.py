"""``nbdsrv proxy`` between real programs: qemu-nbd above, nbdcopy and nbdinfo below."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import (
    COMMAND,
    PATIENCE,
    Served,
    environment,
    nbdsrv,
    refusal,
    serving,
)

MIB = 1 << 20
SIZE = 24 * MIB

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("qemu-nbd", "nbdcopy", "nbdinfo"))
    and not os.environ.get("CI"),
    reason="qemu-utils and libnbd-bin are not installed",
)


def run(*words: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in words], check=True, capture_output=True, text=True, timeout=30
    ).stdout


class Upstream:
    """A qcow2 image with a bitmap, and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "vda.qcow2"
        raw = folder / "vda.raw"
        raw.write_bytes(
            bytes(n * 31 % 251 for n in range(MIB)) * 5 + bytes(SIZE - 6 * MIB) + b"z" * MIB
        )
        run("qemu-img", "convert", "-O", "qcow2", raw, self.image)
        self.uri = f"nbd+unix:///vda?socket={folder}/up.sock"

    def start_bitmap(self) -> None:
        run("qemu-img", "bitmap", "--add", self.image, "b0")

    def change(self) -> None:
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", self.image)
        run("qemu-io", "-f", "qcow2", "-c", "write -z 4M 1M", self.image)

    @property
    def content(self) -> bytes:
        plain = self.folder / "plain.raw"
        run("qemu-img", "convert", "-O", "raw", self.image, plain)
        return plain.read_bytes()

    @contextlib.contextmanager
    def served(self, *options: str) -> Iterator[None]:
        socket = self.folder / "up.sock"
        socket.unlink(missing_ok=True)
        command = ["qemu-nbd", "-t", "-e", "8", "-f", "qcow2", "-x", "vda", "-k", str(socket)]
        with subprocess.Popen([*command, *options, str(self.image)]) as process:
            try:
                deadline = time.monotonic() + 10
                while not socket.exists() and time.monotonic() < deadline:
                    time.sleep(0.02)
                yield
            finally:
                process.terminate()


@pytest.fixture
def upstream(tmp_path: Path) -> Upstream:
    return Upstream(tmp_path)


def repositories(folder: Path) -> list[str]:
    made = []
    for name, chunk in (("one", "64K"), ("two", "1M")):
        made.append(f"repo:{folder / name}")
        assert nbdsrv("init", made[-1], "--chunk-size", chunk).returncode == 0
    return made


def report(served: Served) -> list[dict[str, Any]]:
    """What was printed at the end of a run that ended well."""
    out, err = served.process.communicate(timeout=20)
    assert (served.process.returncode, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def restored(repository: str, folder: Path) -> bytes:
    target = folder / "restored.raw"
    target.unlink(missing_ok=True)
    assert nbdsrv("restore", f"{repository}#vda/vda@latest", target).returncode == 0
    return target.read_bytes()


def test_everything_is_passed_on(upstream: Upstream, tmp_path: Path) -> None:
    upstream.start_bitmap()
    upstream.change()
    where = f"unix:{tmp_path}/down.sock"
    with (
        upstream.served("-r", "-B", "b0"),
        serving(upstream.uri, "--listen", where, verb="proxy") as served,
    ):
        uri = str(served.uris[0])
        about = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
        assert about["contexts"] == ["base:allocation", "qemu:dirty-bitmap:b0"]
        assert about["is_read_only"]
        assert about["can_multi_conn"]
        for context in about["contexts"]:
            words = ("nbdinfo", "--json", f"--map={context}")
            assert json.loads(run(*words, uri)) == json.loads(run(*words, upstream.uri))
        run("nbdcopy", uri, tmp_path / "copy.raw")
        assert served.stop() == (0, "")
    assert (tmp_path / "copy.raw").read_bytes() == upstream.content


def test_writes_are_passed_on_if_that_is_asked_for(upstream: Upstream, tmp_path: Path) -> None:
    options = ("--listen", f"unix:{tmp_path}/down.sock", "--write")
    with upstream.served(), serving(upstream.uri, *options, verb="proxy") as served:
        uri = str(served.uris[0])
        about = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
        assert not about["is_read_only"]
        assert about["can_flush"]
        assert about["can_zero"]
        run("qemu-io", "-f", "raw", "-c", "write -P 9 3M 100k", "-c", "flush", uri)
        assert served.stop() == (0, "")
    assert upstream.content[3 * MIB : 3 * MIB + 102_400] == b"\x09" * 102_400


def test_what_a_client_reads_is_kept(upstream: Upstream, tmp_path: Path) -> None:
    tees = [word for each in repositories(tmp_path) for word in ("--tee", each)]
    options = (*tees, "--listen", f"unix:{tmp_path}/down.sock", "--once", "--json")
    upstream.start_bitmap()
    with (
        upstream.served("-r", "-B", "b0"),
        serving(upstream.uri, *options, verb="proxy") as served,
    ):
        run("nbdcopy", str(served.uris[0]), tmp_path / "copy.raw")
        rows = report(served)
    content = upstream.content
    assert (tmp_path / "copy.raw").read_bytes() == content
    assert [row["mode"] for row in rows] == ["full", "full"]
    assert [restored(each, tmp_path) == content for each in tees[1::2]] == [True, True]

    upstream.change()
    since = ("--changed", "qemu:dirty-bitmap:b0", "--since", rows[0]["point"])
    one = (*tees[:2], *options[len(tees) :], *since)
    with upstream.served("-r", "-B", "b0"), serving(upstream.uri, *one, verb="proxy") as served:
        run("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 1M 4k", str(served.uris[0]))
        (row,) = report(served)
    assert row["mode"] == "incremental"
    assert row["read_bytes"] == 65536
    assert restored(tees[1], tmp_path) == upstream.content


def test_a_proxy_that_is_stopped_before_it_serves(tmp_path: Path) -> None:
    """Its upstream takes its time; the socket it was to listen on does not stay."""
    up, down = tmp_path / "mute.sock", tmp_path / "down.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(up))
        mute.listen()
        words = [*COMMAND, "proxy", f"nbd+unix:///?socket={up}", "--listen", f"unix:{down}"]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process:
            connection, _ = mute.accept()
            with connection:
                assert down.exists()
                for number in (signal.SIGHUP, signal.SIGTERM):
                    process.send_signal(number)
                out, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, said) == (0, "", "")
    assert not down.exists()


def test_what_nobody_reads_is_read_at_the_end(upstream: Upstream, tmp_path: Path) -> None:
    tees = [word for each in repositories(tmp_path) for word in ("--tee", each)]
    options = (*tees, "--listen", f"unix:{tmp_path}/down.sock", "--json", "--group", "vda")
    with upstream.served("-r"), serving(upstream.uri, *options, verb="proxy") as served:
        served.process.send_signal(signal.SIGTERM)
        rows = report(served)
    assert [row["group"] for row in rows] == ["vda", "vda"]
    assert {row["reread_bytes"] for row in rows} == {0}
    assert [restored(each, tmp_path) == upstream.content for each in tees[1::2]] == [True, True]


def test_a_repository_that_dies_is_no_client_s_concern(upstream: Upstream, tmp_path: Path) -> None:
    first, second = repositories(tmp_path)
    options = ("--tee", first, "--tee", second, "--listen", f"unix:{tmp_path}/down.sock", "--json")
    with upstream.served("-r"), serving(upstream.uri, *options, verb="proxy") as served:
        shutil.rmtree(tmp_path / "one")
        (tmp_path / "one").write_text("in the way")
        run("nbdcopy", str(served.uris[0]), tmp_path / "copy.raw")
        served.process.send_signal(signal.SIGTERM)
        out, err = served.process.communicate(timeout=20)
    assert served.process.returncode == 3
    assert err.count("\n") == 1
    assert err.startswith("nbdsrv: ")
    rows = json.loads(out)
    assert [row["repository"] for row in rows] == [second, first]
    assert "error" in rows[1]
    assert (tmp_path / "copy.raw").read_bytes() == upstream.content
    assert restored(second, tmp_path) == upstream.content


def test_bad_use(tmp_path: Path) -> None:
    gone = f"nbd+unix:///?socket={tmp_path}/gone.sock"
    where = ("--listen", f"unix:{tmp_path}/down.sock")
    assert "nothing to pass on" in refusal(2, "proxy", *where)
    assert "gone.sock" in refusal(1, "proxy", gone, *where)
    (repository, _) = repositories(tmp_path)
    assert "gone.sock" in refusal(1, "proxy", gone, *where, "--tee", repository)
    assert "must not change" in refusal(2, "proxy", gone, "--write", "--tee", repository)
    assert "go with --tee" in refusal(2, "proxy", gone, "--group", "vm")
    assert "stdio" in refusal(2, "proxy", gone, "--listen", "stdio")
    assert "two exports" in refusal(2, "proxy", "nbd://one/a", "nbd://two/a")
    assert "NAME=SOURCE" in refusal(2, "proxy", "--export", "nbd://one")
    assert "takes a repository" in refusal(2, "proxy", gone, "--tee", str(tmp_path))
    assert not list((tmp_path / "one").glob("leases/*"))
