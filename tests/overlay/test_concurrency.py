"""Requests under way at once: in one block, beside a freeze, and beside writes of whole blocks."""

import asyncio
import errno
import os
import random
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.states import DATA
from tests.disk.reading import content
from tests.overlay.bases import make_base, opener

BLOCK = 4096
SIZE = 64 * BLOCK


async def test_parts_of_one_block(tmp_path: Path, workers: Workers) -> None:
    model = bytearray(make_base(tmp_path / "base", SIZE))
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    parts = [(at, bytes([at // 512 % 255 + 1]) * 512) for at in range(0, 8 * BLOCK, 512)]
    random.Random(1).shuffle(parts)
    async with asyncio.TaskGroup() as tasks:
        for at, data in parts:
            tasks.create_task(disk.write(at, memoryview(data)))
            model[at : at + 512] = data
    assert await content(disk, 0, SIZE) == bytes(model)
    await disk.close()


async def test_a_part_does_not_take_back_a_whole_block(tmp_path: Path, workers: Workers) -> None:
    """A thread stores a whole block while somebody waits to write a part of it."""
    make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    await disk.write(0, memoryview(b"x" * BLOCK))
    offset = 9 * BLOCK
    placed = disk.landing.place(offset, BLOCK)
    assert placed is not None
    start, run = placed
    ticket = disk.landing.begin()
    epoch = disk.landing.epoch
    part = asyncio.ensure_future(disk.write(offset + 100, memoryview(b"part")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not part.done(), "it did not wait for the write that is under way"
    assert disk.landing.epoch != epoch, "the thread was not told to look again"
    assert disk.landing.place(offset, BLOCK) is None
    os.pwrite(run.fd, b"W" * BLOCK, run.position + offset - start)
    disk.landing.stored.append((offset, BLOCK))
    disk.landing.end(ticket)
    await part
    assert await content(disk, offset, BLOCK) == b"W" * 100 + b"part" + b"W" * (BLOCK - 104)
    await disk.close()


async def test_a_moment_stays_while_everything_changes(tmp_path: Path, workers: Workers) -> None:
    base = make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    chance = random.Random(3)
    model = bytearray(base)

    async def change(disk: Overlay, seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(60):
            at = mine.randrange(SIZE - 9000)
            length = mine.randint(1, 9000)
            kind = mine.random()
            if kind < 0.7:
                await disk.write(at, memoryview(mine.randbytes(length)))
            elif kind < 0.85:
                await disk.trim(at, length)
            else:
                await disk.zero(at, length, punch=True, fast=False)

    for moment in range(3):
        await disk.write(0, memoryview(chance.randbytes(SIZE // 3)))
        await disk.adopt(40 * BLOCK, memoryview(base[40 * BLOCK : 44 * BLOCK]))
        model[:] = await content(disk, 0, SIZE)
        dirty = await disk.status("qemu:dirty-bitmap:overlay", 0, SIZE)
        frozen = await disk.freeze()
        async with asyncio.TaskGroup() as tasks:
            for writer in range(4):
                tasks.create_task(change(disk, moment * 10 + writer))
            for _ in range(6):
                at = chance.randrange(SIZE // 2)
                assert await content(frozen, at, SIZE // 2) == model[at : at + SIZE // 2]
        assert await content(frozen, 0, SIZE) == bytes(model)
        assert await frozen.status("qemu:dirty-bitmap:overlay", 0, SIZE) == dirty
        assert await content(disk, 0, SIZE) != bytes(model)
        await frozen.close()
    await disk.close()


async def test_only_one_moment_at_a_time(tmp_path: Path, workers: Workers) -> None:
    make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    frozen = await disk.freeze()
    with pytest.raises(DiskError, match="frozen already") as caught:
        await disk.freeze()
    assert errno.EBUSY == caught.value.errno
    await frozen.close()
    await (await disk.freeze()).close()
    await disk.close()


async def test_a_late_part_does_not_undo_a_zero(tmp_path: Path, workers: Workers) -> None:
    """A write that was placed before its block was zeroed lands before it."""
    make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    await disk.write(0, memoryview(b"old!" * 3 * 1024))
    run = disk.place(BLOCK + 100, 50)
    assert run is not None
    ticket, epoch = disk.landing.begin(), disk.landing.epoch
    zeroes = asyncio.ensure_future(disk.zero(0, 3 * BLOCK, punch=False, fast=False))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not zeroes.done(), "it did not wait for the write that is under way"
    assert disk.landing.epoch != epoch, "the thread was not told to look again"
    os.pwrite(run.fd, b"W" * 50, run.position)
    disk.landing.land([(BLOCK + 100, 50)])
    disk.landing.end(ticket)
    await zeroes
    assert await content(disk, 0, 3 * BLOCK) == bytes(3 * BLOCK)
    await disk.close()


async def test_what_a_killed_server_leaves_is_what_it_showed(
    tmp_path: Path, workers: Workers
) -> None:
    """A block is written as a whole while it is zeroed: either, but the same afterwards."""
    make_base(tmp_path / "base", SIZE)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    await disk.write(0, memoryview(b"old!" * 1024))
    placed = disk.landing.place(0, BLOCK)
    assert placed is not None
    ticket = disk.landing.begin()
    zeroes = asyncio.ensure_future(disk.zero(0, BLOCK, punch=False, fast=False))
    os.pwrite(placed[1].fd, b"W" * BLOCK, placed[1].position)
    disk.mark(0, 1, DATA)  # the thread is here; what follows comes after the zeroes
    await asyncio.wait({zeroes}, timeout=0.2)
    disk.landing.stored.append((0, BLOCK))
    disk.landing.end(ticket)
    await zeroes
    shown = await content(disk, 0, BLOCK)
    kept = (tmp_path / "ov" / "disk" / "recent").read_bytes()
    await disk.close()
    (tmp_path / "ov" / "disk" / "recent").write_bytes(kept)
    disk = await opener(workers, tmp_path / "base", tmp_path / "ov")()
    assert await content(disk, 0, BLOCK) == shown
    await disk.close()
