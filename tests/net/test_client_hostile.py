"""Hostile servers: whatever they answer, the connection ends and only the buffer is touched."""

import asyncio
import random
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.errors import DiskError
from nbdsrv.net.client import ConnectionLost
from protocol import structs
from protocol.constants import ReplyType
from tests.net.client_peer import chunk, connected, data, hole, reading

HOSTILE = {
    "wrong magic": lambda cookie: b"\xff" * 32,
    "stranger's cookie": lambda cookie: hole(cookie + 5, 0, 100_000, done=True),
    "beyond the end": lambda cookie: data(cookie, 90_000, b"x" * 20_000),
    "before the start": lambda cookie: hole(cookie, (1 << 64) - 10, 20),
    "twice": lambda cookie: data(cookie, 0, b"x" * 5000) + data(cookie, 4000, b"x" * 5000),
    "success without data": lambda cookie: chunk(cookie, ReplyType.NONE, done=True),
    "huge chunk": lambda cookie: structs.StructuredChunk.build(
        {"flags": 0, "type": 1, "cookie": cookie, "length": 0xFFFFFFFF}
    ),
    "status unasked": lambda cookie: chunk(cookie, ReplyType.BLOCK_STATUS, bytes(12)),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_answers_end_the_connection(name: str) -> None:
    async with connected() as (client, peer):
        guard = bytearray(b"\xa5") * 300_000
        task = asyncio.ensure_future(client.read(0, memoryview(guard)[100_000:200_000]))
        [request] = await peer.requests(1)
        await peer.send(HOSTILE[name](request.cookie))
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionLost):
                await task
        assert guard[:100_000] == guard[200_000:] == b"\xa5" * 100_000


HOW = ["set", "cut", "add"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**20), st.integers(0, 255), st.sampled_from(["set", "cut", "add"])
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 3),
)
def test_mangled_answers_never_escape(mutations: list[tuple[int, int, str]], seed: int) -> None:
    """Whatever the bytes, a read ends: well and with the server's bytes, or with a DiskError."""
    asyncio.run(mangled(mutations, seed))


async def mangled(mutations: list[tuple[int, int, str]], seed: int) -> None:
    golden = random.Random(seed).randbytes(3000)
    async with connected() as (client, peer):
        reads = [reading(client, at, 1000) for at in (0, 1000, 2000)]
        sent = bytearray()
        for request in await peer.requests(3):
            at, half = request.offset, 500
            sent += data(request.cookie, at, golden[at : at + half])
            sent += data(request.cookie, at + half, golden[at + half : at + 1000], done=True)
        for place, value, how in mutations:
            at = place % (len(sent) or 1)
            if how == "set":
                sent[at : at + 1] = bytes([value])
            elif how == "cut":
                del sent[at : at + value]
            else:
                sent[at:at] = bytes([value])
        await peer.send(bytes(sent))
        peer.sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            found = await asyncio.gather(*(task for task, _ in reads), return_exceptions=True)
        assert all(error is None or isinstance(error, DiskError) for error in found), found
