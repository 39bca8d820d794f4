"""QEMU's monitor, spoken by asyncio: commands out, their answers and events in.

::

    open_qmp ──> {"QMP": greeting}                        one JSON object a line
             ──> qmp_capabilities
    execute  ──> {"execute": ..., "id": "5f2c-7"}
             <── {"event": ...}        on_event           whenever QEMU likes
             <── {"return": ..., "id": "5f2c-7"}          or {"error": {"class", "desc"}, "id": ...}

Commands are answered in order, so that what is asked after a command that was given up sees what
that command did. Also by whom it was given: a monitor has one client at a time, and who comes next
is told what came of the last command of one that was killed (QEMU 7.2). So ids are a connection's
own, and before the first answer to us others are somebody else's.

The peer is as trusted as the disks it serves, and bounded all the same: a line's length, the time
an answer takes, and what an answer may look like. Whatever breaks a rule ends the connection.

Our own two hundred lines instead of PyPI's qemu.qmp: that one is under the GPL, and has neither
deadlines nor bounds.
"""

import asyncio
import contextlib
import errno as os_errno
import json
import logging
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from nbdsrv.disk.patience import set_within
from nbdsrv.source.hypervisor import SourceError

__all__ = ["QmpClient", "QmpLost", "QmpRefused", "making_sense", "open_qmp"]

log = logging.getLogger(__name__)

MAX_LINE = 32 << 20
"""Bytes of an answer. The longest, query-qmp-schema, has 0.3 MiB; a thousand disks less."""
CONNECT_S = 10.0
"""From the first packet to the end of the greeting."""
COMMAND_S = 60.0
"""For an answer: a command may have to wait for what a slow disk has in flight."""
HURRY_S = 10.0
"""The same once we are to end: by then a QEMU that will answer has."""
LOOK_AGAIN_S = 1.0
"""``until`` asks so often even if no event comes."""

Event = Callable[[str, Mapping[str, Any]], None]


class QmpLost(SourceError):
    """The connection is gone: QEMU has ended, or the peer broke the protocol."""


