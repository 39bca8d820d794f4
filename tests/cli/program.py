"""The program itself, as a user runs it: ``python -m nbdsrv ...`` in a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from protocol.uri import Uri, parse

__all__ = ["COMMAND", "Served", "environment", "hidden_from", "nbdsrv", "refusal", "serving"]

COMMAND = (sys.executable, "-m", "nbdsrv")
PATIENCE = 20
"""Seconds until a program that should have said or done something is given up."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without what would change the program's ways."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NBDSRV_", "LISTEN_", "NOTIFY_"))
    }
    return kept | dict(extra or {})


def nbdsrv(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run to the end."""
    return subprocess.run(
        [*prefix, *COMMAND, *(str(argument) for argument in arguments)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="surrogateescape",
        timeout=PATIENCE,
        check=False,
        env=environment(env),
    )


def refusal(
    code: int,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> str:
    """The one line a bad use is answered with; exit code ``code``, nothing on stdout."""
    process = subprocess.Popen(
        [*prefix, *COMMAND, *(str(argument) for argument in arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        env=environment(env),
    )
    giving_up = threading.Timer(PATIENCE, process.kill)
    giving_up.start()
    with process:
        assert process.stdout is not None
        first = process.stdout.readline()
        if first:
            process.kill()  # it serves instead of refusing
        _, said = process.communicate()
    giving_up.cancel()
    assert first == ""
    assert said.count("\n") == 1, said
    assert said.startswith("nbdsrv: ")
    assert said.endswith("\n")
    assert "Traceback" not in said
    assert process.returncode == code, said
    return said


def hidden_from() -> Sequence[str]:
    """A prefix with which file permissions count; root has none of its privileges over files."""
    if os.geteuid():
        return ()
    prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot drop root's privileges: {error}")
    return prefix


@dataclass
class Served:
    """A server that accepts connections."""

    process: "subprocess.Popen[str]"
    uris: list[Uri] = field(default_factory=list)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what else was printed, both streams."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out + err


@contextmanager
def serving(
    *arguments: str | Path,
    uris: int = 1,
    env: Mapping[str, str] | None = None,
    verb: str = "serve",
) -> Iterator[Served]:
    """``nbdsrv serve`` until the end of the block, once it has printed ``uris`` lines."""
    command = [*COMMAND, verb, *(str(argument) for argument in arguments)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        env=environment(env),
    ) as process:
        try:
            yield Served(process, [parse(line.strip()) for line in _lines(process, uris)])
        finally:
            process.kill()


def _lines(process: "subprocess.Popen[str]", count: int) -> list[str]:
    """The first lines of standard output; fails if they do not come."""
    assert process.stdout is not None
    stdout = process.stdout
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for _ in range(count):
            lines.put(stdout.readline())

    threading.Thread(target=read, daemon=True).start()
    try:
        found = [lines.get(timeout=PATIENCE) for _ in range(count)]
    except queue.Empty:
        process.kill()
        raise AssertionError("the server printed no URI") from None
    if not all(found):
        process.kill()
        assert process.stderr is not None
        raise AssertionError(f"the server ended: {process.stderr.read()}")
    return found
