"""A Disk for the wrappers' tests: a real one, whose reads can be watched, held up and failed."""

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.raw import open_raw

__all__ = ["Watched", "image", "opened", "wrapper_opener"]


class Watched(Passthrough):
    """Answers RemoteRun, as another server's export would.

    Attributes:
        reads: (offset, length) of every read that reached it.
        writes: likewise.
        gate: reads and writes wait until it is set.
        write_gate: writes alone.
        bad: reads that touch this offset fail there, while ``failures`` last.
        stubborn: not even cancellation gets anybody away from the gate, as with a thread.
    """

    def __init__(self, workers: Workers, inside: Disk) -> None:
        super().__init__(workers, inside)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.write_gate = asyncio.Event()
        self.write_gate.set()
        self.bad: int | None = None
        self.failures = 1 << 30
        self.stubborn = False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        await self._pass_gate()
        bad = self.bad
        if bad is not None and offset <= bad < offset + len(buffer) and self.failures:
            self.failures -= 1
            await super().read_into(offset, buffer[: bad - offset])
            raise DiskError(f"{self.name}: bad sector", errno.EIO, bad)
        await super().read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        self.writes.append((offset, len(data)))
        await self._pass_gate()
        await self.write_gate.wait()
        await super().write(offset, data)

    async def _pass_gate(self) -> None:
        patience = 3  # so that a test which fails ends all the same
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                patience -= 1
                if not self.stubborn or not patience:
                    raise


def image(folder: Path, size: int) -> bytes:
    """``disk`` in the folder, random data but for a hole in its second quarter."""
    golden = random.Random(size).randbytes(size)
    quarter = size // 4 // 4096 * 4096
    golden = golden[:quarter] + bytes(quarter) + golden[2 * quarter :]
    with (folder / "disk").open("wb") as file:
        file.write(golden[:quarter])
        file.seek(2 * quarter)
        file.write(golden[2 * quarter :])
    return golden


async def opened(folder: Path, workers: Workers, *, writable: bool = False) -> Watched:
    return Watched(workers, await open_raw(str(folder / "disk"), workers, writable=writable))


def wrapper_opener(
    folder: Path, workers: Workers, wrap: Callable[[Disk], Disk], *, remote: bool, writable: bool
) -> Callable[[], Awaitable[Disk]]:
    """For ``check_disk``: the wrapper over the file, or over a Disk that is elsewhere."""

    async def open_disk() -> Disk:
        if remote:
            return wrap(await opened(folder, workers, writable=writable))
        return wrap(await open_raw(str(folder / "disk"), workers, writable=writable))

    return open_disk
