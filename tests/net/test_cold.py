"""READs that wait for a disk, where there is no io_uring: those of one turn share threads, which
first tell it of them all.
"""

import asyncio
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from in_process import running
from wire import Wire

from nbdsrv.disk.blocks import BlockCache, Blocks
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import NEVER, Residency, Stored
from nbdsrv.disk.ring import Ring
from nbdsrv.disk.runs import BlockRun, Run
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.exports import Export
from nbdsrv.net.cold import GROUP, SMALL
from nbdsrv.net.server import Server
from nbdsrv.net.slow import MAX_READING
from protocol.constants import Command, Dialect, Errno
from protocol.extents import DATA, ExtentList

BLOCK = 2 * SMALL
BLOCKS = MAX_READING
PART = 4096


class Far(Residency):
    """Of a file of which nothing is ever in memory."""

    def resident(self, fd: int, position: int, length: int) -> bool:
        del fd, position, length
        return False


class Cold(Disk):
    """Block n is bytes of n. Decoding waits for ``gate``; block ``bad`` is broken."""

    name = "cold"
    size = BLOCKS * BLOCK

    def __init__(self, workers: Workers, inline: int = os.RWF_NOWAIT) -> None:
        super().__init__(workers)
        self.gate = threading.Event()
        self.bad = -1
        self.threads: set[int] = set()
        self._residency = Far(inline)
        self._file = os.memfd_create("cold")
        weakref.finalize(self, os.close, self._file)  # it may be closed and attached to again
        self._blocks = Blocks(BlockCache(), self._decode, self._stored)

    def _stored(self, key: int) -> Stored:
        return self._file, key * 1000, 1000, self._residency

    def _decode(self, key: int) -> bytes:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(30)
        if key == self.bad:
            raise DiskError(f"{self.name}: block {key} is broken")
        return bytes([key]) * BLOCK

    def locate(self, offset: int, length: int) -> Sequence[Run]:
        key, skip = divmod(offset, BLOCK)
        return (BlockRun(self._blocks, key, skip, min(length, BLOCK - skip)),)

    async def load(self, offset: int, length: int) -> None:
        raise AssertionError("all is known")

    async def extents(self, offset: int, length: int) -> ExtentList:
        return ExtentList(offset, [(length, DATA)])

    async def close(self) -> None:
        self._blocks.close()


@pytest.fixture(autouse=True)
def no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "make", lambda: None)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions that the kernel has been told of."""
    positions: list[int] = []

    def advise(fd: int, position: int, length: int, advice: int) -> None:
        assert (length, advice) == (1000, os.POSIX_FADV_WILLNEED)
        assert os.fstat(fd)
        positions.append(position)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return positions


def served(server: Server, inline: int = os.RWF_NOWAIT) -> Cold:
    disk = Cold(server._reactor.workers, inline)

    async def open_() -> Disk:
        return disk

    server._catalogue.add(Export("cold", open_))
    return disk


def ask(socket: Path, length: int = PART) -> Wire:
    """Some of each block, at once."""
    wire = Wire.connect(str(socket)).enter("cold", Dialect.STRUCTURED)
    wire.send(b"".join(wire.prepare(Command.READ, n * BLOCK, length) for n in range(BLOCKS)))
    return wire


def answers(wire: Wire) -> dict[int, bytes | int]:
    """By block: what there is, or the error."""
    found: dict[int, bytes | int] = {}
    for _ in range(BLOCKS):
        answer = wire.answer()
        error = answer.error
        found[answer.asked.offset // BLOCK] = int(error) if error else answer.data()
    wire.disconnect()
    return found


def golden(length: int = PART) -> dict[int, bytes | int]:
    return {number: bytes([number]) * length for number in range(BLOCKS)}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


async def test_those_of_one_turn_share_threads(
    tmp_path: Path, image: Path, told: list[int]
) -> None:
    async with running(tmp_path / "nbd", image) as server:
        disk = served(server)
        disk.gate.set()
        wire = await asyncio.to_thread(ask, tmp_path / "nbd")
        assert await asyncio.to_thread(answers, wire) == golden()
        assert server._reactor.workers.outstanding == 0
    assert len(disk.threads) <= BLOCKS // GROUP
    # To read the first tells of it.
    assert [number * 1000 for number in range(BLOCKS) if number % GROUP] == sorted(told)


@pytest.mark.parametrize(
    ("length", "inline"),
    [(BLOCK, os.RWF_NOWAIT), (PART, NEVER)],
    ids=["large", "of which the kernel cannot be told"],
)
async def test_what_has_a_thread_of_its_own(
    tmp_path: Path, image: Path, told: list[int], length: int, inline: int
) -> None:
    async with running(tmp_path / "nbd", image) as server:
        disk = served(server, inline)
        wire = await asyncio.to_thread(ask, tmp_path / "nbd", length)
        async with asyncio.timeout(20):
            while len(disk.threads) < BLOCKS:
                await asyncio.sleep(0.001)
        disk.gate.set()
        assert await asyncio.to_thread(answers, wire) == golden(length)
    assert [] == told


async def test_a_broken_block_fails_alone(tmp_path: Path, image: Path, told: list[int]) -> None:
    async with running(tmp_path / "nbd", image) as server:
        disk = served(server)
        disk.bad = 7
        disk.gate.set()
        wire = await asyncio.to_thread(ask, tmp_path / "nbd")
        assert await asyncio.to_thread(answers, wire) == {**golden(), 7: Errno.EIO}
    assert told


async def test_a_client_that_leaves_meanwhile(tmp_path: Path, image: Path, told: list[int]) -> None:
    """The next one is served, and the server stops: nothing of the first is left."""
    async with running(tmp_path / "nbd", image) as server:
        disk = served(server)
        wire = await asyncio.to_thread(ask, tmp_path / "nbd")
        async with asyncio.timeout(20):
            while not disk.threads:
                await asyncio.sleep(0.001)
        wire.reset()
        disk.gate.set()
        again = await asyncio.to_thread(ask, tmp_path / "nbd")
        assert await asyncio.to_thread(answers, again) == golden()
    assert told
