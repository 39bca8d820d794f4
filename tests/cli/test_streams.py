"""Standard streams that are full, closed, or have no reader: a line, and a true exit code."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.program import COMMAND, PATIENCE, environment, nbdsrv

FULL = "nbdsrv: writing standard output: No space left on device\n"


def _run(
    words: str, *arguments: str | Path, unbuffered: bool = False
) -> "subprocess.CompletedProcess[str]":
    """The program under a shell that redirects its streams as ``words`` say."""
    env = environment({"PYTHONUNBUFFERED": "1" if unbuffered else ""})
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {words}', "bash", *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=env,
    )


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [(), ("--help",), ("--version",), ("info", "d"), ("map", "--json", "d"), ("serve", "d")],
    ids=" ".join,
)
def test_output_that_takes_nothing(
    arguments: tuple[str, ...], unbuffered: bool, disk: Path
) -> None:
    given = [disk if word == "d" else word for word in arguments]
    if "serve" in arguments:
        given += ["--listen", f"unix:{disk}.sock"]
    done = _run(">/dev/full", *given, unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (1, FULL)


def test_a_backup_that_cannot_tell_what_it_did(disk: Path, tmp_path: Path) -> None:
    repository = f"repo:{tmp_path / 'repository'}"
    assert nbdsrv("init", repository).returncode == 0
    done = _run(">/dev/full", "backup", "--json", disk, "--to", repository)
    assert (done.returncode, done.stderr) == (1, FULL)


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    for unbuffered in (False, True):
        done = _run("2>/dev/full", "info", tmp_path / "nothing.img", unbuffered=unbuffered)
        assert done.returncode == 1


def test_a_reader_who_has_left(disk: Path) -> None:
    for unbuffered in (False, True):
        done = _run("| true", "map", disk, unbuffered=unbuffered)
        assert done.returncode in {0, 1}
        assert done.stderr == ""


@pytest.mark.parametrize("words", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(words: str, disk: Path) -> None:
    assert _run(words, "info", disk).returncode == 0
    assert _run(words, "info", f"{disk}.not").returncode == 1


def test_an_image_copied_to_no_output(disk: Path) -> None:
    done = _run(">&-", "copy", disk, "-")
    assert done.returncode == 1
    assert done.stderr == "nbdsrv: writing standard output: Bad file descriptor\n"


def test_no_image_is_opened_as_a_standard_stream(disk: Path) -> None:
    """Last words on standard error would be written into it."""
    words = [*COMMAND, "serve", "--write", str(disk), "--listen", f"unix:{disk}.sock"]
    with subprocess.Popen(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *words, "--admin-socket", f"{disk}.admin"],
        env=environment(),
    ) as process:
        try:
            for _ in range(PATIENCE * 10):
                if Path(f"{disk}.admin").exists():
                    break
                assert process.poll() is None
                subprocess.run(["sleep", "0.1"], check=True)
            streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        finally:
            process.terminate()
    assert streams == ["/dev/null"] * 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_is_printed_whole_into_a_pipe_that_does_not_block(
    tmp_path: Path, unbuffered: str
) -> None:
    path = tmp_path / "fragmented.img"
    with open(path, "wb") as file:
        for place in range(0, 2000 * 8192, 8192):
            os.pwrite(file.fileno(), b"x", place)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)  # the kernel takes what there is room for
    with subprocess.Popen(
        [*COMMAND, "map", "--json", str(path)],
        stdout=writes,
        env=environment({"PYTHONUNBUFFERED": unbuffered}),
    ) as process:
        os.close(writes)
        with open(reads, "rb") as pipe:
            time.sleep(0.5)
            text = pipe.read()
        assert process.wait(PATIENCE) == 0
    assert len(text) > 1 << 16
    assert sum(extent["length"] for extent in json.loads(text)) == path.stat().st_size