class QmpRefused(SourceError):
    """QEMU answered with an error.

    Attributes:
        kind: its class: ``GenericError``, ``CommandNotFound``, ``DeviceNotFound`` ...
        description: its words.
    """

    def __init__(self, text: str, kind: str, description: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.description = description


class QmpClient:
    """One connection. Belongs to one event loop; commands may be given at the same time.

    Attributes:
        name: for messages.
        version: QEMU's, (major, minor, micro).
        lost: why the connection is gone, or "".
        hurried: are we to end soon?
        on_event: called with an event's name and data. Must not raise.
    """

    def __init__(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.name = name
        self.version = (0, 0, 0)
        self.lost = ""
        self.hurried = False
        self.on_event: Event = lambda _name, _data: None
        self._reader = reader
        self._writer = writer
        self._session = secrets.token_hex(4)
        self._number = 0
        self._answered = False
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._stirred = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    @property
    def peer(self) -> tuple[int, int, int] | None:
        """Process, user and group id of who listens at the other end of a Unix socket."""
        sock = self._writer.get_extra_info("socket")
        if sock is None or sock.family != socket.AF_UNIX:
            return None
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        process, user, group = struct.unpack("iII", raw)
        return process, user, group

    async def greet(self) -> None:
        """Take the greeting and leave negotiation. Once, before anything else.

        Raises:
            QmpLost: that is no QMP monitor.
        """
        line = await self._line()
        try:
            numbers = line["QMP"]["version"]["qemu"]
            major, minor, micro = (int(numbers[part]) for part in ("major", "minor", "micro"))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise QmpLost(f"{self.name}: this is not a QMP monitor") from None
        self.version = (major, minor, micro)
        self._listening = asyncio.get_running_loop().create_task(self._listen())
        await self.execute("qmp_capabilities", timeout_s=CONNECT_S)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = COMMAND_S,
    ) -> Any:
        """Give a command and return what it returns.

        When this is cancelled, or gives up after ``timeout_s``, QEMU may carry the command out all
        the same. Who is hurried waits ``HURRY_S`` at most; then there is no connection any more.

        Raises:
            QmpRefused: QEMU's own error.
            QmpLost: there is no connection any more; the command may have been carried out.
            SourceError: no answer in time.
        """
        if self.lost:
            raise self._gone()
        self._number += 1
        id_ = f"{self._session}-{self._number}"
        request: dict[str, Any] = {"execute": command, "id": id_}
        if arguments is not None:
            request["arguments"] = arguments
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[id_] = future
        try:
            self._writer.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(min(timeout_s, HURRY_S) if self.hurried else timeout_s):
                answer = await future
        except TimeoutError:
            if self.hurried:
                self._fall_silent({id_})
                raise self._gone() from None
            raise SourceError(f"{self.name}: no answer to {command} in {timeout_s:g} s") from None
        finally:
            future.cancel()  # its answer, should it still come, is known and dropped
        return self._result(command, answer)

    def _result(self, command: str, answer: Mapping[str, Any]) -> Any:
        if "return" in answer:
            return answer["return"]
        error = answer["error"]
        kind, description = (str(error.get(key, "")) for key in ("class", "desc"))
        raise QmpRefused(f"{self.name}: {command}: {description}", kind, description)

    def hurry(self) -> None:
        """We are to end soon: a QEMU that says nothing for ``HURRY_S`` is taken for gone."""
        if not self.hurried:
            self.hurried = True
            asked = set(self._waiting)  # also what nobody waits for any more: it is answered first
            asyncio.get_running_loop().call_later(HURRY_S, self._fall_silent, asked)

    def _fall_silent(self, asked: set[str]) -> None:
        if not asked.isdisjoint(self._waiting):
            self._fail(f"QEMU has not answered for {HURRY_S:g} s")

    async def until(
        self, done: Callable[[], Awaitable[bool]], what: str, *, timeout_s: float = COMMAND_S
    ) -> None:
        """Ask ``done`` now, and again whenever an event has come, until it says yes.

        Raises:
            SourceError: not within ``timeout_s``; what ``done`` raises.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._stirred.clear()
                    if await done():
                        return
                    await set_within(self._stirred, LOOK_AGAIN_S)
        except TimeoutError:
            raise SourceError(f"{self.name}: {what} takes more than {timeout_s:g} s") from None

    async def stirred(self, timeout_s: float) -> None:
        """Return at the next event, or after ``timeout_s``."""
        self._stirred.clear()
        await set_within(self._stirred, timeout_s)

    async def close(self) -> None:
        """Hang up. Idempotent."""
        self._fail("closed")
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # --- the other direction -------------------------------------------------------------

    async def _listen(self) -> None:
        try:
            while True:
                self._take(await self._line())
        except QmpLost as error:
            self._fail(str(error).removeprefix(f"{self.name}: "))

    async def _line(self) -> dict[str, Any]:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise QmpLost(f"{self.name}: a line of more than {MAX_LINE} bytes") from None
        except (asyncio.IncompleteReadError, OSError):
            raise QmpLost(f"{self.name}: QEMU has closed the connection; has it ended?") from None
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise QmpLost(f"{self.name}: what comes is not QMP")
        return found

    def _take(self, line: dict[str, Any]) -> None:
        event = line.get("event")
        if isinstance(event, str):
            data = line.get("data")
            log.debug("qmp.event name=%s", event)
            self.on_event(event, data if isinstance(data, dict) else {})
            self._stirred.set()
            return
        id_ = line.get("id")
        if "return" not in line and not isinstance(line.get("error"), dict):
            raise QmpLost(f"{self.name}: an answer without return or error")
        future = self._waiting.pop(id_, None) if isinstance(id_, str) else None
        if future is None:
            if self._answered:
                raise QmpLost(f"{self.name}: an answer to nothing that was asked")
            log.info("qmp.stale: an answer to somebody before us")
            return
        self._answered = True
        if not future.done():
            future.set_result(line)

    def _fail(self, reason: str) -> None:
        self.lost = self.lost or reason
        self._writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._gone())
                future.exception()  # its waiter may have been cancelled: nobody else asks
        self._waiting.clear()
        self._stirred.set()

    def _gone(self) -> QmpLost:
        return QmpLost(f"{self.name}: {self.lost}")


@contextlib.contextmanager
def making_sense(name: str) -> Iterator[None]:
    """In the block answers are taken apart; one of another shape than QEMU's is an error of its.

    Raises:
        SourceError: instead of what a dictionary or list that is none would raise.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        text = f"{name}: QEMU's answer makes no sense ({type(error).__name__}: {error})"
        raise SourceError(text) from error


async def open_qmp(
    name: str,
    *,
    path: str | None = None,
    host: str = "",
    port: int = 0,
    timeout_s: float = CONNECT_S,
) -> QmpClient:
    """Connect to a monitor on a Unix socket, or at a TCP port.

    Raises:
        SourceError: nobody is there, or it is not QMP. Nothing stays open.
    """
    client = None
    try:
        async with asyncio.timeout(timeout_s):
            if path is not None:
                streams = await asyncio.open_unix_connection(path, limit=MAX_LINE)
            else:
                streams = await asyncio.open_connection(host, port, limit=MAX_LINE)
            client = QmpClient(name, *streams)
            await client.greet()
    except BaseException as error:
        if client is not None:
            await client.close()
        if isinstance(error, TimeoutError):
            text = f"{name}: no greeting in {timeout_s:g} s"
            hint = "a monitor serves one client at a time: is another one connected?"
            raise SourceError(f"{text}; {hint}") from None
        if isinstance(error, OSError):
            text = f"{name}: {error.strerror or error}; is the VM running, with this as its -qmp?"
            raise SourceError(text, error.errno or os_errno.EIO) from error
        raise
    return client
