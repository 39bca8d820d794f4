"""Programs started with a deadline, in a group of their own.

Rule: nothing started here outlives its caller. A program that misses its deadline is killed
together with its children, and that is a failed check with what it had printed so far.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.outcome import CheckFailedError, MissingPeerError

__all__ = ["PROJECT", "Finished", "find_program", "kill_group", "run", "tail"]

PROJECT = Path(__file__).resolve().parent.parent
"""The checkout: what must be on PYTHONPATH for ``python -m nbdsrv`` to be this one."""

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended by itself."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    def describe(self) -> str:
        """The command, its exit code and the end of what it said, on one line."""
        said = tail(self.stderr or self.stdout)
        return f"`{' '.join(self.arguments)}` exited {self.code}: {said}"


def find_program(name: str) -> str:
    """The path of an executable; sbin directories count even for ordinary users.

    Raises:
        MissingPeerError: it is not installed.
    """
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    if found is None:
        raise MissingPeerError(f"{name} is not installed")
    return found


def run(
    arguments: Sequence[str | Path],
    *,
    directory: Path,
    timeout_s: float = 30,
    code: int | None = 0,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run one program to its end.

    Args:
        arguments: the program, found as :func:`find_program` does, and its arguments.
        directory: its working directory.
        timeout_s: seconds until it is killed and the check fails.
        code: the exit code demanded, or None to leave that to the caller.
        environment: variables added to ours.

    Raises:
        MissingPeerError: the program is not installed.
        CheckFailedError: it missed its deadline or ended with another code.
    """
    words = [find_program(str(arguments[0])), *map(str, arguments[1:])]
    process = subprocess.Popen(
        words,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        out, err = process.communicate()
        said = tail((err or out).decode(errors="replace"))
        raise CheckFailedError(f"`{' '.join(words)}` hung for {timeout_s:g} s: {said}") from None
    except BaseException:
        kill_group(process)
        raise
    finished = Finished(
        tuple(words), process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )
    if code is not None and finished.code != code:
        raise CheckFailedError(finished.describe())
    return finished


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process started in its own session, with its children, and reap it.

    One that was reaped already is left alone: its number may be somebody else's by now.
    """
    if process.returncode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=10)


def tail(text: str, lines: int = 4, limit: int = 600) -> str:
    """The last lines of an output joined into one, or "(silent)"."""
    kept = [line.strip() for line in text.strip().splitlines()[-lines:]]
    return (" | ".join(kept) or "(silent)")[-limit:]
