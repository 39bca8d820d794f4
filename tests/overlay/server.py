"""``nbdsrv`` as its users run it, for the tests of this folder."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["nbdsrv", "nbdsrv_json", "running_server", "start_server", "until", "uri"]

PATIENCE_S = 60


def nbdsrv(*arguments: str, code: int = 0) -> str:
    """Run a command; its standard output, or its error where it is to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "nbdsrv", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: {done.returncode} {done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout if not code else done.stderr


def nbdsrv_json(*arguments: str) -> Any:
    """The same, as JSON."""
    return json.loads(nbdsrv(*arguments, "--json"))


def start_server(socket: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A server that accepts connections."""
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdsrv", "serve", *arguments, "--listen", f"unix:{socket}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("nbd+unix://")
    return process


@contextmanager
def running_server(socket: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A server until the end of the block, where it must exit with 0."""
    process = start_server(socket, *arguments)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.communicate()


def uri(socket: Path, export: str = "") -> str:
    """Of an export of that server."""
    return f"nbd+unix:///{quote(export)}?socket={quote(os.fspath(socket))}"


async def until(condition: Any) -> None:
    """Wait, not for long, until ``condition()`` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)
