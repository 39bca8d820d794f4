"""Random changes to a writable Disk beside a bytearray that undergoes the same.

::

    write  zero  trim  flush  place       on the Disk
      |      |     |            |
    =====  zero  either     pwrite        on the model

TRIM alone leaves a choice: a trimmed byte is what it was or zero, and stays what it turned out
to be. Part of ``check_disk``'s contract.
"""

import errno
import os
import random
from collections.abc import Sequence

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import FileRun
from nbdsrv.errors import DiskError
from tests.disk.reading import content

__all__ = ["change_at_random"]

MARGIN = 5000
"""Bytes around a change that are read again."""


async def change_at_random(disk: Disk, model: bytearray, ranges: Sequence[tuple[int, int]]) -> None:
    """One random change per range; ``model`` ends as the Disk must."""
    chance = random.Random(len(model))
    changes = (_write, _write, _placed_write, _zero, _trim, _fast_zero, _flush)
    for offset, length in ranges:
        if not length:
            await disk.write(offset, memoryview(b""))
            continue
        change = chance.choice(changes)
        around = max(offset - MARGIN, 0), min(offset + length + MARGIN, len(model))
        epoch, held = disk.epoch, await disk.runs(around[0], around[1] - around[0])
        await change(disk, model, offset, length, chance)
        found = await content(disk, around[0], around[1] - around[0])
        what = f"after {change.__name__[1:]} {offset}+{length}"
        assert found == bytes(model[around[0] : around[1]]), what
        if disk.epoch == epoch:
            _check_held(held, around[0], model, what)


def _check_held(held: Sequence[object], offset: int, model: bytearray, what: str) -> None:
    """Only FileRuns are kept across requests; holes are asked for anew."""
    at = offset
    for run in held:
        assert hasattr(run, "length")
        if isinstance(run, FileRun):
            found = os.pread(run.fd, run.length, run.position)
            assert found == bytes(model[at : at + run.length]), f"{what}: {run} is stale"
        at += run.length


async def _write(
    disk: Disk, model: bytearray, offset: int, length: int, chance: random.Random
) -> None:
    data = chance.randbytes(length)
    await disk.write(offset, memoryview(data))
    model[offset : offset + length] = data


async def _placed_write(
    disk: Disk, model: bytearray, offset: int, length: int, chance: random.Random
) -> None:
    run = disk.place(offset, length)
    if run is None:
        await _write(disk, model, offset, length, chance)
        return
    length = min(length, run.length)
    data = chance.randbytes(length)
    assert os.pwrite(run.fd, data, run.position) == length
    model[offset : offset + length] = data


async def _zero(
    disk: Disk, model: bytearray, offset: int, length: int, chance: random.Random
) -> None:
    await disk.zero(offset, length, punch=chance.random() < 0.5, fast=False)
    model[offset : offset + length] = bytes(length)


async def _fast_zero(
    disk: Disk, model: bytearray, offset: int, length: int, chance: random.Random
) -> None:
    refused = None
    try:
        await disk.zero(offset, length, punch=chance.random() < 0.5, fast=True)
    except DiskError as error:
        refused = error.errno
    assert refused in {None, errno.EOPNOTSUPP}
    if refused is None:
        assert Ability.FAST_ZERO in disk.abilities
        model[offset : offset + length] = bytes(length)


async def _trim(
    disk: Disk, model: bytearray, offset: int, length: int, chance: random.Random
) -> None:
    await disk.trim(offset, length)
    found = await content(disk, offset, length)
    if any(found):
        before = model[offset : offset + length]
        for at, (new, old) in enumerate(zip(found, before, strict=True), offset):
            assert new in {0, old}, f"trim invented a byte at {at}"
    model[offset : offset + length] = found


async def _flush(
    disk: Disk, model: bytearray, offset: int, length: int, chance: random.Random
) -> None:
    await disk.flush()
