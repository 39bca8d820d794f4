"""The guest agent: file systems frozen for the moment that a backup begins.

::

    guest-sync-delimited 0xFF {"return": id}     what an earlier client left unread is skipped
    guest-fsfreeze-freeze                        from here on the guest's file systems stand still
        ... the transaction, milliseconds ...
    guest-fsfreeze-thaw                          whatever has happened; asked until it is answered

Rule: a guest is never left frozen. Thawing has its own deadline, is not interrupted, and is tried
again on a new connection; a file marks the time in between, by which ``clean`` thaws after a kill.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
from typing import Any, Self

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qmp import QmpClient, QmpRefused

__all__ = ["GuestAgent", "agent_socket"]

log = logging.getLogger(__name__)

MAX_LINE = 1 << 20
CONNECT_S = 5.0
"""To the first answer. An agent that runs answers at once; one that does not never will."""
FREEZE_S = 30.0
"""To write out what the guest has in memory; Windows gives its writers 10 s."""
THAW_S = 10.0
THAW_ATTEMPTS = 3
PORT_NAME = "org.qemu.guest_agent.0"
FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")
_UNIX = re.compile(r"(?:disconnected:)?unix:(.+?)(?:,.*)?")


class GuestAgent:
    """The agent behind a Unix socket; a connection per conversation.

    Attributes:
        touched: has it been told to freeze? It may have done so, whatever it answered.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.touched = False

    async def freeze(self) -> int:
        """Freeze all file systems; how many.

        Raises:
            SourceError: it was refused, or nobody answers; they may be frozen all the same.
        """
        async with _Talk(self.path) as talk:
            self.touched = True
            count = await talk.ask("guest-fsfreeze-freeze", FREEZE_S)
        return count if isinstance(count, int) else 0

    async def thaw(self) -> None:
        """Thaw them, if they are frozen.

        Raises:
            SourceError: they may still be frozen.
        """
        for left in reversed(range(THAW_ATTEMPTS)):
            try:
                async with _Talk(self.path) as talk:
                    await talk.ask("guest-fsfreeze-thaw", THAW_S)
                return
            except SourceError:
                if not left:
                    raise
                await asyncio.sleep(0.2)


class _Talk:
    """One connection to the agent, in step with it."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(CONNECT_S):
                streams = await asyncio.open_unix_connection(self._path, limit=MAX_LINE)
        except (OSError, TimeoutError) as error:
            raise SourceError(f"guest agent at {self._path}: {error or 'no connection'}") from error
        self._reader, self._writer = streams
        try:
            await self._synchronise()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _synchronise(self) -> None:
        number = int.from_bytes(os.urandom(4), "big")
        # 0xFF ends whatever half a command an earlier client has left behind.
        self._writer.write(b"\xff")
        self._send("guest-sync-delimited", id=number)
        async with self._deadline("guest-sync-delimited", CONNECT_S):
            while True:
                await self._reader.readuntil(b"\xff")
                answer = _parsed(await self._reader.readuntil(b"\n"))
                if answer is not None and answer.get("return") == number:
                    return

    async def ask(self, command: str, timeout_s: float) -> Any:
        """What a command returns."""
        async with self._deadline(command, timeout_s):
            self._send(command)
            answer = _parsed(await self._reader.readuntil(b"\n"))
        if answer is not None and "return" in answer:
            return answer["return"]
        error = answer.get("error") if answer is not None else None
        words = error.get("desc", error) if isinstance(error, dict) else "its answer makes no sense"
        raise SourceError(f"guest agent: {command}: {words}")

    def _send(self, command: str, **arguments: int) -> None:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._writer.write(json.dumps(request).encode() + b"\n")

    @contextlib.asynccontextmanager
    async def _deadline(self, command: str, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise SourceError(f"guest agent: no answer to {command} in {timeout_s:g} s") from None
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
            raise SourceError(f"guest agent: {command}: the connection broke") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


async def agent_socket(client: QmpClient) -> str:
    """The Unix socket of the guest agent's port, if there is one and an agent listens; else "".

    Raises:
        SourceError: QEMU is gone.
    """
    for folder in FOLDERS:
        for child in await client.execute("qom-list", {"path": folder}):
            if child.get("type") != "child<virtserialport>":
                continue
            port = f"{folder}/{child['name']}"
            try:
                if await _get(client, port, "name") == PORT_NAME:
                    return await _listening(client, await _get(client, port, "chardev"))
            except QmpRefused as error:
                log.debug("agent.port port=%s error=%s", port, error)
    return ""


async def _get(client: QmpClient, path: str, key: str) -> Any:
    return await client.execute("qom-get", {"path": path, "property": key})


async def _listening(client: QmpClient, label: Any) -> str:
    for device in await client.execute("query-chardev"):
        match = _UNIX.fullmatch(str(device.get("filename", "")))
        if device.get("label") == label and device.get("frontend-open") and match:
            return match[1]
    return ""
