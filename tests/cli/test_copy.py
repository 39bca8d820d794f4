"""``nbdsrv copy``: images, pipes, devices and NBD exports, as a user makes them."""

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import COMMAND, PATIENCE, environment, hidden_from, nbdsrv, refusal, serving
from tests.formats.images import Image
from tests.formats.partition.tables import run, with_table
from tests.formats.places import loop_device
from tests.formats.written import qemu_img, qemu_size, same_as
from tests.source.peers import listening, unix_uri

MIB = 1 << 20
SOURCE = Image("source", 12 * MIB + 5, ((0, 100_000), (5 * MIB + 1000, MIB), (12 * MIB, 5)))
QEMU = {"raw": "raw", "qcow2": "qcow2", "vhd": "vpc", "vmdk": "vmdk"}
FORMATS = pytest.mark.parametrize("kind", QEMU)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A raw image of an odd size, holes and allocated zeroes in it."""
    path = tmp_path / "source.img"
    SOURCE.make(str(path))
    with open(path, "r+b") as file:
        file.seek(9 * MIB)
        file.write(bytes(MIB))
    return path


def golden() -> bytes:
    return SOURCE.golden()


def done(*arguments: str | Path) -> str:
    """It has worked; what it printed."""
    outcome = nbdsrv("copy", *arguments)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return outcome.stdout


@FORMATS
def test_a_new_image(tmp_path: Path, source: Path, kind: str) -> None:
    target = tmp_path / f"disk.{kind}"
    said: dict[str, Any] = json.loads(done(source, target, "--json"))
    assert said.pop("duration_s") >= 0
    written = said.pop("written_bytes")
    assert 0 < written < 12 * MIB
    assert said.pop("data_bytes") + said.pop("zero_bytes") >= SOURCE.size
    assert said == {
        "source": str(source),
        "target": str(target),
        "format": kind,
        "size": SOURCE.size,
    }
    same_as(golden(), target, QEMU[kind])
    assert qemu_size(target, QEMU[kind]) == SOURCE.size + -SOURCE.size % 512
    assert sorted(os.listdir(tmp_path)) == sorted(["source.img", target.name])


@FORMATS
def test_into_a_pipe(tmp_path: Path, source: Path, kind: str) -> None:
    command = [*COMMAND, "copy", str(source), f"{kind}:-", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert json.loads(err)["size"] == SOURCE.size
    target = tmp_path / "disk"
    target.write_bytes(out)
    same_as(golden(), target, QEMU[kind])


@pytest.mark.parametrize("method", ["zlib", "zstd", "zlib:9", "zstd:1", "none"])
def test_compressed_qcow2(tmp_path: Path, source: Path, method: str) -> None:
    target = tmp_path / "disk.qcow2"
    done(source, target, "--compress", method, "--quiet")
    qemu_img("check", target)
    same_as(golden(), target, "qcow2")


def test_only_what_differs_from_a_backing_file(tmp_path: Path, source: Path) -> None:
    os.mkdir(tmp_path / "below")
    base = tmp_path / "below" / "base.qcow2"
    done(source, base)
    content = bytearray(golden())
    content[:10] = b"difference"
    content[5 * MIB : 6 * MIB] = bytes(MIB)
    (tmp_path / "new.img").write_bytes(content)
    target = tmp_path / "top.qcow2"
    done(tmp_path / "new.img", target, "--backing", base)
    qemu_img("check", target)
    same_as(content, target, "qcow2")
    assert target.stat().st_size < MIB
    moved = tmp_path / "moved"
    os.mkdir(moved)
    os.rename(target, moved / "top.qcow2")
    os.rename(tmp_path / "below", moved / "below")
    facts = json.loads(qemu_img("info", "--output=json", moved / "top.qcow2"))
    assert facts["backing-filename-format"] == "qcow2"


def test_a_relative_backing_file_is_named_from_the_image(tmp_path: Path, source: Path) -> None:
    os.mkdir(tmp_path / "tops")
    command = [*COMMAND, "copy", "source.img", "tops/top.qcow2", "--backing", "source.img"]
    python_path = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    subprocess.run(
        command,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=PATIENCE,
        env=environment({"PYTHONPATH": python_path}),
    )
    facts = json.loads(qemu_img("info", "--output=json", tmp_path / "tops" / "top.qcow2"))
    assert facts["backing-filename"] == "../source.img"
    same_as(golden(), tmp_path / "tops" / "top.qcow2", "qcow2")


def test_a_backing_file_that_a_guest_has_written_to(tmp_path: Path, source: Path) -> None:
    """It has made itself an image with a parent of its choice: said to be raw, that is content."""
    base = tmp_path / "base.img"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/hostname", base, str(MIB))
    os.truncate(base, source.stat().st_size)
    target = tmp_path / "top.qcow2"
    done(source, target, "--backing", f"raw:{base}")
    facts = json.loads(qemu_img("info", "--output=json", target))
    assert facts["backing-filename-format"] == "raw"
    assert facts["backing-filename"] == str(base)
    same_as(golden(), target, "qcow2")


def test_a_backing_file_whose_name_is_easily_taken_for_another(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    monkeypatch.chdir(tmp_path)
    os.rename(source, "vm:1.img")
    done("./vm:1.img", "top.qcow2", "--backing", "vm:1.img")  # not a protocol called vm
    same_as(golden(), tmp_path / "top.qcow2", "qcow2")
    os.makedirs("elsewhere/deep")
    os.symlink("elsewhere/deep", "link")
    os.rename("vm:1.img", "elsewhere/base.img")
    done("elsewhere/base.img", "other.qcow2", "--backing", "link/../base.img")  # not base.img
    same_as(golden(), tmp_path / "other.qcow2", "qcow2")


@pytest.mark.parametrize("kind", ["qcow2", "vhd", "vmdk"])
def test_back_to_raw_it_is_sparse_again(tmp_path: Path, source: Path, kind: str) -> None:
    image, back = tmp_path / f"disk.{kind}", tmp_path / "back.img"
    done(source, image)
    done(image, f"raw:{back}")
    assert back.read_bytes()[: SOURCE.size] == golden()
    assert back.stat().st_blocks * 512 < 2 * MIB


def test_onto_a_block_device(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"\xaa" * (13 * MIB))
    with loop_device(str(path)) as device:
        done(source, device)
    content = path.read_bytes()
    assert content[: SOURCE.size] == golden()
    assert content[SOURCE.size :] == b"\xaa" * (13 * MIB - SOURCE.size)


def test_onto_an_nbd_export_and_back(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "export.img"
    path.write_bytes(b"\xaa" * (13 * MIB))
    listen = f"unix:{tmp_path}/socket"
    with serving("--write", path, "--listen", listen) as served:
        uri = str(served.uris[0])
        said = json.loads(done(source, uri, "--json", "--connections", "2"))
        assert said["written_bytes"] < 2 * MIB
        content = path.read_bytes()
        assert content[: SOURCE.size] == golden()
        assert content[SOURCE.size :] == b"\xaa" * (13 * MIB - SOURCE.size)
        done(uri, tmp_path / "back.qcow2")
        same_as(content, tmp_path / "back.qcow2", "qcow2")
        assert "is SOURCE itself" in refusal(2, "copy", uri, uri)


def test_a_target_that_is_too_small_is_left_alone(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "small.img"
    path.write_bytes(b"\xaa" * MIB)
    with serving("--write", path, "--listen", f"unix:{tmp_path}/socket") as served:
        said = refusal(1, "copy", source, str(served.uris[0]))
    assert f"{MIB} bytes, fewer than the source's {SOURCE.size}" in said
    assert path.read_bytes() == b"\xaa" * MIB


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "disk.img"
    target.write_bytes(b"precious")
    assert "--force" in refusal(1, "copy", source, target)
    assert target.read_bytes() == b"precious"
    done(source, target, "--force")
    assert target.read_bytes() == golden()


def test_a_directory_that_one_may_not_list(tmp_path: Path, source: Path) -> None:
    prefix = hidden_from()
    drop = tmp_path / "drop"
    drop.mkdir(mode=0o300)
    outcome = nbdsrv("copy", source, drop / "disk.img", prefix=prefix)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert (drop / "disk.img").read_bytes() == golden()


def test_the_source_is_never_its_own_target(tmp_path: Path, source: Path) -> None:
    os.link(source, tmp_path / "same.img")
    os.symlink(source, tmp_path / "link.img")
    for target in (source, tmp_path / "same.img", tmp_path / "link.img"):
        assert "SOURCE is read from it" in refusal(2, "copy", source, target, "--force")
    assert source.read_bytes() == golden()


def test_nor_by_way_of_a_loop_device(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * MIB)
    with loop_device(str(path)) as device:
        for source, target in (device, path), (path, device):
            assert "SOURCE is read from it" in refusal(2, "copy", source, target, "--force")
        other = tmp_path / "other.img"
        done(device, other)
        done(other, device)
    assert path.read_bytes() == b"\xaa" * MIB


def test_nor_by_way_of_a_partition(tmp_path: Path) -> None:
    path = with_table(tmp_path / "disk.img", "label: dos\n1M,1M\n2M,1M\n", 4 * MIB)
    with loop_device(str(path)) as device:
        run("partx", "--add", device)
        try:
            first, second = f"{device}p1", f"{device}p2"
            assert "SOURCE is read from it" in refusal(2, "copy", first, device)
            done(first, second)
            done(f"{device}~p1", second)
        finally:
            run("partx", "--delete", device)


def test_a_target_that_is_no_disk_is_named_as_such(source: Path) -> None:
    assert "not a regular file" in refusal(1, "copy", source, "/dev/null", "--force")


def test_nor_is_an_image_below_the_source(tmp_path: Path, source: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", source, "-F", "raw", top)
    assert "SOURCE is read from it" in refusal(2, "copy", top, source, "--force")
    assert source.read_bytes() == golden()


def test_bad_use(tmp_path: Path, source: Path) -> None:
    assert "vdi images are not written" in refusal(2, "copy", source, f"vdi:{tmp_path}/x")
    assert "contradicts" in refusal(2, "copy", source, f"raw:{tmp_path}/x", "--to", "vhd")
    assert "not compressed" in refusal(2, "copy", source, tmp_path / "x.img", "--compress", "zstd")
    missing = tmp_path / "missing.img"
    assert str(missing) in refusal(1, "copy", missing, tmp_path / "x.img")
    assert "No such file" in refusal(1, "copy", source, tmp_path / "no" / "x.img")
    assert os.listdir(tmp_path) == ["source.img"]


def test_a_bad_sector_is_named_and_no_image_is_left(tmp_path: Path, source: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", source, image)
    with open(image, "r+b") as file:
        file.truncate(8 * 65536)  # the tables stay, some data is gone
    said = refusal(1, "copy", image, tmp_path / "x.img")
    assert str(image) in said
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "source.img"]


# --- interrupted ---------------------------------------------------------------------------------


@contextmanager
def nbdkit(directory: Path, *arguments: str) -> Iterator[str]:
    """The URI of an NBD source that is all data, 64 MiB of it, behind some filter."""
    socket = directory / "socket"
    command = ["nbdkit", "-f", "-U", str(socket), "pattern", "64M", *arguments]
    try:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        assert os.environ.get("CI") != "true", "CI is expected to have nbdkit"
        pytest.skip("nbdkit is not installed")
    with process:
        try:
            until(socket.exists)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            process.kill()


def test_an_io_error_is_named_and_no_image_is_left(tmp_path: Path) -> None:
    broken = ("--filter=error", "error-pread=EIO", "error-pread-rate=100%")
    with nbdkit(tmp_path, *broken) as uri:
        said = refusal(1, "copy", uri, tmp_path / "disk.img")
    # Several reads fail together; it is told of one of them.
    assert re.search(r"Input/output error.*, at byte \d+ of the disk$", said)
    assert "disk.img" not in os.listdir(tmp_path)


def until(holds: Any) -> None:
    """Wait for what another program does; fails when it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    directory = tmp_path / "targets"
    directory.mkdir()
    target = directory / "disk.img"
    with (
        nbdkit(tmp_path, "--filter=delay", "delay-read=60") as uri,
        subprocess.Popen(
            [*COMMAND, "copy", uri, str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process,
    ):
        until(lambda: os.listdir(directory))
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"nbdsrv: stopped by {number.name}: {target} was not made\n"
    assert os.listdir(directory) == []


def test_a_reader_that_leaves_is_told_of_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * (8 * MIB))
    with subprocess.Popen(
        [*COMMAND, "copy", str(path), "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == b"x" * 10
        process.stdout.close()
        assert process.stderr.read() == b"nbdsrv: writing standard output: Broken pipe\n"
        assert process.wait(PATIENCE) == 1


def on_a_terminal(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and what a terminal as standard error shows."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, "copy", *(str(argument) for argument in arguments)]
    extra = {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment(extra)
    ) as process:
        os.close(theirs)
        shown = bytearray()
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # how a terminal says that its other end is closed
            pass
        os.close(ours)
        return process.wait(PATIENCE), shown.decode()


def test_a_terminal_sees_progress_unless_it_is_to_be_quiet(tmp_path: Path, source: Path) -> None:
    code, shown = on_a_terminal(source, tmp_path / "a.qcow2")
    assert code == 0
    assert "a.qcow2" in shown
    assert "100%" in shown
    assert on_a_terminal(source, tmp_path / "b.qcow2", "--quiet") == (0, "")


def test_a_terminal_sees_how_far_a_large_export_has_been_looked_at(tmp_path: Path) -> None:
    with listening(tmp_path / "sock", "nbdkit", "null", "32T"):
        code, shown = on_a_terminal(unix_uri(tmp_path / "sock"), "null:")
    assert code == 0
    assert "looking for data" in shown
