"""The contract every Disk passes, whatever it is made of.

::

    await check_disk(open_disk, golden)             one call, the whole contract
    for check in CONTRACT: await check(open_disk, golden)       or part by part

``open_disk`` opens the Disk anew each time; ``golden`` is what it holds. A raw file, a qcow2
chain, a restore point, an overlay or another server's export are all asked the same:

===================== ======================================================================
part                  what must hold
===================== ======================================================================
check_size            ``size`` is exact to the byte; name, format, block sizes, contexts sane
check_reads           ``read_into`` gives golden's bytes: aligned, unaligned, the tail, nothing;
                      no byte beside the buffer is touched
check_locate          runs start at the offset, cover the length, are never empty, never reach
                      beyond the disk, and lead to golden's bytes; a RemoteRun stands alone
check_extents         at least one extent, at most the length asked for, ascending, contiguous,
                      merged; HOLE and ZERO ranges are zero in golden; asking on from where an
                      answer stopped reaches the end; the same byte has the same state however
                      it is asked for; edges lie on the source's own granularity
check_status          every one of ``contexts`` is answered; base:allocation is ``extents``;
                      an unknown context is refused
check_concurrency     many reads, runs and extents at once disturb each other nowhere
check_cancellation    a cancelled read leaves the Disk readable and, once it has returned, never
                      writes into its buffer again
check_out_of_range    what reaches beyond the end raises DiskError; nothing changes, no bytes
check_closing         closing twice is fine; a closed Disk gives no bytes
check_read_only       without Ability.WRITE every change raises DiskError EROFS
check_changes         with it: write, zero, trim, flush against a model, and after reopening;
                      FileRuns held while ``epoch`` stands still keep telling the truth;
                      ``place`` leads where reads read; a refused FAST_ZERO changes nothing
===================== ======================================================================

Rule: golden is never changed here. ``check_changes`` works on its own model and leaves the image
behind changed, so give it one that may be.
"""

import asyncio
import errno
import itertools
import os
from collections.abc import Awaitable, Callable, Iterable

import pytest

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import BlockRun, FileRun, ZeroRun
from nbdsrv.errors import DiskError
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ZERO, ExtentList
from tests.disk.changes import change_at_random
from tests.disk.reading import POISON, content, some_ranges

__all__ = [
    "CONTRACT",
    "Check",
    "OpenDisk",
    "check_disk",
    "check_out_of_range",
    "check_read_only",
    "extent_map",
]

OpenDisk = Callable[[], Awaitable[Disk]]
Check = Callable[..., Awaitable[None]]

PAD = 64
"""Bytes on either side of a buffer that a read must leave alone."""
CANCELLED_BYTES = 16 << 20
"""Bytes that reads which are about to be cancelled ask for together."""


async def check_disk(open_disk: OpenDisk, golden: bytes, *, extents_granularity: int = 1) -> None:
    """Raise AssertionError unless the Disk keeps the whole contract.

    Args:
        open_disk: opens it; called several times, one after the other.
        golden: its content.
        extents_granularity: bytes; edges between extents lie on its multiples, the disk's end
            excepted.
    """
    for check in CONTRACT:
        if check is check_extents:
            await check_extents(open_disk, golden, extents_granularity=extents_granularity)
        else:
            await check(open_disk, golden)


