"""Other people's servers, and small ones that misbehave.

::

    with listening(socket, "nbdkit", ...)     the real program, started as systemd would
    async with misbehaving(socket, script)    an asyncio server; ``script`` is one connection

The programs are given a socket that is listening already: there is nothing to wait for.
"""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from construct import Container

from protocol import structs
from protocol.constants import Info, Option, Reply, TransmissionFlag

STOP_S = 20

F = TransmissionFlag
FLAGS = F.HAS_FLAGS | F.SEND_FLUSH | F.SEND_DF | F.CAN_MULTI_CONN
Talk = Callable[["Conversation"], Awaitable[None]]


def need(program: str) -> None:
    """Skip without it on a laptop, fail under CI."""
    if shutil.which(program) is None and os.environ.get("CI") != "true":
        pytest.skip(f"{program} is not installed")


@contextmanager
def listening(path: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server on a Unix socket at ``path``."""
    need(command[0])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        process = subprocess.Popen(
            ["sh", "-c", script, "sh", *command], stdin=listener, stderr=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        path.unlink(missing_ok=True)


def unix_uri(path: Path, export: str = "", scheme: str = "nbd+unix", **more: str) -> str:
    """The URI of a Unix socket."""
    rest = "".join(f"&{key}={value}" for key, value in more.items())
    return f"{scheme}:///{quote(export)}?socket={quote(str(path))}{rest}"


class Conversation:
    """One connection of a server that is made to misbehave, past its greeting."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def greet(self) -> None:
        """Fixed newstyle, no zeroes."""
        self.writer.write(structs.Greeting.build({"flags": 3}))
        await self.reader.readexactly(4)

    async def option(self) -> tuple[int, bytes]:
        """The client's next option."""
        header = structs.OptionHeader.parse(await self.reader.readexactly(16))
        return header.option, await self.reader.readexactly(header.length)

    def reply(self, option: int, reply: int, data: bytes = b"") -> None:
        """Answer it."""
        fields = {"option": option, "reply": reply, "length": len(data)}
        self.writer.write(structs.OptionReplyHeader.build(fields) + data)

    async def agree(self, size: int, flags: int = FLAGS, *, structured: bool = True) -> None:
        """A handshake with a happy end: GO, without contexts."""
        await self.greet()
        while True:
            option, _ = await self.option()
            if option == Option.GO:
                info = Info.EXPORT.to_bytes(2, "big") + size.to_bytes(8, "big")
                self.reply(option, Reply.INFO, info + int(flags).to_bytes(2, "big"))
                self.reply(option, Reply.ACK)
                return
            wanted = option == Option.STRUCTURED_REPLY and structured
            self.reply(option, Reply.ACK if wanted else Reply.ERR_UNSUP)

    async def request(self) -> Container:
        """The client's next request, 28 bytes; a WRITE's data is read and forgotten."""
        request = structs.Request.parse(await self.reader.readexactly(28))
        if request.type == 1:
            await self.reader.readexactly(request.length)
        return request

    def simple(self, cookie: int, data: bytes = b"", error: int = 0) -> None:
        """A simple reply."""
        self.writer.write(structs.SimpleReply.build({"error": error, "cookie": cookie}) + data)

    def chunk(self, cookie: int, kind: int, payload: bytes = b"", *, done: bool = True) -> None:
        """A structured reply chunk."""
        fields = {"flags": int(done), "type": kind, "cookie": cookie, "length": len(payload)}
        self.writer.write(structs.StructuredChunk.build(fields) + payload)


@asynccontextmanager
async def misbehaving(path: Path, talk: Talk) -> AsyncIterator[list[BaseException]]:
    """Serve ``talk`` on a Unix socket; yields what it raised, other than for a client that left."""
    raised: list[BaseException] = []
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(Conversation(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001 - shown to the test
            raised.append(error)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        talks.add(task)
        task.add_done_callback(talks.discard)

    server = await asyncio.start_unix_server(accept, str(path), limit=1 << 20)
    try:
        yield raised
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        path.unlink(missing_ok=True)
        assert not raised, raised
