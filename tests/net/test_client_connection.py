"""One connection of ours: answers in any order, cancellation, bounds, its end."""

import asyncio
import errno
import random
import socket
from itertools import pairwise
from pathlib import Path

import pytest

from nbdsrv.errors import DiskError
from nbdsrv.net.client import ConnectionLost
from nbdsrv.net.client_connect import Patience, Remote, connect
from nbdsrv.net.client_flight import MAX_IN_FLIGHT
from protocol import structs
from protocol.constants import ReplyType
from protocol.uri import Uri
from tests.net.client_peer import MIB, chunk, connected, data, error_at, hole, reading

# --- answers ---------------------------------------------------------------------------------


async def test_answers_in_any_order_and_in_pieces() -> None:
    chance = random.Random(1)
    golden = chance.randbytes(MIB)
    async with connected() as (client, peer):
        reads = [reading(client, at, 65536) for at in range(0, MIB, 65536)]
        chunks = []
        for request in await peer.requests(len(reads)):
            at, cookie = request.offset, request.cookie
            cuts = sorted({0, 65536, *(chance.randrange(1, 65536) for _ in range(4))})
            parts = [
                data(cookie, at + low, golden[at + low : at + high]) for low, high in pairwise(cuts)
            ]
            chance.shuffle(parts)
            chunks.append([*parts, chunk(cookie, ReplyType.NONE, done=True)])
        while any(chunks):
            some = chance.choice([part for part in chunks if part])
            await peer.send(some.pop(0))
        await asyncio.gather(*(task for task, _ in reads))
        assert b"".join(buffer for _, buffer in reads) == golden
        assert client.load == 0


@pytest.mark.parametrize("step", [1, 7, 4095, 5000])
async def test_bytes_in_dribs_and_drabs(step: int) -> None:
    golden = random.Random(2).randbytes(20_000)
    async with connected() as (client, peer):
        task, buffer = reading(client, 4096, 50_000)
        [request] = await peer.requests(1)
        answer = data(request.cookie, 4096, golden) + hole(
            request.cookie, 24_096, 30_000, done=True
        )
        for at in range(0, len(answer), step):
            await peer.send(answer[at : at + step])
            if at < 400:
                await asyncio.sleep(0)
        await task
        assert buffer == golden + bytes(30_000)


