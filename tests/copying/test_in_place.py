"""Overwriting a disk that is there."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdsrv.copying.in_place import DiskWriter
from nbdsrv.disk.disk import Ability
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import open_image_file
from nbdsrv.formats.raw import RawDisk
from nbdsrv.formats.writer import Plan
from protocol.terms import BlockSizes

SIZE = 64 * 1024


class Picky(RawDisk):
    """A raw file that takes whole blocks only and may have no fast way to zero.

    Attributes:
        zeroed: (offset, length, fast) of all calls.
    """

    def __init__(self, workers: Workers, path: Path, *, block: int, fast: bool) -> None:
        super().__init__(workers, open_image_file(str(path), writable=True))
        self.block_sizes = BlockSizes(minimum=block)
        self.fast = fast
        self.zeroed: list[tuple[int, int, bool]] = []
        self.flushes = 0

    async def write(self, offset: int, data: memoryview) -> None:
        self._whole(offset, len(data))
        await super().write(offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        self._whole(offset, length)
        self.zeroed.append((offset, length, fast))
        if fast and not self.fast:
            raise DiskError("not fast", errno.EOPNOTSUPP)
        await super().zero(offset, length, punch=punch, fast=False)

    async def flush(self) -> None:
        self.flushes += 1
        await super().flush()

    def _whole(self, offset: int, length: int) -> None:
        block = self.block_sizes.minimum
        if offset % block or (length % block and offset + length != self.size):
            raise DiskError("not whole blocks", errno.EINVAL)


Open = Callable[..., Picky]


@pytest.fixture
def disk(tmp_path: Path, workers: Workers) -> Open:
    path = tmp_path / "disk.img"

    def make(*, size: int = SIZE, block: int = 512, fast: bool = True) -> Picky:
        path.write_bytes(b"\xff" * size)
        return Picky(workers, path, block=block, fast=fast)

    return make


def plan(size: int) -> Plan:
    return Plan(size, lambda: iter([]))


def content(disk: Picky) -> bytes:
    return Path(disk.name).read_bytes()


async def test_data_and_zeroes_arrive_and_are_flushed(disk: Open) -> None:
    target = disk()
    writer = DiskWriter(target)
    assert (writer.fresh, writer.ordered, writer.granularity) == (False, False, 512)
    await writer.open(SIZE)
    await writer.begin(plan(SIZE))
    await writer.data(1024, memoryview(b"x" * 512))
    await writer.zero(4096, 8192)
    assert target.flushes == 0
    await writer.finish()
    assert target.flushes == 1
    assert content(target) == (
        b"\xff" * 1024 + b"x" * 512 + b"\xff" * 2560 + bytes(8192) + b"\xff" * (SIZE - 12_288)
    )
    assert target.zeroed == [(4096, 8192, True)]
    await target.close()


async def test_where_zeroing_is_not_fast_it_is_done_all_the_same(disk: Open) -> None:
    target = disk(fast=False)
    writer = DiskWriter(target)
    await writer.open(SIZE)
    await writer.begin(plan(SIZE))
    await writer.zero(0, 4096)
    await writer.zero(8192, 4096)
    assert content(target)[:12_288] == bytes(4096) + b"\xff" * 4096 + bytes(4096)
    assert target.zeroed == [(0, 4096, True), (0, 4096, False), (8192, 4096, False)]
    await target.close()


@pytest.mark.parametrize("size", [4096 * 3 + 1, 4096 * 3 + 4095])
async def test_a_source_that_ends_within_a_block_fills_it_with_zeroes(
    disk: Open, size: int
) -> None:
    for work in ("data", "zero"):
        target = disk(block=4096)
        writer = DiskWriter(target)
        await writer.open(size)
        await writer.begin(plan(size))
        if work == "data":
            await writer.data(4096, memoryview(b"x" * (size - 4096)))
            expected = b"x" * (size - 4096)
        else:
            await writer.zero(4096, size - 4096)
            expected = bytes(size - 4096)
        whole = expected.ljust(4096 * 3, b"\0")
        assert content(target) == b"\xff" * 4096 + whole + b"\xff" * (SIZE - 4 * 4096)
        await target.close()


async def test_the_end_of_both_needs_no_filling(disk: Open) -> None:
    target = disk(size=4096 + 100, block=4096)
    writer = DiskWriter(target)
    await writer.open(4196)
    await writer.begin(plan(4196))
    await writer.data(4096, memoryview(b"x" * 100))
    await writer.zero(0, 4096)
    assert content(target) == bytes(4096) + b"x" * 100
    await target.close()


async def test_too_small_a_disk_is_refused(disk: Open) -> None:
    target = disk()
    with pytest.raises(DiskError, match="fewer than the source's") as caught:
        await DiskWriter(target).open(SIZE + 1)
    assert caught.value.errno == errno.ENOSPC
    await target.close()


async def test_a_read_only_disk_is_refused(disk: Open) -> None:
    target = disk()
    target.abilities &= ~Ability.WRITE
    with pytest.raises(DiskError, match="read-only") as caught:
        await DiskWriter(target).open(SIZE)
    assert caught.value.errno == errno.EROFS
    await target.close()


async def test_an_error_other_than_not_fast_is_an_error(disk: Open) -> None:
    target = disk(block=4096)
    writer = DiskWriter(target)
    await writer.open(SIZE)
    await writer.begin(plan(SIZE))
    with pytest.raises(DiskError, match="not whole blocks"):
        await writer.zero(512, 512)
    await target.close()
