"""WATCHDOG_USEC: told twice within that time, by this process only, until it is closed."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest

from nbdsrv.ops.watchdog import Watchdog, interval


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "9" * 99}, None),
    ],
)
def test_interval(environ: dict[str, str], seconds: float | None) -> None:
    assert interval(environ) == seconds


async def test_the_loop_is_what_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        loop = asyncio.get_running_loop()
        watchdog = Watchdog({"WATCHDOG_USEC": "20000"})
        async with asyncio.timeout(10):
            told = [await loop.sock_recv(manager, 100) for _ in range(4)]
        assert told == [b"WATCHDOG=1"] * 4
        watchdog.close()
        await asyncio.sleep(0.1)
        with contextlib.suppress(BlockingIOError):
            manager.recv(100)  # one may have been on its way
        with pytest.raises(BlockingIOError):
            manager.recv(100)
