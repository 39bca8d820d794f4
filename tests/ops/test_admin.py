"""The admin socket: questions, bad questions, too many of them, and who may ask."""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdsrv.errors import ConfigError, DiskError, ListenError
from nbdsrv.ops import admin as admin_module
from nbdsrv.ops.admin import Admin, Question
from nbdsrv.ops.admin_client import AdminClient, find_socket


async def echo(question: Question) -> object:
    return {"id": question.id, "big": "x" * 300_000}


async def wrong(_question: Question) -> object:
    raise ConfigError("FILE:3: export.vm1: no")


async def failed(_question: Question) -> object:
    raise DiskError("cannot")


async def bug(_question: Question) -> object:
    raise ZeroDivisionError


HANDLERS = {"echo": echo, "wrong": wrong, "failed": failed, "bug": bug}


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[str]:
    admin = Admin(str(path), HANDLERS)
    await admin.open()
    try:
        yield str(path)
    finally:
        await admin.close()


def ask(path: str, *commands: str) -> list[object]:
    said: list[object] = []
    with AdminClient(path, 10) as client:
        for command in commands:
            try:
                said.append(client.ask(command, id=7))
            except (ConfigError, DiskError) as error:
                said.append((type(error), str(error)))
    return said


async def test_answers_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path / "admin") as path:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        found = await asyncio.to_thread(ask, path, "echo", "wrong", "failed", "bug", "no", "echo")
    answer = {"id": 7, "big": "x" * 300_000}
    assert found == [
        answer,
        (ConfigError, "FILE:3: export.vm1: no"),
        (DiskError, "cannot"),
        (DiskError, "ZeroDivisionError; see the server's log"),
        (DiskError, "no command 'no'; there are bug, echo, failed, wrong"),
        answer,
    ]
    assert not (tmp_path / "admin").exists()


@pytest.mark.parametrize(
    "sent",
    [b"\n", b"{}\n", b"[1]\n", b"\xff\n", b'{"command": 3}\n', b'{"command": "echo", "x": 1}\n'],
)
async def test_what_is_no_question_is_answered_too(tmp_path: Path, sent: bytes) -> None:
    async with opened(tmp_path / "admin") as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(sent + b'{"command": "failed"}\n')
        first, second = await reader.readline(), await reader.readline()
        writer.close()
    assert b'"ok":false' in first
    assert b"no request" in first
    assert b"cannot" in second


async def test_a_line_that_never_ends(tmp_path: Path) -> None:
    async with opened(tmp_path / "admin") as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x" * 200_000)
        assert b"64 KiB" in await reader.readline()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


async def test_another_user_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may, so what this process is compared with is somebody else, and it is not root."""
    from nbdsrv.export.access import Peer

    monkeypatch.setattr(admin_module, "peer_of", lambda _sock: Peer(uid=os.geteuid() + 1, pid=1))
    async with opened(tmp_path / "admin") as path:
        (said,) = await asyncio.to_thread(ask, path, "echo")
    assert "another user" in str(said) or "reset" in str(said) or "Broken pipe" in str(said)


async def test_too_many_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "admin") as path:
        async with asyncio.timeout(10):
            pairs = [await asyncio.open_unix_connection(path) for _ in range(40)]
            ends = [asyncio.create_task(reader.read()) for reader, _ in pairs]
            done, waiting = await asyncio.wait(ends, timeout=2, return_when=asyncio.ALL_COMPLETED)
        assert (len(done), len(waiting)) == (8, 32)
        for _, writer in pairs:
            writer.close()
        await asyncio.gather(*ends, return_exceptions=True)


async def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    async with opened(path), asyncio.timeout(10):
        with pytest.raises(ListenError, match="another server is listening there"):
            await Admin(str(path), HANDLERS).open()


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"[]\n", b'{"ok": 1\n'])
async def test_somebody_elses_socket(tmp_path: Path, answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(talk, str(tmp_path / "other"))
    async with server:
        (said,) = await asyncio.to_thread(ask, str(tmp_path / "other"), "status")
    assert isinstance(said, tuple)
    assert said[0] is DiskError


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file"):
        AdminClient(str(tmp_path / "none"))


def test_where_the_socket_is_looked_for(tmp_path: Path) -> None:
    assert find_socket("/given", {}) == "/given"
    assert find_socket(None, {"NBDSRV_ADMIN_SOCKET": "/env"}) == "/env"
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    (tmp_path / "nbdsrv").mkdir()
    (tmp_path / "nbdsrv" / "admin.sock").write_text("")
    assert find_socket(None, environ) == str(tmp_path / "nbdsrv" / "admin.sock")
    with pytest.raises(ConfigError, match="say with --socket"):
        find_socket(None, {"XDG_RUNTIME_DIR": str(tmp_path / "none")})
