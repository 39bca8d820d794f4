"""File systems of one test's own, in a mount namespace that ends with it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

__all__ = ["run_on_small_disk"]

ROOT = Path(__file__).parents[2]


def run_on_small_disk(directory: Path, code: str, size: int = 1 << 20) -> None:
    """Run ``code`` in a process that sees a fresh tmpfs at ``directory``, called ``disk`` there.

    Skips where that is not allowed, but never in continuous integration.
    """
    script = textwrap.dedent(code)
    command = f'mount -t tmpfs -o size={size} tmpfs "$1" && exec "$2" -c "$3" "$1"'
    run = ["sh", "-c", command, "sh", str(directory), sys.executable, _PRELUDE + script]
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", *user, "--mount", *run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "Traceback" not in done.stderr and done.returncode:
        if os.environ.get("CI") != "true":
            pytest.skip(f"no mounts here: {done.stderr.strip()}")
        pytest.fail(done.stderr)
    assert done.returncode == 0, done.stderr


_PRELUDE = """
import errno, os, subprocess, sys
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.store import ObjectMissing, StoreError
disk = sys.argv[1]
"""
