"""The rows of ``nbdsrv map``: what lies where, in the shape of ``qemu-img map --output=json``.

======= ==========================================================================
key     means
======= ==========================================================================
start   bytes from the disk's beginning
length  bytes
depth   which image of the chain has it; 0 is the top
present has an image of the chain something to say about it?
zero    does it read as zeroes?
data    is it stored?
offset  where the bytes lie in that image's file, if they lie there as they are
======= ==========================================================================

``type`` and ``description`` are nbdinfo's: the flags of the meta context, and a word for them.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from nbdsrv.copying.progress import Advance
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import FileRun, Run
from nbdsrv.disk.sweep import sweep
from nbdsrv.errors import ConfigError
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import DATA, ExtentList

__all__ = ["allocation_rows", "extents", "state"]

RUNS_STEP = 1 << 28
"""Bytes whose places in files are asked for at a time: their tables are in memory together."""
_STATES = {0: "data", 2: "zero", 3: "hole"}


def state(context: str, flags: int) -> str:
    """A word for ``flags``."""
    return _STATES.get(flags, str(flags)) if context == ALLOCATION else str(flags)


async def extents(
    disk: Disk, context: str, answers: int | None = None, advance: Advance | None = None
) -> list[tuple[int, int, int]]:
    """(offset, length, flags) for the whole disk.

    With ``answers``, only as far as so many of the disk's lead. ``advance`` is called with (bytes
    looked at, size), unless one answer told all.

    Raises:
        ConfigError: the disk has no such context.
    """
    if context not in disk.contexts:
        known = ", ".join(disk.contexts)
        raise ConfigError(f"{disk.name} has no context {context}; it has {known}")
    found: list[tuple[int, int]] = []
    asked = 0
    async for some in sweep(partial(disk.status, context), 0, disk.size):
        found += [(extent.length, extent.flags) for extent in some]
        asked += 1
        if asked == answers:
            break
        if advance is not None and some.end < disk.size:
            advance(some.end, disk.size)
    return list(ExtentList(0, found).ranges())


async def allocation_rows(disk: Disk, advance: Advance | None = None) -> list[dict[str, Any]]:
    """All of ``disk``, neighbours alike merged as qemu-img does; ``advance`` as for ``extents``."""
    rows: list[dict[str, Any]] = []
    async for row in _rows(disk, advance):
        if rows and _goes_on(rows[-1], row):
            rows[-1]["length"] += row["length"]
        else:
            rows.append(row)
    return rows


async def _rows(disk: Disk, advance: Advance | None) -> AsyncIterator[dict[str, Any]]:
    chain = list(_chain(disk))
    for start, length, flags, depth in await _allocation(disk, advance):
        if flags == DATA:
            async for at, run in _runs(disk, start, length):
                row = _row(at, run.length, flags, depth, present=True)
                if isinstance(run, FileRun):
                    row["offset"] = run.position
                yield row
        elif depth is not None:
            yield _row(start, length, flags, depth, present=True)
        else:
            for at, span in _between_ends(start, length, chain):
                yield _hole(at, span, flags, chain)


async def _allocation(
    disk: Disk, advance: Advance | None
) -> Sequence[tuple[int, int, int, int | None]]:
    """(offset, length, flags, which image of the chain); None where no image has it."""
    states = await extents(disk, ALLOCATION, advance=advance)
    if ALLOCATION_DEPTH not in disk.contexts:
        return [(*each, None if each[2] & 1 else 0) for each in states]
    depths = iter(await extents(disk, ALLOCATION_DEPTH))
    found: list[tuple[int, int, int, int | None]] = []
    end = depth = 0
    for start, length, flags in states:
        at = start
        while at < start + length:
            if at >= end:
                begin, span, depth = next(depths)
                end = begin + span
            upto = min(start + length, end)
            found.append((at, upto - at, flags, depth - 1 if depth else None))
            at = upto
    return found


def _chain(disk: Disk) -> Iterator[Disk]:
    below: Disk | None = disk
    while below is not None:
        yield below
        below = below.backing


def _between_ends(start: int, length: int, chain: Sequence[Disk]) -> Iterator[tuple[int, int]]:
    """The range, cut where an image of the chain ends."""
    end = start + length
    for cut in sorted({image.size for image in chain if start < image.size < end} | {end}):
        yield start, cut - start
        start = cut


def _hole(start: int, length: int, flags: int, chain: Sequence[Disk]) -> dict[str, Any]:
    """What no image has belongs to the lowest that reaches so far."""
    depth = 0
    while depth + 1 < len(chain) and chain[depth + 1].size > start:
        depth += 1
    # A hole of a raw file has its place in the file like everything else.
    raw = chain[depth].format == "raw"
    row = _row(start, length, flags, depth, present=raw)
    if raw:
        row["offset"] = start
    return row


async def _runs(disk: Disk, start: int, length: int) -> AsyncIterator[tuple[int, Run]]:
    at, end = start, start + length
    step = RUNS_STEP
    while at < end:
        runs = await disk.runs(at, min(step, end - at))
        step = step * 2 if len(runs) == 1 else RUNS_STEP
        for run in runs:
            clipped = run._replace(length=min(run.length, end - at))
            yield at, clipped
            at += clipped.length


def _row(
    start: int, length: int, flags: int, depth: int | None, *, present: bool
) -> dict[str, Any]:
    return {
        "start": start,
        "length": length,
        "depth": depth or 0,
        "present": present,
        "zero": bool(flags & 2),
        "data": flags == DATA,
        "type": flags,
        "description": state(ALLOCATION, flags),
    }


def _goes_on(before: dict[str, Any], row: dict[str, Any]) -> bool:
    same = all(before[key] == row[key] for key in ("depth", "present", "zero", "data", "type"))
    if not same or ("offset" in before) != ("offset" in row):
        return False
    return "offset" not in row or before["offset"] + before["length"] == row["offset"]