async def check_size(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    try:
        assert disk.size == len(golden)
        assert disk.name
        assert disk.format == disk.format.lower() != ""
        sizes = disk.block_sizes
        assert 1 <= sizes.minimum <= sizes.preferred <= sizes.maximum
        assert ALLOCATION in disk.contexts
        assert len(set(disk.contexts)) == len(disk.contexts)
    finally:
        await disk.close()


async def check_reads(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    try:
        for offset, length in some_ranges(len(golden), 70):
            block = bytearray([POISON]) * (length + 2 * PAD)
            await disk.read_into(offset, memoryview(block)[PAD : PAD + length])
            assert bytes(block[PAD : PAD + length]) == golden[offset : offset + length], (
                f"wrong bytes at {offset}+{length}"
            )
            beside = block[:PAD] + block[PAD + length :]
            assert beside == bytearray([POISON]) * (2 * PAD), f"wrote beside {offset}+{length}"
    finally:
        await disk.close()


async def check_locate(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    try:
        for offset, length in some_ranges(len(golden), 70):
            if length:
                await _check_runs(disk, golden, offset, length)
    finally:
        await disk.close()


async def _check_runs(disk: Disk, golden: bytes, offset: int, length: int) -> None:
    at = offset
    for run in await disk.runs(offset, length):
        where = f"{run} at {at}, asked for {offset}+{length}"
        assert run.length >= 1, f"empty {where}"
        assert at < offset + length, f"a run too many: {where}"
        assert at + run.length <= len(golden), f"beyond the end: {where}"
        expected = golden[at : at + run.length]
        if isinstance(run, FileRun):
            assert os.pread(run.fd, run.length, run.position) == expected, f"wrong {where}"
        elif isinstance(run, ZeroRun):
            assert not any(expected), f"data under {where}"
        elif isinstance(run, BlockRun):
            block = await asyncio.to_thread(run.blocks.get, run.key, run.length)
            assert block[run.skip : run.skip + run.length] == expected, f"wrong {where}"
        else:
            assert (at, run.length) == (offset, length), f"not alone: {where}"
            found = bytearray([POISON]) * run.length
            await disk.read_into(at, memoryview(found))
            assert bytes(found) == expected, f"wrong {where}"
        at += run.length
    assert at >= offset + length, f"runs end at {at}, asked for {offset}+{length}"


async def check_extents(
    open_disk: OpenDisk, golden: bytes, *, extents_granularity: int = 1
) -> None:
    disk = await open_disk()
    try:
        states = await extent_map(disk)
        assert len(states) == len(golden)
        for state, start, end in _stretches(states):
            assert state in {DATA, ZERO, HOLE}, f"state {state} at {start}"
            assert state == DATA or not any(golden[start:end]), f"data under {state} at {start}"
            assert start % extents_granularity == 0, f"an edge at {start}"
        for offset, length in some_ranges(len(golden), 70):
            if length:
                found = await disk.extents(offset, length)
                _check_shape(found, offset, length)
                assert _flags(found) == states[offset : found.end], f"at {offset}+{length}"
    finally:
        await disk.close()


async def extent_map(disk: Disk, context: str = ALLOCATION) -> bytes:
    """The state of every byte of the disk, asking on wherever an answer stopped."""
    states = bytearray()
    while len(states) < disk.size:
        left = disk.size - len(states)
        found = await disk.status(context, len(states), left)
        _check_shape(found, len(states), left)
        states += _flags(found)
    return bytes(states)


def _check_shape(found: ExtentList, offset: int, length: int) -> None:
    asked = f"{found}, asked for {offset}+{length}"
    assert found.offset == offset, asked
    assert 1 <= found.length <= length, asked
    assert sum(extent.length for extent in found) == found.length, asked
    assert all(extent.length > 0 for extent in found), asked
    flags = [extent.flags for extent in found]
    assert all(a != b for a, b in itertools.pairwise(flags)), f"not merged: {asked}"


def _flags(found: ExtentList) -> bytes:
    return b"".join(bytes([extent.flags]) * extent.length for extent in found)


def _stretches(states: bytes) -> Iterable[tuple[int, int, int]]:
    start = 0
    for state, group in itertools.groupby(states):
        end = start + sum(1 for _ in group)
        yield state, start, end
        start = end


async def check_status(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    try:
        maps = {context: await extent_map(disk, context) for context in disk.contexts}
        if ALLOCATION_DEPTH in maps:
            for allocation, depth in zip(maps[ALLOCATION], maps[ALLOCATION_DEPTH], strict=True):
                assert bool(depth) != bool(allocation & 1)
        if golden:
            await _refuses(disk.status("nobody:knows-this", 0, len(golden)), "unknown context")
    finally:
        await disk.close()


async def check_concurrency(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()

    async def one(offset: int, length: int) -> None:
        assert await content(disk, offset, length) == golden[offset : offset + length]
        if length:
            _check_shape(await disk.extents(offset, length), offset, length)
            await _check_runs(disk, golden, offset, length)

    try:
        async with asyncio.TaskGroup() as tasks:
            for offset, length in some_ranges(len(golden), 70):
                tasks.create_task(one(offset, length))
    finally:
        await disk.close()


async def check_cancellation(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    count = max(4, min(64, CANCELLED_BYTES // (len(golden) + 1)))
    given_away = bytes([POISON]) * len(golden)

    async def read(buffer: bytearray) -> None:
        try:
            await disk.read_into(0, memoryview(buffer))
        finally:
            buffer[:] = given_away  # from here on nobody may write into it

    try:
        for patience in range(6):
            buffers = [bytearray(given_away) for _ in range(count)]
            tasks = [asyncio.ensure_future(read(buffer)) for buffer in buffers]
            for _ in range(patience):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert await content(disk, 0, len(golden)) == golden
            for task, buffer in zip(tasks, buffers, strict=True):
                assert task.cancelled() or task.exception() is None, repr(task)
                assert buffer == given_away, "a buffer was written after its read had ended"
    finally:
        await disk.close()


async def check_out_of_range(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    size = len(golden)
    try:
        for offset, length in ((size, 1), (size + 4096, 512), (max(size - 3, 0), 8), (1 << 62, 1)):
            buffer = bytearray([POISON]) * length
            where = f"{offset}+{length} of {size}"
            await _refuses(disk.read_into(offset, memoryview(buffer)), f"read_into {where}")
            assert disk.size == size
            if Ability.WRITE in disk.abilities:
                await _refuses(disk.write(offset, memoryview(buffer)), f"write {where}")
                await _refuses(disk.trim(offset, length), f"trim {where}")
                zeroing = disk.zero(offset, length, punch=False, fast=False)
                await _refuses(zeroing, f"zero {where}")
        await _refuses(disk.extents(size, 1), "extents at the end")
        await disk.close()
        disk = await open_disk()
        assert disk.size == size, "the disk grew"
        assert await content(disk, 0, size) == golden
    finally:
        await disk.close()


async def check_closing(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    await content(disk, 0, len(golden))
    await disk.close()
    await disk.close()
    if golden:
        buffer = bytearray([POISON]) * len(golden)
        with pytest.raises((DiskError, OSError, ValueError)):
            await disk.read_into(0, memoryview(buffer))


async def check_read_only(open_disk: OpenDisk, golden: bytes) -> None:
    disk = await open_disk()
    try:
        if Ability.WRITE in disk.abilities:
            return
        changing = Ability.WRITE | Ability.TRIM | Ability.ZERO | Ability.FAST_ZERO
        assert not disk.abilities & changing
        length = min(len(golden), 10)
        data = memoryview(b"x" * length)
        assert disk.place(0, length) is None
        await disk.flush()
        await _refuses(disk.write(0, data), "write", errno.EROFS)
        await _refuses(disk.trim(0, length), "trim", errno.EROFS)
        await _refuses(disk.zero(0, length, punch=True, fast=False), "zero", errno.EROFS)
        if golden:
            await disk.cache(0, len(golden))
        assert await content(disk, 0, len(golden)) == golden
    finally:
        await disk.close()


async def check_changes(open_disk: OpenDisk, golden: bytes) -> None:
    model = bytearray(golden)
    disk = await open_disk()
    try:
        if Ability.WRITE not in disk.abilities:
            return
        await change_at_random(disk, model, some_ranges(len(golden), 70))
        await disk.flush()
        assert await content(disk, 0, len(model)) == bytes(model)
    finally:
        await disk.close()
    for check in (check_size, check_reads, check_locate, check_extents):
        await check(open_disk, bytes(model))


CONTRACT: tuple[Check, ...] = (
    check_size,
    check_reads,
    check_locate,
    check_extents,
    check_status,
    check_concurrency,
    check_cancellation,
    check_out_of_range,
    check_closing,
    check_read_only,
    check_changes,
)


async def _refuses(work: Awaitable[object], what: str, number: int | None = None) -> None:
    refused = await _error(work)
    assert refused is not None, f"{what} was not refused"
    assert number is None or refused.errno == number, f"{what}: errno {refused.errno}"
    assert "\n" not in str(refused), f"{what}: {refused}"


async def _error(work: Awaitable[object]) -> DiskError | None:
    try:
        await work
    except DiskError as error:
        return error
    return None