async def test_requests_of_one_turn_leave_together() -> None:
    async with connected() as (client, peer):
        tasks = [reading(client, at * 512, 512)[0] for at in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        received = await peer.loop.sock_recv(peer.sock, 65536)
        assert len(received) == 28 * 10
        for task in tasks:
            task.cancel()


async def test_a_write_is_header_and_data_and_nothing_between() -> None:
    golden = random.Random(3).randbytes(3 * MIB)
    async with connected() as (client, peer):
        write = asyncio.ensure_future(client.write(0, memoryview(golden)))
        flush = asyncio.ensure_future(client.flush())
        [request] = await peer.requests(1)
        assert await peer.take(request.length) == golden
        [second] = await peer.requests(1)
        for cookie in (second.cookie, request.cookie):
            await peer.send(chunk(cookie, ReplyType.NONE, done=True))
        await asyncio.gather(write, flush)


async def test_the_servers_words_and_how_far_the_data_is_good() -> None:
    async with connected() as (client, peer):
        task, buffer = reading(client, 1000, 5000)
        [request] = await peer.requests(1)
        await peer.send(
            data(request.cookie, 1000, b"g" * 3000),
            error_at(request.cookie, 5, 4000, b"sector is dust"),
        )
        with pytest.raises(DiskError, match="sector is dust") as raised:
            await task
        assert (raised.value.errno, raised.value.offset) == (errno.EIO, 4000)
        assert buffer[:3000] == b"g" * 3000
        assert not isinstance(raised.value, ConnectionLost)


async def test_what_never_came_is_not_good_whatever_the_error_says() -> None:
    async with connected() as (client, peer):
        task, _ = reading(client, 1000, 5000)
        [request] = await peer.requests(1)
        await peer.send(
            data(request.cookie, 1000, b"g" * 500),
            data(request.cookie, 2000, b"g" * 2000),
            error_at(request.cookie, 5, 4500, b""),
        )
        with pytest.raises(DiskError) as raised:
            await task
        assert raised.value.offset == 1500


async def test_an_error_without_a_place_leaves_nothing_good() -> None:
    async with connected() as (client, peer):
        task, _ = reading(client, 1000, 5000)
        [request] = await peer.requests(1)
        fields = {"error": 5, "text_length": 0, "text": b""}
        failed = chunk(request.cookie, ReplyType.ERROR, structs.ErrorChunk.build(fields), done=True)
        await peer.send(data(request.cookie, 1000, b"g" * 3000), failed)
        with pytest.raises(DiskError) as raised:
            await task
        assert raised.value.offset == 1000


# --- bounds ----------------------------------------------------------------------------------


async def test_requests_in_flight_are_bounded() -> None:
    async with connected() as (client, peer):
        reads = [reading(client, at * 512, 512)[0] for at in range(MAX_IN_FLIGHT + 10)]
        first = await peer.requests(MAX_IN_FLIGHT)
        await asyncio.sleep(0.01)
        with pytest.raises(BlockingIOError):
            peer.sock.recv(1)
        for request in first:
            await peer.send(hole(request.cookie, request.offset, 512, done=True))
        for request in await peer.requests(10):
            await peer.send(hole(request.cookie, request.offset, 512, done=True))
        await asyncio.gather(*reads)


async def test_a_cancelled_place_in_the_queue_goes_to_the_next() -> None:
    async with connected() as (client, peer):
        reads = [reading(client, at * 512, 512)[0] for at in range(MAX_IN_FLIGHT + 3)]
        first = await peer.requests(MAX_IN_FLIGHT)
        reads[-3].cancel()
        await peer.send(hole(first[0].cookie, 0, 512, done=True))
        while client.load == MAX_IN_FLIGHT:
            await asyncio.sleep(0)
        reads[-2].cancel()  # woken just now
        [last] = await peer.requests(1)
        assert last.offset == 512 * (MAX_IN_FLIGHT + 2)
        for request in [*first[1:], last]:
            await peer.send(hole(request.cookie, request.offset, 512, done=True))
        async with asyncio.timeout(5):
            await asyncio.wait(reads)
        assert not reads[-1].cancelled()


# --- cancellation ----------------------------------------------------------------------------


@pytest.mark.parametrize("received", [0, 10, 28, 10_000, 99_000])
async def test_a_cancelled_reads_buffer_is_left_alone(received: int) -> None:
    async with connected() as (client, peer):
        task, buffer = reading(client, 0, 100_000)
        other, beside = reading(client, 0, 512)
        first, second = await peer.requests(2)
        answer = data(first.cookie, 0, b"g" * 100_000, done=True)
        await peer.send(answer[:received])
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        buffer[:] = b"\xee" * len(buffer)
        await peer.send(answer[received:], data(second.cookie, 0, b"b" * 512, done=True))
        await other
        assert buffer == b"\xee" * 100_000
        assert beside == b"b" * 512
        assert client.load == 0


async def test_a_cancelled_write_goes_on_from_a_copy() -> None:
    async with connected() as (client, peer):
        buffer = bytearray(b"w" * (8 * MIB))
        task = asyncio.ensure_future(client.write(0, memoryview(buffer)))
        [request] = await peer.requests(1)
        task.cancel()
        await asyncio.wait([task])
        buffer[:] = b"\xee" * len(buffer)
        assert await peer.take(request.length) == b"w" * (8 * MIB)
        await peer.send(chunk(request.cookie, ReplyType.NONE, done=True))
        flush = asyncio.ensure_future(client.flush())
        [request] = await peer.requests(1)
        await peer.send(chunk(request.cookie, ReplyType.NONE, done=True))
        await flush


# --- the end ---------------------------------------------------------------------------------


async def test_a_dead_connection_fails_all_its_requests() -> None:
    async with connected() as (client, peer):
        lost = []
        client.on_lost = lambda: lost.append(client.lost)
        reads = [reading(client, at * 512, 512)[0] for at in range(MAX_IN_FLIGHT + 5)]
        await peer.requests(3)
        peer.sock.close()
        async with asyncio.timeout(5):
            found = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(error, ConnectionLost) for error in found), found
        assert all("nbd://test/" in str(error) for error in found)
        assert len(lost) == 1
        assert not client.usable
        with pytest.raises(ConnectionLost):
            await client.flush()


async def test_an_overdue_answer_ends_the_connection() -> None:
    async with connected(request_s=0.1) as (client, peer):
        task, _ = reading(client, 0, 512)
        await peer.requests(1)
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionLost, match=r"no answer within 0\.1 s") as raised:
                await task
        assert raised.value.errno == errno.ETIMEDOUT


async def test_close_says_goodbye_once_all_is_answered() -> None:
    async with connected() as (client, peer):
        task, _ = reading(client, 0, 512)
        [request] = await peer.requests(1)
        task.cancel()
        closing = asyncio.ensure_future(client.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        await peer.send(hole(request.cookie, 0, 512, done=True))
        await closing
        [farewell] = await peer.requests(1)
        assert farewell.type == 2
        assert await peer.loop.sock_recv(peer.sock, 1) == b""


async def test_nothing_is_asked_on_a_closed_connection() -> None:
    async with connected() as (client, _):
        await client.close()
        await client.close()
        with pytest.raises(DiskError, match="closed"):
            await client.read(0, memoryview(bytearray(512)))


# --- TCP -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_tcp(host: str) -> None:
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(structs.Greeting.build({"flags": 3}))
        await reader.readexactly(4)
        asked.append(await reader.readexactly(16))
        writer.close()

    server = await asyncio.start_server(serve, host)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(DiskError, match=str(port)):
            await connect(Remote(Uri(host=host, port=port), patience=Patience(connect_s=5)))
    assert len(asked) == 1


async def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """On a Unix socket connect(2) does not wait; a busy server is not a dead one."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for sock in crowd:
            sock.setblocking(False)
            if sock.connect_ex(path):
                break
        task = asyncio.ensure_future(connect(Remote(Uri(socket=path))))
        await asyncio.sleep(0.05)
        assert not task.done()
        listener.setblocking(False)
        accepted = []
        async with asyncio.timeout(5):
            while not task.done():
                try:
                    sock, _ = listener.accept()
                    sock.send(b"not an NBD server")
                    accepted.append(sock)
                except BlockingIOError:
                    await asyncio.sleep(0.005)
        with pytest.raises(DiskError, match="not an NBD server"):
            await task
        for sock in [*crowd, *accepted]:
            sock.close()
