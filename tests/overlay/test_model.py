"""Random requests, reopening included, against a bytearray that undergoes the same."""

import asyncio
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.overlay.overlay import Overlay
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.overlay.bases import Remote, make_base, opener

BLOCK = 4096
SIZE = 37 * BLOCK + 777
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "place", "whole", "zero", "trim", "adopt"]),
        st.integers(0, SIZE - 1),
        st.integers(1, 5 * BLOCK),
        st.booleans(),
        st.sampled_from(["", "", "", "flush", "reopen"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, remote=st.booleans())
def test_any_requests(steps: list[tuple[str, int, int, bool, str]], *, remote: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_run(Path(directory), steps, remote=remote))


async def _run(
    directory: Path, steps: list[tuple[str, int, int, bool, str]], *, remote: bool
) -> None:
    base = make_base(directory / "base", SIZE)
    model, asked = bytearray(base), set[int]()
    async with running_workers(4) as workers:
        open_ = opener(
            workers, directory / "base", directory / "ov", wrap=Remote if remote else None
        )
        disk = await open_()
        for number, (kind, at, long, aligned, then) in enumerate(steps):
            offset = at // BLOCK * BLOCK if aligned else at
            length = min(-(-long // BLOCK) * BLOCK if aligned else long, SIZE - offset)
            await _step(disk, model, base, kind, offset, length, number)
            if kind != "adopt":
                asked.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
            assert await content(disk, 0, SIZE) == bytes(model)
            if then == "flush":
                await disk.flush()
            elif then == "reopen":
                await disk.close()
                disk = await open_()
                assert await content(disk, 0, SIZE) == bytes(model)
        told = await _dirty(disk)
        await disk.close()
    changed = {
        block
        for block in range(-(-SIZE // BLOCK))
        if model[block * BLOCK : (block + 1) * BLOCK] != base[block * BLOCK : (block + 1) * BLOCK]
    }
    assert changed <= told <= asked
    assert (directory / "base").read_bytes() == base


async def _dirty(disk: Overlay) -> set[int]:
    found = await disk.status("qemu:dirty-bitmap:overlay", 0, SIZE)
    assert found.end == SIZE
    return {
        block
        for at, length, flags in found.ranges()
        if flags
        for block in range(at // BLOCK, -(-(at + length) // BLOCK))
    }


async def _step(
    disk: Overlay,
    model: bytearray,
    base: bytes,
    kind: str,
    offset: int,
    length: int,
    number: int,
) -> None:
    data = bytes([number % 255 + 1]) * length
    first, end = -(-offset // BLOCK), (offset + length) // BLOCK
    if offset + length == SIZE:
        end = -(-SIZE // BLOCK)
    if kind == "adopt":
        start = offset // BLOCK * BLOCK
        stop = min(-(-(offset + length) // BLOCK) * BLOCK, SIZE)
        await disk.adopt(start, memoryview(base[start:stop]))
        return
    if kind == "trim":
        await disk.trim(offset, length)
        if first < end:
            stop = min(end * BLOCK, SIZE)
            model[first * BLOCK : stop] = bytes(stop - first * BLOCK)
        return
    if kind == "zero":
        await disk.zero(offset, length, punch=bool(number % 2), fast=False)
        model[offset : offset + length] = bytes(length)
        return
    run = disk.place(offset, length) if kind == "place" else None
    placed = None
    if kind == "whole" and not (offset | length) % BLOCK:
        placed = disk.landing.place(offset, length)
    if run is not None:
        assert os.pwrite(run.fd, data, run.position) == length
    elif placed is not None:  # as a thread of net/writes does it
        ticket = disk.landing.begin()
        start, run = placed
        assert os.pwrite(run.fd, data, run.position + offset - start) == length
        disk.landing.stored.append((offset, length))
        disk.landing.end(ticket)
    else:
        await disk.write(offset, memoryview(data))
    model[offset : offset + length] = data
