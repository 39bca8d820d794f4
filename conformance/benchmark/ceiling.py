"""The fourth column: a C program that does the least a server can do.

It parses what it must, answers from the page cache, checks nothing and survives nothing. Its rate
is what the client program can take: a bar above *its* ratio measures the client, not the server,
and no server can meet it on that machine. It speaks plain text only and has one export.
"""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile

from conformance.benchmark.report import BenchmarkError

__all__ = ["compiler", "program"]

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ceiling.c")


def compiler() -> str | None:
    """The C compiler's path, None without one."""
    return shutil.which("cc") or shutil.which("gcc")


@functools.cache
def program() -> str:
    """The path of the compiled program; compiled once, gone when this process ends.

    Raises BenchmarkError when it cannot be compiled.
    """
    command = compiler()
    if command is None:
        raise BenchmarkError("no C compiler")
    directory = tempfile.mkdtemp(prefix="nbd-bench-ceiling-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    target = os.path.join(directory, "ceiling")
    made = subprocess.run(
        [command, "-O2", "-o", target, SOURCE, "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise BenchmarkError(f"{command}: {made.stderr.strip()[-300:]}")
    return target
