"""Running a command of ours and killing it on the way, by the clock or at a chosen system call.

::

    strace, inject: signal=KILL:when=n ── command ──✂     the n-th of some calls is never made
                     kill -9, seconds  ── command ──✂
"""

import os
import random
import signal
import subprocess
from collections.abc import Mapping, Sequence

from conformance.outcome import CheckFailedError
from conformance.process import find_program, kill_group, tail

__all__ = ["fatal_call", "run_killed"]


def fatal_call(source: random.Random, choices: Sequence[tuple[str, int]]) -> list[str]:
    """What a command is started by, so that a thread of it is killed entering such a call.

    Args:
        source: chooses.
        choices: strace's names of calls, and how many of them there may be.
    """
    calls, most = source.choice(choices)
    injected = ("-e", f"inject={calls}:signal=KILL:when={source.randint(1, most)}")
    quiet = ("-f", "-qq", "--seccomp-bpf", "-o", "/dev/null")
    return [find_program("strace"), *quiet, "-e", f"trace={calls}", *injected, "--"]


def run_killed(
    what: str,
    words: Sequence[str],
    variables: Mapping[str, str],
    *,
    hang_s: float,
    kill_s: float | None = None,
) -> bool:
    """Run a command; was it killed? False if it ended well before that.

    Args:
        what: for messages.
        words: the command, maybe behind a ``fatal_call``.
        variables: added to our environment.
        hang_s: seconds after which it hangs.
        kill_s: seconds after which it is killed, or None.

    Raises:
        CheckFailedError: it failed, or hung.
    """
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **variables},
        start_new_session=True,
    )
    said = b""
    with process:
        try:
            _, said = process.communicate(timeout=hang_s if kill_s is None else kill_s)
        except subprocess.TimeoutExpired:
            kill_group(process)
            if kill_s is None:
                raise CheckFailedError(f"{what} hung for {hang_s:g} s") from None
    if process.returncode == -signal.SIGKILL:  # strace ends as what it has traced
        return True
    if process.returncode != 0:
        text = tail(said.decode(errors="replace"))
        raise CheckFailedError(f"{what} exited {process.returncode}: {text}")
    return False
