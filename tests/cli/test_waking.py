"""A signal whose handler the main thread does not come to by itself."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest

from tests.cli.program import PATIENCE

WAITS = {
    "a lock": "threading.Event().wait()",
    "a store": "answered('s3', threading.Event().wait)",
    "threads": "list(ThreadPoolExecutor().map(lambda _: time.sleep(3600), 'ab'))",
    "a file": "os.read(os.pipe()[0], 1)",
}


def run(*lines: str) -> "subprocess.CompletedProcess[str]":
    """A program whose ``give()`` has another thread take the signal of that name.

    The main thread is not interrupted by that: for it, it came a moment before it went to sleep.
    """
    program = """
        import os, signal, threading, time
        from concurrent.futures import ThreadPoolExecutor
        from nbdsrv.cli.stopping import STOP, Stopped
        from nbdsrv.store.answers import answered

        def give(name):
            def take():
                time.sleep(0.2)
                signal.pthread_kill(threading.get_ident(), signal.Signals[name])
            threading.Thread(target=take, daemon=True).start()

        STOP.install()
        """
    whole = "\n".join([textwrap.dedent(program), *lines])
    command = [sys.executable, "-c", whole]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)


def wait_for(wait: str) -> Sequence[str]:
    return ["try:", f"    {wait}", "except Stopped as stopped:", "    print(stopped, flush=True)"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", WAITS)
def test_whatever_it_waits_for(wait: str, number: signal.Signals) -> None:
    ran = run(f"give('{number.name}')", *wait_for(WAITS[wait]), "os._exit(0)")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"stopped by {number.name}\n", "")


def test_also_after_a_loop_has_run() -> None:
    loop = "import asyncio, uvloop; uvloop.run(asyncio.sleep(0))"
    ran = run(loop, "give('SIGTERM')", *wait_for(WAITS["a lock"]))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "stopped by SIGTERM\n", "")


def test_a_second_one_still_ends_it_all() -> None:
    """The wake-up itself is none."""
    lines = [*wait_for(WAITS["a lock"]), "give('SIGINT')", "time.sleep(0.6)", "print('awake')"]
    ran = run("give('SIGTERM')", *lines)
    assert (ran.returncode, ran.stdout) == (128 + signal.SIGINT, "stopped by SIGTERM\n")
