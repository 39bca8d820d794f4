"""Reads of a Disk that has to wait for the bytes itself: another server's export."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.net.listener import listen
from nbdsrv.net.server import Server
from nbdsrv.source.nbd import NbdDisk, open_nbd
from tests.copying.disks import MemoryDisk

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(4 * MIB)


class Afar(MemoryDisk):
    """Answers in any order; some reads cannot be begun, some fail at first.

    Attributes:
        began: reads that nobody waited for.
        held: answers that do not come until ``release``.
    """

    def __init__(self, workers: Workers, *, bad: int | None = None, hold: bool = False) -> None:
        super().__init__(workers, CONTENT, bad=bad)
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


async def test_every_read_gets_its_own_bytes(tmp_path: Path) -> None:
    workers = Workers()
    disk = Afar(workers)
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
