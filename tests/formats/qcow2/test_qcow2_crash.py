"""A crash at any moment leaves an image without errors, in which all that was flushed is.

::

    random changes ──> Recording ──> crash at a random moment ──> qemu-img check: no errors
                                                             └──> qemu-img convert: every byte is
                                                                  what was flushed, or newer
"""

import asyncio
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.qcow2 import writable_base
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.checked import check, leaks
from tests.formats.qcow2.crashes import Recording
from tests.formats.qcow2.peer import qemu_img, read_by_qemu
from tests.formats.qcow2.texts import compressed

CRASHES = 400 if os.environ.get("NBDSRV_FUZZ") == "full" else 10
"""Moments tried for each kind of image."""
SIZE = 1 << 18
OLD = Image("old", SIZE, ((0, 60_000), (180_000, 30_000)))


def empty(directory: Path, *options: str) -> bytes:
    qemu_img("create", "-f", "qcow2", *options, directory / "disk.qcow2", str(SIZE))
    return bytes(SIZE)


def full(directory: Path, *options: str) -> bytes:
    golden = OLD.make(str(directory / "old.raw"))
    qemu_img("convert", "-O", "qcow2", *options, directory / "old.raw", directory / "disk.qcow2")
    return golden


def nearly_full(directory: Path, *options: str) -> bytes:
    """One cluster of refcount table counts 2 MiB of such clusters; little of that is left."""
    image = Image("nearly", 2_192_384, ((SIZE, 1_930_000),))
    golden = image.make(str(directory / "old.raw"))
    qemu_img("convert", "-O", "qcow2", *options, directory / "old.raw", directory / "disk.qcow2")
    return golden


def text(directory: Path, *options: str) -> bytes:
    return compressed(directory, OLD, *options)[1]


def chain(directory: Path, *options: str) -> bytes:
    golden = OLD.make(str(directory / "old.raw"))
    base = ("-b", "old.raw", "-F", "raw")
    qemu_img("create", "-f", "qcow2", *options, *base, directory / "disk.qcow2", str(SIZE))
    return golden


def snapshotted(directory: Path, *options: str) -> bytes:
    golden = text(directory, *options[1:]) if "-c" in options else full(directory, *options)
    qemu_img("snapshot", "-c", "before", directory / "disk.qcow2")
    return golden


KINDS = {
    "empty": (empty,),
    "growing refcount table": (nearly_full, "-o", "cluster_size=512,refcount_bits=64"),
    "small clusters": (full, "-o", "cluster_size=512"),
    "version 2": (full, "-o", "compat=0.10,cluster_size=4096"),
    "chain": (chain, "-o", "cluster_size=4096"),
    "compressed": (text, "-o", "cluster_size=4096"),
    "snapshot": (snapshotted, "-o", "cluster_size=4096"),
    "compressed snapshot": (snapshotted, "-c", "-o", "cluster_size=1024"),
}


class Workload:
    """Rounds of random changes that do not overlap within a round; every third is flushed.

    Attributes:
        versions: (moment it began, content after it), the content before all of them first.
        flushed: (moment the flush returned, number of the version it made durable).
    """

    def __init__(self, disk: Disk, recording: Recording, golden: bytes, seed: str) -> None:
        self.disk = disk
        self.recording = recording
        self.chance = random.Random(seed)
        self.model = bytearray(golden)
        self.versions = [(0, golden)]
        self.flushed = [(0, 0)]

    async def run(self, rounds: int) -> None:
        for number in range(1, rounds + 1):
            begun = self.recording.clock
            edges = sorted(self.chance.sample(range(SIZE), 8))
            pairs = list(zip(edges[::2], edges[1::2], strict=True))
            changes = [self.change(start, min(end - start, 40_000)) for start, end in pairs]
            await asyncio.gather(*changes)
            assert await content(self.disk, 0, len(self.model)) == bytes(self.model)
            self.versions.append((begun, bytes(self.model)))
            if number % 4 == 2:  # a flush that fails half-way, and is made up for by a later one
                self.recording.failing = 1 + number // 4 % 4
                with suppress(DiskError):
                    await self.disk.flush()
                self.recording.failing = 0
            if number % 3 == 0:
                await self.disk.flush()
                self.flushed.append((self.recording.clock, number))

    async def change(self, offset: int, length: int) -> None:
        kind = self.chance.choice(("write", "write", "small", "zero", "trim"))
        if kind == "zero":
            self.model[offset : offset + length] = bytes(length)
            punch = self.chance.random() < 0.5
            await self.disk.zero(offset, length, punch=punch, fast=False)
        elif kind == "trim":
            await self.disk.trim(offset, length)
            self.model[offset : offset + length] = await content(self.disk, offset, length)
        else:
            length = min(length, 3000) if kind == "small" else length
            data = self.chance.randbytes(length)
            self.model[offset : offset + length] = data
            await self.disk.write(offset, memoryview(data))

    def verify(self, found: bytes, moment: int) -> None:
        """Every byte is what the last flush before ``moment`` stored, or what came later."""
        assert len(found) == len(self.model)
        durable = max(number for when, number in self.flushed if when <= moment)
        allowed = [v for when, v in self.versions[durable + 1 :] if when <= moment]
        allowed.insert(0, self.versions[durable][1])
        for start in range(0, len(found), 512):
            piece = slice(start, start + 512)
            if all(found[piece] != version[piece] for version in allowed):
                columns = zip(*(version[piece] for version in allowed), strict=True)
                for at, (byte, column) in enumerate(zip(found[piece], columns, strict=True), start):
                    assert byte in column, f"byte {at} after a crash at {moment}"


@pytest.mark.parametrize("kind", KINDS)
async def test_crash(
    kind: str, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, *options = KINDS[kind]
    golden = make(tmp_path, *options)  # type: ignore[operator]
    path = tmp_path / "disk.qcow2"
    monkeypatch.setattr(writable_base, "QUARANTINE_S", 0.0)  # clusters are soon used again
    with monkeypatch.context() as patch:
        recording = Recording.start(path, patch)
        disk = await open_image(str(path), "qcow2", Opening(workers, writable=True))
        workload = Workload(disk, recording, golden, kind)
        await workload.run(24)
        await disk.close()
    check(path)
    assert read_by_qemu(path) == bytes(workload.model)
    if make is snapshotted:
        assert read_by_qemu(path, "qcow2", "-l", "before") == golden
    if make is nearly_full:
        assert path.read_bytes()[48:60] != recording.before[48:60], "the table has not grown"
    chance = random.Random(kind)
    crashed = tmp_path / "crashed.qcow2"
    for _ in range(CRASHES):
        moment = recording.moment(chance)
        crashed.write_bytes(recording.after(moment, chance))
        leaks(crashed)
        workload.verify(read_by_qemu(crashed), moment)
