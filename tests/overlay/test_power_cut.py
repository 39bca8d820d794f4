"""No power cut loses what was flushed, and what was not never harms anything else.

After each replay the overlay is opened as a server would, and every byte of the disk must be what
was flushed last or what has been written since; every block that is not as in the base must be in
the dirty bitmap; and the overlay must take writes and flushes again.
"""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.overlay import map_file
from nbdsrv.overlay.overlay import Overlay
from protocol.extents import ExtentList
from tests.disk.reading import content
from tests.overlay.bases import make_base, opener
from tests.overlay.power_cut import Killed, RecordingFiles, Unsynced, leave

BLOCK = 4096
SIZE = 72 * BLOCK + 1500
DIRTY = "qemu:dirty-bitmap:overlay"


@dataclass
class Change:
    """One request: when it began and ended, in operations recorded; and what it writes."""

    began: int
    ended: int
    offset: int
    data: bytes


class Story:
    """What was asked of an overlay while its operations were recorded."""

    def __init__(self, disk: Overlay, files: RecordingFiles, base: bytes, seed: int) -> None:
        self.disk = disk
        self.files = files
        self.base = base
        self.chance = random.Random(seed)
        self.changes: list[Change] = []
        self.flushes: list[tuple[int, int]] = []

    async def tell(self, steps: int) -> None:
        for _ in range(steps):
            kind = self.chance.random()
            if kind < 0.2:
                await self._flush()
            elif kind < 0.3:
                await self._adopt()
            elif kind < 0.45:  # several at once, which may meet in a block but not in a byte
                start = self.chance.randrange(0, SIZE - 4 * 3000)
                parts = [(start + n * 3000, self.chance.randint(1, 3000)) for n in range(4)]
                await _together(*(self._change(*part) for part in parts))
            else:
                offset = self.chance.randrange(SIZE)
                if self.chance.random() < 0.5:
                    offset &= ~(BLOCK - 1)
                length = self.chance.choice((512, BLOCK, 2 * BLOCK, self.chance.randint(1, 20000)))
                await self._change(offset, min(length, SIZE - offset))

    async def _flush(self) -> None:
        began = len(self.files.log)
        await self.disk.flush()
        self.flushes.append((began, len(self.files.log)))

    async def _adopt(self) -> None:
        first = self.chance.randrange(SIZE // BLOCK)
        offset = first * BLOCK
        data = self.base[offset : offset + self.chance.randint(1, 12) * BLOCK]
        await self.disk.adopt(offset, memoryview(data))

    async def _change(self, offset: int, length: int) -> None:
        kind = self.chance.random()
        data = self.chance.randbytes(length)
        change = Change(len(self.files.log), 1 << 60, offset, data)
        if kind < 0.25:
            change.data = bytes(length)
            self.changes.append(change)
            await self.disk.zero(offset, length, punch=kind < 0.2, fast=False)
        elif kind < 0.4:
            whole = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
            if offset + length == SIZE:
                whole = whole[0], SIZE
            change.offset = whole[0]
            change.data = bytes(max(whole[1] - whole[0], 0))
            self.changes.append(change)
            await self.disk.trim(offset, length)
        elif (run := self.disk.place(offset, length)) is not None:
            self.changes.append(change)
            part = data[: run.length]
            change.data = part
            self.files.write(run.fd, [part], run.position)
        else:
            self.changes.append(change)
            await self.disk.write(offset, memoryview(data))
        change.ended = len(self.files.log)

    def answered(self) -> tuple[bytes, list[Change]]:
        """What must be there although the server was killed, and what may be."""
        certain = bytearray(self.base)
        for change in self.changes:
            if change.ended < 1 << 60:
                certain[change.offset : change.offset + len(change.data)] = change.data
        return bytes(certain), [change for change in self.changes if change.ended == 1 << 60]

    def allowed(self, cut: int) -> tuple[bytes, list[Change]]:
        """What is certain, and what may be there instead."""
        certain = bytearray(self.base)
        flushed = max((began for began, ended in self.flushes if ended <= cut), default=-1)
        open_ = []
        for change in self.changes:
            if change.ended <= flushed:
                certain[change.offset : change.offset + len(change.data)] = change.data
            elif change.began <= cut:
                open_.append(change)
        return bytes(certain), open_


async def _together(*work: Coroutine[None, None, None]) -> None:
    for error in await asyncio.gather(*work, return_exceptions=True):
        if error is not None:
            raise error


def check_content(found: bytes, certain: bytes, open_: list[Change], what: str) -> None:
    if found == certain:
        return
    for at in range(0, SIZE, 512):
        end = min(at + 512, SIZE)
        if found[at:end] == certain[at:end]:
            continue
        touching = [c for c in open_ if c.offset < end and at < c.offset + len(c.data)]
        for byte in range(at, end):
            values = {certain[byte]}
            values |= {
                c.data[byte - c.offset]
                for c in touching
                if c.offset <= byte < c.offset + len(c.data)
            }
            assert found[byte] in values, f"{what}: byte {byte} of block {byte // BLOCK}"


async def dirty_blocks(disk: Overlay) -> set[int]:
    found: ExtentList = await disk.status(DIRTY, 0, SIZE)
    assert found.end == SIZE
    return {
        block
        for offset, length, flags in found.ranges()
        if flags
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }


@pytest.mark.parametrize("seed", range(6))
async def test_any_power_cut(
    tmp_path: Path, workers: Workers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # a new map with nearly every flush
        monkeypatch.setattr(map_file, "MIN_JOURNAL", 200)
    base = make_base(tmp_path / "base", SIZE, seed=seed)
    files = RecordingFiles()
    disk = await opener(workers, tmp_path / "base", tmp_path / "live", files=files)()
    story = Story(disk, files, base, seed)
    await story.tell(70)
    if seed > 2:
        await disk.close()
    chance = random.Random(seed)
    log = files.log
    assert len(log) > 100
    cuts = range(len(log) + 1)
    for number, cut in enumerate(cuts):
        place = tmp_path / f"cut{number}"
        leave(log, cut, chance, place / "disk")
        await check_left(tmp_path / "base", place, workers, story, cut)
    if seed <= 2:
        await disk.close()
    assert (tmp_path / "base").read_bytes() == base


@pytest.mark.parametrize("seed", range(2))
async def test_a_power_cut_behind_the_back_of_a_server_that_was_killed(
    tmp_path: Path, workers: Workers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had written and not synced is what the next one builds upon, and must be durable."""
    if seed % 2:
        monkeypatch.setattr(map_file, "MIN_JOURNAL", 200)
    base = make_base(tmp_path / "base", SIZE, seed=seed)
    chance = random.Random(seed)
    for killed_at in (*range(3, 18), *chance.sample(range(18, 90), 5)):
        live = tmp_path / f"killed{killed_at}"
        files = RecordingFiles(killed_at=killed_at)
        open_ = opener(workers, tmp_path / "base", live, files=files)
        story = Story(await open_(), files, base, seed)
        with pytest.raises(Killed):
            await story.tell(100)
        await _let_go(story.disk)
        files.killed_at = None
        story.disk = await open_()
        check_content(await content(story.disk, 0, SIZE), *story.answered(), "killed")
        await story.tell(6)
        await story.disk.flush()
        story.flushes.append((len(files.log), len(files.log)))
        await story.disk.write(0, memoryview(b"not flushed"))
        story.changes.append(Change(story.flushes[-1][0], 1 << 60, 0, b"not flushed"))
        for cut in sorted(chance.sample(range(killed_at, len(files.log) + 1), 8)):
            place = tmp_path / f"killed{killed_at}cut{cut}"
            leave(files.log, cut, chance, place / "disk")
            await check_left(tmp_path / "base", place, workers, story, cut)
        await story.disk.close()


async def _let_go(disk: Overlay) -> None:
    """As the kernel does for a process that is killed."""
    opened = disk._opened
    opened.made = True
    opened.close()
    await disk.base.close()


async def check_left(base: Path, place: Path, workers: Workers, story: Story, cut: int) -> None:
    what = f"cut after {cut} operations"
    certain, open_ = story.allowed(cut)
    left = await opener(workers, base, place, files=Unsynced())()
    try:
        found = await content(left, 0, SIZE)
        check_content(found, certain, open_, what)
        dirty = await dirty_blocks(left)
        for block in range(-(-SIZE // BLOCK)):
            same = (
                found[block * BLOCK : (block + 1) * BLOCK]
                == story.base[block * BLOCK : (block + 1) * BLOCK]
            )
            assert same or block in dirty, f"{what}: block {block} has changed and is not dirty"
        if cut % 5 == 0:
            await left.write(cut % 1000, memoryview(b"again" * 900))
            await left.flush()
            found = await content(left, 0, SIZE)
    finally:
        await left.close()
    if cut % 5 == 0:
        again = await opener(workers, base, place, files=Unsynced())()
        try:
            assert await content(again, 0, SIZE) == found, what
        finally:
            await again.close()
