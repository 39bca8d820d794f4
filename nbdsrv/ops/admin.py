r"""The admin socket: what ``nbdsrv status`` and ``nbdsrv reload`` talk to.

::

    -> {"command": "drop-client", "id": 7}\n
    <- {"ok": true, "result": {...}}\n            or {"ok": false, "error": "...", "code": 2}

A line of JSON each way, any number of times on a connection; requests are answered in order.
Only root and the server's own user get in: the socket's mode says so, and the kernel is asked who
is at the other end.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from nbdsrv.errors import ConfigError, NbdsrvError
from nbdsrv.net.listener import Listener, listen
from nbdsrv.net.peer import peer_of

__all__ = ["Admin", "Handlers", "Question"]

log = logging.getLogger(__name__)

MAX_LINE = 1 << 16
MAX_CONNECTIONS = 32
IDLE_S = 300.0
"""Seconds a connection may stay without asking anything."""


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request. ``id`` is for commands about a client."""

    command: str
    id: int | None = None


Handlers = Mapping[str, Callable[[Question], Awaitable[object]]]


class Admin:
    """Answers until it is closed. Belongs to the running loop."""

    def __init__(self, path: str, handlers: Handlers) -> None:
        self.path = path
        self._handlers = handlers
        self._listener: Listener | None = None
        self._server: asyncio.Server | None = None
        self._talks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. A socket that a dead server has left is replaced.

        Raises:
            ListenError: somebody else listens there, or there is no such directory.
        """
        (self._listener,) = listen(f"unix:{self.path}", socket_mode=0o600, replace=True)
        self._listener.sock.setblocking(False)
        self._server = await asyncio.start_unix_server(
            self._talk, sock=self._listener.sock, limit=MAX_LINE
        )

    def retire(self) -> None:
        """Remove the socket, so that another may be there; who is connected goes on asking."""
        if self._server is not None and self._listener is not None:
            self._server.close()
            self._listener.close()
            self._listener.path = None  # what will be there is not ours, whatever its inode

    async def close(self) -> None:
        """Hang up on everybody and remove the socket. Idempotent."""
        if self._server is None or self._listener is None:
            return
        self._server.close()
        for talk in list(self._talks):
            talk.cancel()
        if self._talks:
            await asyncio.wait(self._talks)
        self._listener.close()
        self._server = None

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            if self._may_ask(writer):
                await self._answer_all(reader, writer)
        except (ConnectionError, TimeoutError):
            pass
        except asyncio.CancelledError:
            pass  # we are closing, and nobody waits for this task's result
        finally:
            self._talks.discard(task)
            writer.close()

    def _may_ask(self, writer: asyncio.StreamWriter) -> bool:
        peer = peer_of(writer.get_extra_info("socket"))
        if peer.uid not in {0, os.geteuid()}:
            log.warning("admin.refused uid=%s pid=%s", peer.uid, peer.pid)
            return False
        if len(self._talks) > MAX_CONNECTIONS:
            log.warning("admin.refused connections=%d", MAX_CONNECTIONS)
            return False
        return True

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    line = await reader.readline()
            except ValueError:  # longer than MAX_LINE
                writer.write(_refusal("a request is one line of at most 64 KiB"))
                await writer.drain()
                return
            if not line:
                return
            writer.write(await self._answer(line))
            async with asyncio.timeout(IDLE_S):
                await writer.drain()

    async def _answer(self, line: bytes) -> bytes:
        try:
            question = msgspec.json.decode(line, type=Question)
        except msgspec.DecodeError as error:
            return _refusal(f"no request: {error}")
        handler = self._handlers.get(question.command)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return _refusal(f"no command {question.command!r}; there are {known}")
        try:
            result: Any = await handler(question)
        except ConfigError as error:
            return _refusal(str(error), 2)
        except NbdsrvError as error:
            return _refusal(str(error))
        except Exception as error:
            log.exception("admin.bug in %s", question.command)
            return _refusal(f"{type(error).__name__}; see the server's log")
        return msgspec.json.encode({"ok": True, "result": result}) + b"\n"


def _refusal(reason: str, code: int = 1) -> bytes:
    return msgspec.json.encode({"ok": False, "error": reason, "code": code}) + b"\n"
