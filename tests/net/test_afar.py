"""Reads of a Disk that has to wait for the bytes itself: another server's export."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdsrv.backup.tee import Tee
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.net.listener import listen
from nbdsrv.net.server import Server
from nbdsrv.source.nbd import NbdDisk, open_nbd
from protocol.constants import Command, Errno
from protocol.headers import REQUEST, SIMPLE_WORDS, request_key
from tests.copying.disks import MemoryDisk

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(4 * MIB)


class Afar(MemoryDisk):
    """Answers in any order; some reads cannot be begun, some fail at first.

    Attributes:
        began: reads that nobody waited for.
        held: answers that do not come until ``release``.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        bad: int | None = None,
        hold: bool = False,
        remote: bool = True,
    ) -> None:
        super().__init__(workers, CONTENT, bad=bad)
        self.remote = remote
        self.began = 0
        self.hold = hold
        self.held: list[Callable[[], None]] = []
        self.dice = random.Random(5)

    def begin_read(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        fate = self.dice.random()
        if fate < 0.1 and not self.hold:
            return False
        self.began += 1

        def arrive() -> None:
            good = (fate > 0.2 and self.bad is None) or self.hold
            if good:
                buffer[:] = self.content[offset : offset + len(buffer)]
            done(good)

        if self.hold:
            self.held.append(arrive)
        else:
            asyncio.get_running_loop().call_later(self.dice.choice([0, 0, 0.002]), arrive)
        return True


@asynccontextmanager
async def served(folder: Path, disk: Afar, workers: Workers) -> AsyncIterator[NbdDisk]:
    async def opened() -> Afar:
        return disk

    catalogue = Catalogue()
    catalogue.add(Export("afar", opened))
    server = Server(catalogue, workers)
    server.listen(listen(f"unix:{folder}/afar.sock"))
    client = await open_nbd(f"nbd+unix:///afar?socket={folder}/afar.sock", workers)
    try:
        yield client
    finally:
        await client.close()
        async with asyncio.timeout(10):
            await server.stop()
        workers.close()


@pytest.mark.parametrize("remote", [True, False])
async def test_every_read_gets_its_own_bytes(tmp_path: Path, remote: bool) -> None:
    workers = Workers()
    disk = Afar(workers, remote=remote)
    async with served(tmp_path, disk, workers) as client:
        dice = random.Random(1)

        async def reads() -> None:
            for _ in range(150):
                length = dice.choice([1, 512, 4096, 65472, 65473, 70_000, MIB])
                offset = dice.randrange(len(CONTENT) - length)
                buffer = bytearray(length)
                await client.read_into(offset, memoryview(buffer))
                assert buffer == CONTENT[offset : offset + length]

        await asyncio.gather(*(reads() for _ in range(8)))
    assert disk.began > 500


async def test_what_cannot_be_read_says_where(tmp_path: Path) -> None:
    workers = Workers()
    async with served(tmp_path, Afar(workers, bad=MIB + 1000), workers) as client:
        buffer = bytearray(8192)
        with pytest.raises(DiskError) as caught:
            await client.read_into(MIB, memoryview(buffer))
        assert caught.value.offset is not None
        assert MIB <= caught.value.offset <= MIB + 1000
        await client.read_into(0, memoryview(buffer))
        assert buffer == CONTENT[:8192]


async def test_who_leaves_in_between_costs_nothing(tmp_path: Path) -> None:
    workers = Workers()
    disk = Afar(workers, hold=True)
    async with served(tmp_path, disk, workers) as client:
        buffers = [bytearray(100_000) for _ in range(20)]
        reads = [
            asyncio.ensure_future(client.read_into(n * 100_000, memoryview(buffer)))
            for n, buffer in enumerate(buffers)
        ]
        while len(disk.held) < len(reads):
            await asyncio.sleep(0.01)
        for read in reads[:10]:
            read.cancel()
        closing = asyncio.ensure_future(client.close())
        await asyncio.gather(*reads, return_exceptions=True)
        for arrive in disk.held:
            arrive()
        await closing


async def test_requests_it_cannot_begin_are_answered_in_between(tmp_path: Path) -> None:
    """Reads beyond the end, of nothing and with flags share a batch with those that are begun."""
    workers = Workers()
    async with served(tmp_path, Afar(workers), workers):
        wire = await asyncio.open_unix_connection(f"{tmp_path}/afar.sock")
        async with asyncio.timeout(10):
            await _greet(*wire)
            asked = [(0, 0, 4096), (0, len(CONTENT), 512), (4, 8192, 4096), (0, 4096, 65536)]
            wire[1].write(
                b"".join(
                    REQUEST.pack(request_key(Command.READ, flags), cookie, offset, length)
                    for cookie, (flags, offset, length) in enumerate(asked)
                )
            )
            found = {}
            for _ in asked:
                key, cookie = SIMPLE_WORDS.unpack(await wire[0].readexactly(SIMPLE_WORDS.size))
                error = key & 0xFFFFFFFF
                _, offset, length = asked[cookie]
                content = b"" if error else await wire[0].readexactly(length)
                assert error or content == CONTENT[offset : offset + length]
                found[cookie] = error
            assert found == {0: 0, 1: Errno.EINVAL, 2: Errno.EINVAL, 3: 0}
        wire[1].close()


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The oldest dialect: EXPORT_NAME, simple replies."""
    await reader.readexactly(18)
    writer.write(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 4) + b"afar")
    await reader.readexactly(10)


async def test_connections_of_ours_go_back_to_the_loop(tmp_path: Path) -> None:
    """A server that passes an export on sees to its connections, and hands them back at its end."""
    workers = Workers()
    async with served(tmp_path, Afar(workers), workers) as upstream:

        async def opened() -> Disk:
            return Tee(workers, upstream)  # which leaves it open

        catalogue = Catalogue()
        catalogue.add(Export("passed", opened))
        front = Server(catalogue, workers)
        front.listen(listen(f"unix:{tmp_path}/front.sock"))
        uri = f"nbd+unix:///passed?socket={tmp_path}/front.sock"
        client = await open_nbd(uri, workers)
        buffers = [bytearray(100_000) for _ in range(30)]
        await asyncio.gather(
            *(client.read_into(n * 100_000, memoryview(buffer)) for n, buffer in enumerate(buffers))
        )
        for n, buffer in enumerate(buffers):
            assert buffer == CONTENT[n * 100_000 : (n + 1) * 100_000]
        await client.close()
        await front.stop()
        async with asyncio.timeout(10):  # nobody would tell of the answer if not the loop
            await upstream.read_into(MIB, memoryview(buffers[0]))
        assert buffers[0] == CONTENT[MIB : MIB + 100_000]
