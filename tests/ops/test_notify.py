"""sd_notify(3): datagrams to whoever NOTIFY_SOCKET names."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdsrv.ops.notify import notify


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_a_socket_in_the_file_system(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    notify("READY=1\nSTATUS=serving")
    assert manager.recv(100) == b"READY=1\nSTATUS=serving"


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"nbdsrv-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify("STOPPING=1")
        assert sock.recv(100) == b"STOPPING=1"


def test_one_who_does_not_read_is_not_waited_for(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"x", manager.getsockname())
    notify("WATCHDOG=1")
    assert manager.recv(100) == b"x"
    notify("WATCHDOG=1")


@pytest.mark.parametrize("name", [None, "", "/nowhere/at/all", "x" * 200, "vsock:2:1"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    if name is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    before = os.listdir("/proc/self/fd")
    notify("READY=1")
    assert os.listdir("/proc/self/fd") == before
