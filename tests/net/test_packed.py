"""READs of packed blocks in memory: few threads, all answered, whatever happens meanwhile."""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from in_process import running
from wire import Wire

from nbdsrv.disk.blocks import BlockCache, Blocks
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import Residency, Stored
from nbdsrv.disk.runs import BlockRun, Run
from nbdsrv.disk.workers import COMPUTERS, Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.exports import Export
from nbdsrv.net.packed import MAX_UNPACKING
from nbdsrv.net.server import Server
from protocol.constants import Command, Dialect, Errno
from protocol.extents import DATA, ExtentList

BLOCK = 1 << 16
BLOCKS = 64
PAIR = 2 * BLOCK
ASKED = BLOCKS // 2


class Packed(Disk):
    """Block n is bytes of n. Decoding waits for ``gate``; block ``bad`` is broken."""

    name = "packed"
    size = BLOCKS * BLOCK

    def __init__(self, workers: Workers, *, cold: bool = False) -> None:
        super().__init__(workers)
        self.gate = threading.Event()
        self.bad = -1
        self.loaded = True
        self.loads = 0
        self.threads: set[str] = set()
        self._memory = os.memfd_create("packed")
        weakref.finalize(self, os.close, self._memory)  # it may be closed and attached to again
        os.pwrite(self._memory, bytes(self.size), 0)
        self._blocks = Blocks(BlockCache(), self._decode, None if cold else self._stored)

    def _stored(self, key: int) -> Stored:
        return self._memory, key * BLOCK, BLOCK, Residency(0)

    def _decode(self, key: int) -> bytes:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(30)
        if key == self.bad:
            raise DiskError(f"{self.name}: block {key} is broken")
        return bytes([key]) * BLOCK

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        if not self.loaded:
            return None
        runs: list[Run] = []
        while length:
            key, skip = divmod(offset, BLOCK)
            part = min(length, BLOCK - skip)
            runs.append(BlockRun(self._blocks, key, skip, part))
            offset, length = offset + part, length - part
        return runs

    async def load(self, offset: int, length: int) -> None:
        self.loaded = True
        self.loads += 1

    async def extents(self, offset: int, length: int) -> ExtentList:
        return ExtentList(offset, [(length, DATA)])

    async def close(self) -> None:
        self._blocks.close()


def served(server: Server, *, cold: bool = False) -> Packed:
    disk = Packed(server._reactor.workers, cold=cold)

    async def open_() -> Disk:
        return disk

    server._catalogue.add(Export("packed", open_))
    return disk


def ask_all(socket: Path) -> Wire:
    """All of the disk is asked for, two blocks at a time; nothing is answered yet."""
    wire = Wire.connect(str(socket)).enter("packed", Dialect.STRUCTURED)
    wire.send(b"".join(wire.prepare(Command.READ, at * PAIR, PAIR) for at in range(ASKED)))
    return wire


def answers(wire: Wire) -> dict[int, bytes | int]:
    """Of ``ask_all``, by pair: what it holds, or the error."""
    found: dict[int, bytes | int] = {}
    for _ in range(ASKED):
        answer = wire.answer()
        error = answer.error
        found[answer.asked.offset // PAIR] = int(error) if error else answer.data()
    wire.disconnect()
    return found


def pair(number: int) -> bytes:
    return bytes([2 * number]) * BLOCK + bytes([2 * number + 1]) * BLOCK


async def all_begun(server: Server, count: int) -> None:
    async with asyncio.timeout(20):
        while server._reactor.workers.outstanding < count:
            await asyncio.sleep(0.001)


GOLDEN = {number: pair(number) for number in range(ASKED)}


async def test_few_threads_and_all_are_answered(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = served(server)
        wire = await asyncio.to_thread(ask_all, tmp_path / "nbd")
        await all_begun(server, MAX_UNPACKING)
        assert server._reactor.workers.outstanding == MAX_UNPACKING
        disk.gate.set()
        assert await asyncio.to_thread(answers, wire) == GOLDEN
        assert server._reactor.workers.outstanding == 0
    assert len(disk.threads) <= COMPUTERS
    assert all(name.startswith("nbdsrv-cpu-") for name in disk.threads)


async def test_what_needs_a_disk_goes_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = served(server, cold=True)
        disk.gate.set()
        wire = await asyncio.to_thread(ask_all, tmp_path / "nbd")
        assert await asyncio.to_thread(answers, wire) == GOLDEN
    assert all(name.startswith("nbdsrv-work-") for name in disk.threads)


async def test_a_broken_block_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = served(server)
        disk.bad = 7
        disk.gate.set()
        wire = await asyncio.to_thread(ask_all, tmp_path / "nbd")
        assert await asyncio.to_thread(answers, wire) == {**GOLDEN, 3: Errno.EIO}


async def test_where_the_bytes_are_is_asked_again_after_waiting(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = served(server)
        wire = await asyncio.to_thread(ask_all, tmp_path / "nbd")
        await all_begun(server, MAX_UNPACKING)
        disk.loaded = False
        disk.gate.set()
        assert await asyncio.to_thread(answers, wire) == GOLDEN
    assert disk.loads


async def test_a_client_that_leaves_while_its_reads_wait(tmp_path: Path) -> None:
    """The next one is served, and the server stops: nothing of the first is left."""
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = served(server)
        wire = await asyncio.to_thread(ask_all, tmp_path / "nbd")
        await all_begun(server, MAX_UNPACKING)
        wire.reset()
        disk.gate.set()
        again = await asyncio.to_thread(ask_all, tmp_path / "nbd")
        assert await asyncio.to_thread(answers, again) == GOLDEN


async def test_what_threads_have_done_is_answered_before_a_client_is_let_go(tmp_path: Path) -> None:
    """Results and DISC come in one pass of the reactor, the results first."""
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = served(server)

        def ask() -> Wire:
            wire = Wire.connect(str(tmp_path / "nbd")).enter("packed", Dialect.STRUCTURED)
            asked = (wire.prepare(Command.READ, at * PAIR, PAIR) for at in range(MAX_UNPACKING))
            wire.send(b"".join(asked))
            return wire

        wire = await asyncio.to_thread(ask)
        await all_begun(server, MAX_UNPACKING)
        disk.gate.set()
        wire.request(Command.DISC)
        time.sleep(0.3)
        for _ in range(MAX_UNPACKING):
            answer = await asyncio.to_thread(wire.answer)
            assert answer.data() == pair(answer.asked.offset // PAIR)
        assert await asyncio.to_thread(wire.is_closed)
        wire.close()
        assert not server.sessions
