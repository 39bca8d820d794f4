"""The server's end of a connection of ours: a socket the test writes to."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdsrv.net.channel import PlainChannel
from nbdsrv.net.client import Client
from protocol import structs
from protocol.constants import Dialect, ReplyType, TransmissionFlag
from protocol.terms import Negotiated

SIZE = 1 << 30
F = TransmissionFlag
FLAGS = F.HAS_FLAGS | F.SEND_FLUSH | F.SEND_TRIM | F.SEND_WRITE_ZEROES | F.SEND_DF
MIB = 1 << 20


class Peer:
    """The server's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()

    async def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self.loop.sock_recv(self.sock, count - len(data))
            assert more, "the client has gone"
            data += more
        return data

    async def requests(self, count: int):
        return [structs.Request.parse(await self.take(28)) for _ in range(count)]

    async def send(self, *pieces: bytes) -> None:
        await self.loop.sock_sendall(self.sock, b"".join(pieces))


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = False) -> bytes:
    fields = {"flags": int(done), "type": kind, "cookie": cookie, "length": len(payload)}
    return structs.StructuredChunk.build(fields) + payload


def data(cookie: int, offset: int, content: bytes, *, done: bool = False) -> bytes:
    payload = structs.OffsetData.build({"offset": offset, "data": content})
    return chunk(cookie, ReplyType.OFFSET_DATA, payload, done=done)


def hole(cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
    payload = structs.OffsetHole.build({"offset": offset, "length": length})
    return chunk(cookie, ReplyType.OFFSET_HOLE, payload, done=done)


def error_at(cookie: int, number: int, offset: int, text: bytes) -> bytes:
    fields = {"error": number, "text_length": len(text), "text": text, "offset": offset}
    payload = structs.ErrorOffsetChunk.build(fields)
    return chunk(cookie, ReplyType.ERROR_OFFSET, payload, done=True)


@asynccontextmanager
async def connected(
    dialect: Dialect = Dialect.STRUCTURED, *, request_s: float = 10.0
) -> AsyncIterator[tuple[Client, Peer]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    terms = Negotiated(export="", size=SIZE, flags=FLAGS, dialect=dialect)
    client = Client(PlainChannel(ours), terms, "nbd://test/", request_s=request_s)
    try:
        yield client, Peer(theirs)
    finally:
        theirs.close()
        await client.close()


def reading(client: Client, offset: int, length: int) -> tuple["asyncio.Task[None]", bytearray]:
    buffer = bytearray(b"\xa5") * length
    return asyncio.ensure_future(client.read(offset, memoryview(buffer))), buffer
