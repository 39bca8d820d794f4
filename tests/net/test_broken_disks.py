"""Bugs behind a Disk: one request fails, and neither its client nor the server hangs for it."""

import asyncio
import errno as os_errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from in_process import running
from wire import Wire

from nbdsrv.disk.blocks import BlockCache, Blocks
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import Residency, Stored
from nbdsrv.disk.runs import BlockRun, Run
from nbdsrv.disk.workers import Workers
from nbdsrv.export.exports import Export
from nbdsrv.net.server import Limits, Server
from protocol.constants import Command, CommandFlag, Dialect, Errno
from protocol.extents import DATA, ExtentList

SIZE = 1 << 20
BLOCK = 1 << 16


class Broken(Disk):
    """Its first half is found and decoded with bugs, in its second a wait is cancelled."""

    name = "broken"
    size = SIZE

    def __init__(self, workers: Workers) -> None:
        super().__init__(workers)
        self.mended = False
        self._memory = os.memfd_create("broken")
        weakref.finalize(self, os.close, self._memory)  # it may be closed and attached to again
        os.pwrite(self._memory, bytes(SIZE), 0)
        self._blocks = Blocks(BlockCache(), self._decode, self._stored)

    def _stored(self, key: int) -> Stored:
        if not self.mended:
            raise KeyError(key)
        return self._memory, key * BLOCK, BLOCK, Residency(0)

    def _decode(self, key: int) -> bytes:
        if not self.mended:
            raise KeyError(key)
        return bytes([key]) * BLOCK

    def locate(self, offset: int, length: int) -> tuple[Run] | None:
        if offset >= SIZE // 2 and not self.mended:
            return None
        block, skip = divmod(offset, BLOCK)
        return (BlockRun(self._blocks, block, skip, min(length, BLOCK - skip)),)

    async def load(self, offset: int, length: int) -> None:
        shared: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        shared.cancel()
        await shared

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.load(offset, len(buffer))

    async def extents(self, offset: int, length: int) -> ExtentList:
        return ExtentList(offset, [(length, DATA)])

    async def close(self) -> None:
        """There is nothing to be given back."""


def _served(server: Server) -> Broken:
    catalogue = server._catalogue
    disk = Broken(server._reactor.workers)

    async def open_() -> Disk:
        return disk

    catalogue.add(Export("broken", open_))
    return disk


@pytest.mark.parametrize("offset", [0, SIZE // 2])
@pytest.mark.parametrize("dialect", list(Dialect))
async def test_one_request_fails_and_the_connection_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dialect: Dialect, offset: int
) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    async with running(tmp_path / "nbd", tmp_path / "image") as server:
        disk = _served(server)

        def ask() -> None:
            wire = Wire.connect(str(tmp_path / "nbd")).enter("broken", dialect)
            for _ in range(3):
                assert wire.call(Command.READ, offset, 4096).error == Errno.EIO
            disk.mended = True
            expected = bytes([offset // BLOCK]) * 4096
            assert wire.read(offset, 4096) == expected
            wire.disconnect()

        async with asyncio.timeout(20):
            await asyncio.to_thread(ask)
    assert "session.bug" in caplog.text


async def test_opening_does_not_count_as_the_client_s_time(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    limits = Limits(handshake_s=0.5)
    async with running(tmp_path / "nbd", tmp_path / "image", limits=limits) as server:
        disk = _served(server)
        disk.mended = True
        opened = asyncio.Event()

        async def open_() -> Disk:
            await asyncio.sleep(1)
            opened.set()
            return disk

        server._catalogue.add(Export("slow", open_))

        def ask() -> None:
            wire = Wire.connect(str(tmp_path / "nbd")).enter("slow", Dialect.STRUCTURED)
            assert wire.read(0, 512) == bytes(512)
            wire.disconnect()

        await asyncio.to_thread(ask)
        assert opened.is_set()

        def dawdle() -> None:
            wire = Wire.connect(str(tmp_path / "nbd"))
            wire.greet()
            assert wire.is_closed()
            wire.close()

        await asyncio.to_thread(dawdle)


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
async def test_writes_that_fail_are_counted_and_logged(
    tmp_path: Path,
    dialect: Dialect,
    flags: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also those that a thread stores and answers on its own."""

    def full(writes: Sequence[object]) -> dict[int, OSError]:
        error = OSError(os_errno.ENOSPC, "No space left on device")
        return dict.fromkeys(range(len(writes)), error)

    monkeypatch.setattr("nbdsrv.net.writes.store", full)
    image, path = tmp_path / "disk.img", tmp_path / "socket"
    image.write_bytes(bytes(SIZE))

    def write() -> None:
        wire = Wire.connect(str(path)).enter("disk", dialect)
        for offset in (0, 5):
            answer = wire.call(Command.WRITE, offset, payload=b"x" * 7, flags=flags)
            assert answer.error == Errno.ENOSPC
        wire.disconnect()

    async with running(path, image, writable=True) as server:
        await asyncio.to_thread(write)
        assert server.measures["disk"].failed == 2
    told = [each.getMessage() for each in caplog.records]
    assert [line for line in told if "request.failed" in line] == [
        f"request.failed disk='disk.img' WRITE of 7 at {at} reason={image}: No space left on device"
        for at in (0, 5)
    ]
