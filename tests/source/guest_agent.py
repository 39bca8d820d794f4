"""A small guest agent, on the guest's side of a virtio-serial port.

No guest runs in these tests, so nobody could open ``/dev/virtio-ports/org.qemu.guest_agent.0``:
this one listens where QEMU's chardev would, and speaks the agent's protocol.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Agent:
    """What it has been asked, and how it behaves.

    Attributes:
        refuse: the error that freezing ends with.
        mute: commands that it never answers.
        leave: commands upon which it hangs up, once each.
    """

    path: Path
    asked: list[str] = field(default_factory=list)
    frozen: bool = False
    refuse: str = ""
    mute: set[str] = field(default_factory=set)
    leave: set[str] = field(default_factory=set)

    def answer(self, asked: dict) -> bytes:
        command = asked["execute"]
        if command == "guest-sync-delimited":
            return b"\xff" + _line({"return": asked["arguments"]["id"]})
        self.asked.append(command)
        if command == "guest-fsfreeze-freeze":
            if self.refuse:
                return _line({"error": {"class": "GenericError", "desc": self.refuse}})
            self.frozen = True
            return _line({"return": 3})
        if command == "guest-fsfreeze-thaw":
            self.frozen = False
            return _line({"return": 3})
        return _line({"error": {"class": "CommandNotFound", "desc": command}})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # What an earlier client did not wait for.
        writer.write(_line({"return": "stale"}))
        while line := (await reader.readline()).lstrip(b"\xff"):
            asked = json.loads(line)
            if asked["execute"] in self.mute:
                continue
            answer = self.answer(asked)
            if asked["execute"] in self.leave:
                self.leave.discard(asked["execute"])
                return
            writer.write(answer)
            await writer.drain()


def _line(what: object) -> bytes:
    return json.dumps(what).encode() + b"\n"


@asynccontextmanager
async def agent(path: Path) -> AsyncIterator[Agent]:
    """One that listens at ``path``."""
    found = Agent(path)
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                await found.serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        talks.add(task)
        task.add_done_callback(talks.discard)

    server = await asyncio.start_unix_server(accept, str(path))
    try:
        yield found
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
