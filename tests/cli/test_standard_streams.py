"""Standard input, output and error that are full or were never opened."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import COMMAND, PATIENCE, environment

CONTENT = bytes(range(256)) * 1024
BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def run(
    redirected: str, *arguments: str | Path, unbuffered: str = ""
) -> "subprocess.CompletedProcess[bytes]":
    """The program as a shell starts it with these redirections."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env=environment({"PYTHONUNBUFFERED": unbuffered}),
    )


@BUFFERING
@pytest.mark.parametrize("arguments", [("info",), ("map",), ("map", "--json")])
def test_output_that_is_full_is_told_of_in_one_line(
    disk: Path, arguments: tuple[str, ...], unbuffered: str
) -> None:
    ran = run(">/dev/full", *arguments, disk, unbuffered=unbuffered)
    assert ran.stderr == b"nbdsrv: writing standard output: No space left on device\n"
    assert ran.returncode == 1


@BUFFERING
def test_with_nothing_left_to_say_it_there_is_still_the_exit_code(
    disk: Path, unbuffered: str
) -> None:
    assert run(">/dev/full 2>/dev/full", "info", disk, unbuffered=unbuffered).returncode == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_done_without(tmp_path: Path, disk: Path, closed: str) -> None:
    copy = tmp_path / "copy.img"
    ran = run(closed, "copy", disk, copy)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert copy.read_bytes() == CONTENT
    assert run(closed, "info", tmp_path / "none.img").returncode == 1


def test_a_copy_to_an_output_that_is_closed_is_refused(disk: Path) -> None:
    ran = run(">&-", "copy", disk, "-")
    assert (ran.returncode, ran.stderr) == (2, b"nbdsrv: -: standard output is closed\n")


@BUFFERING
def test_output_is_printed_whole_or_its_loss_is_told_of(tmp_path: Path, unbuffered: str) -> None:
    path = tmp_path / "fragmented.img"
    with open(path, "wb") as file:
        for place in range(0, 2000 * 8192, 8192):
            os.pwrite(file.fileno(), b"x", place)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)  # the kernel takes a part of it
    try:
        ran = subprocess.run(
            [*COMMAND, "map", "--json", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=writes,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
            env=environment({"PYTHONUNBUFFERED": unbuffered}),
        )
    finally:
        os.close(reads)
        os.close(writes)
    assert ran.returncode == 1
    assert ran.stderr.startswith(b"nbdsrv: writing standard output: ")
    assert ran.stderr.count(b"\n") == 1
