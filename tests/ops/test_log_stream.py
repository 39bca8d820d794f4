"""Log lines into descriptors that take them, do not for a while, or never."""

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsrv.ops.log_stream import MAX_KEPT, LogStream

LINE = "x" * 99


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of 4 KiB."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    os.close(ends[1])


def logger(fd: int) -> logging.Logger:
    log = logging.getLogger("tests.log_stream")
    log.propagate = False
    log.handlers[:] = [LogStream(fd)]
    return log


def lines(fd: int, until: str) -> list[str]:
    """What there is to read up to a line."""
    with open(fd, encoding="utf-8") as file:
        found = [file.readline().rstrip("\n")]
        while found[-1] != until:
            found.append(file.readline().rstrip("\n"))
    return found


def test_a_reader_that_is_late_gets_all(pipe: tuple[int, int]) -> None:
    log = logger(pipe[1])
    said = [f"{number} {LINE}" for number in range(2000)]
    for each in said:
        log.error(each)
    assert lines(pipe[0], said[-1]) == said


def test_what_nobody_reads_is_counted_and_the_count_told(pipe: tuple[int, int]) -> None:
    log = logger(pipe[1])
    count = 3 * MAX_KEPT // len(LINE)
    for number in range(count):
        log.error("%d %s", number, LINE)
    with open(pipe[0], encoding="utf-8") as file:
        found: list[str] = []
        while not found or not found[-1].startswith("log.lost"):
            found.append(file.readline())
        log.error("more")
        assert file.readline() == "more\n"
    kept = len(found) - 1
    assert found[:kept] == [f"{number} {LINE}\n" for number in range(kept)]
    assert found[kept] == f"log.lost lines={count - kept} reason=nobody took them\n"


def test_a_long_line_stays_one(pipe: tuple[int, int]) -> None:
    log = logger(pipe[1])
    log.error("y" * 100_000)
    log.error("end")
    assert lines(pipe[0], "end") == ["y" * 100_000, "end"]


def test_at_the_end_a_reader_is_waited_for_and_not_for_long(pipe: tuple[int, int]) -> None:
    handler = LogStream(pipe[1])
    for _ in range(100):
        handler.handle(logging.makeLogRecord({"msg": LINE}))
    began = time.monotonic()
    handler.flush()
    assert time.monotonic() - began >= 1
    os.close(pipe[0])


def test_a_reader_that_has_left_and_a_full_disk() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for fd in (writer, full):
        log = logger(fd)
        log.error("one")
        log.error("two")
        os.close(fd)
        log.error("three")


def test_a_file_has_all_of_it(tmp_path: Path) -> None:
    script = (
        "import logging; from nbdsrv.ops.logs import set_up; set_up(0)\n"
        "for number in range(5000): logging.error('%d', number)"
    )
    path = tmp_path / "log"
    with path.open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stderr=file, check=True, timeout=30)
    assert path.read_text() == "".join(f"nbdsrv: {number}\n" for number in range(5000))
