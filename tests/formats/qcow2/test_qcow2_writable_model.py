"""Writing to qcow2 images at random, beside a model; many at once, cancelled, beside reads."""

import asyncio
import itertools
import random
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.qcow2 import writable_base
from nbdsrv.formats.qcow2.writable import WritableQcow2
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.formats.images import Image
from tests.formats.qcow2.checked import check
from tests.formats.qcow2.peer import converted, create, qemu_img, read_by_qemu
from tests.formats.qcow2.texts import compressed

MIB = 1 << 20
CLUSTER = 65536
DATA = Image("data", MIB, ((0, 300_000), (500_000, 200_000)))


async def opened(path: Path, workers: Workers) -> Disk:
    return await open_image(str(path), "qcow2", Opening(workers, writable=True))


def view(data: bytes) -> memoryview:
    return memoryview(data)


# --- against a model ---------------------------------------------------------------------------

SMALL = 40_000
OFFSETS = st.integers(0, SMALL - 1)
LENGTHS = st.one_of(st.integers(1, 600), st.integers(1, SMALL))
CHANGES = st.tuples(
    st.sampled_from(["write", "write", "zero", "keep", "trim", "flush", "reopen"]), OFFSETS, LENGTHS
)
KINDS = {
    "plain": [],
    "version 2": ["-o", "compat=0.10"],
    "compressed": [],
    "snapshot": [],
    "chain": [],
    "chain of version 2": ["-o", "compat=0.10"],
}


def made(directory: Path, kind: str) -> tuple[Path, bytes]:
    image = Image(kind, SMALL - SMALL % 512, ((0, 9000), (15_000, 3000), (30_000, 9000)))
    options = ["-o", "cluster_size=1024", *KINDS[kind]]
    if kind == "compressed":
        return compressed(directory, image, *options)
    if "chain" not in kind:
        path, golden = converted(directory, image, *options)
        if kind == "snapshot":
            qemu_img("snapshot", "-c", "before", path)
        return path, golden
    golden = image.make(str(directory / "base.raw"))
    base = ("-b", "base.raw", "-F", "raw")
    path = create(directory / "disk.qcow2", str(len(golden)), *options, *base)
    return path, golden


async def _change(path: Path, golden: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    chance = random.Random(len(changes))
    model = bytearray(golden)
    async with running_workers() as workers:
        disk = await opened(path, workers)
        for kind, start, wanted in changes:
            offset = min(start, len(model) - 1)
            length = min(wanted, len(model) - offset)
            if kind == "write":
                data = chance.randbytes(length)
                await disk.write(offset, view(data))
                model[offset : offset + length] = data
            elif kind in {"zero", "keep"}:
                await disk.zero(offset, length, punch=kind == "zero", fast=False)
                model[offset : offset + length] = bytes(length)
            elif kind == "trim":
                await disk.trim(offset, length)
                found = await content(disk, offset, length)
                for new, old in zip(found, model[offset : offset + length], strict=True):
                    assert new in {0, old}
                model[offset : offset + length] = found
            elif kind == "flush":
                await disk.flush()
            else:
                await disk.close()
                disk = await opened(path, workers)
            assert await content(disk, 0, len(model)) == bytes(model)
        await disk.close()
    return bytes(model)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(changes=st.lists(CHANGES, min_size=1, max_size=12))
def test_random_changes(kind: str, changes: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writable_base, "QUARANTINE_S", 0.0)
        path, golden = made(Path(name), kind)
        model = asyncio.run(_change(path, golden, changes))
        check(path)
        assert read_by_qemu(path) == model
        if kind == "snapshot":
            assert read_by_qemu(path, "qcow2", "-l", "before") == golden


async def test_many_at_once(tmp_path: Path, workers: Workers) -> None:
    """Neighbours share clusters; every one of them must find the others' bytes kept."""
    path, golden = compressed(tmp_path, DATA)
    model = bytearray(golden)
    disk = await opened(path, workers)
    chance = random.Random(4)
    edges = sorted(chance.sample(range(MIB), 400))

    async def change(start: int, end: int) -> None:
        if chance.random() < 0.2:
            model[start:end] = bytes(end - start)
            await disk.zero(start, end - start, punch=True, fast=False)
        else:
            data = chance.randbytes(end - start)
            model[start:end] = data
            await disk.write(start, view(data))

    async def flush() -> None:
        for _ in range(10):
            await disk.flush()

    pairs = list(itertools.pairwise(edges))
    chance.shuffle(pairs)
    await asyncio.gather(flush(), *(change(*pair) for pair in pairs))
    assert await content(disk, 0, MIB) == bytes(model)
    await disk.close()
    check(path)
    assert read_by_qemu(path) == bytes(model)


async def test_reading_beside_writing(tmp_path: Path, workers: Workers) -> None:
    """Half of the disk is written to while the other half must read as it is."""
    path, golden = converted(tmp_path, DATA, "-o", "cluster_size=512")
    disk = await opened(path, workers)
    chance = random.Random(5)
    left = 300

    async def read() -> None:
        while left:
            offset = chance.randrange(MIB // 2)
            length = min(chance.randrange(1, 20_000), MIB // 2 - offset)
            assert await content(disk, offset, length) == golden[offset : offset + length]

    async def write() -> None:
        nonlocal left
        while left:
            left -= 1
            offset = MIB // 2 + chance.randrange(MIB // 2 - 5000)
            data = chance.randbytes(chance.randrange(1, 5000))
            await disk.write(offset, view(data))
            assert await content(disk, offset, len(data)) == data

    await asyncio.gather(read(), read(), write())
    await disk.close()
    check(path)


async def test_a_change_made_while_the_tables_are_read(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, golden = converted(tmp_path, DATA)
    disk = await opened(path, workers)
    assert isinstance(disk, WritableQcow2)
    read, reading, changed = disk._read_metadata, threading.Event(), threading.Event()

    def slowly(position: int, length: int, what: str) -> bytes:
        found = read(position, length, what)
        if what == "an L2 table":
            reading.set()
            assert changed.wait(10)
        return found

    monkeypatch.setattr(disk, "_read_metadata", slowly)
    loading = asyncio.create_task(disk.load(0, 512))
    assert await workers.run(reading.wait, 10)
    await disk.write(12 * CLUSTER, view(b"x" * 2 * CLUSTER))
    await disk.trim(0, CLUSTER)
    changed.set()
    await loading
    model = bytearray(golden)
    model[:CLUSTER] = bytes(CLUSTER)
    model[12 * CLUSTER : 14 * CLUSTER] = b"x" * 2 * CLUSTER
    assert await content(disk, 0, MIB) == bytes(model)
    await disk.close()


async def test_what_is_written_at_once_lies_together(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "64M")
    disk = await opened(path, workers)
    offsets = range(0, 64 * MIB, CLUSTER)
    data = view(b"x" * CLUSTER)
    await asyncio.gather(*(disk.write(offset, data) for offset in offsets))
    await disk.flush()
    run = disk.place(0, 64 * MIB)
    assert run is not None
    assert run.length == 64 * MIB
    await disk.close()
    check(path)


async def test_cancelled_changes_leave_a_sound_image(tmp_path: Path, workers: Workers) -> None:
    path, golden = compressed(tmp_path, DATA, "-o", "cluster_size=4096")
    disk = await opened(path, workers)
    chance = random.Random(6)
    new = chance.randbytes(MIB)
    for patience in range(60):
        offset = chance.randrange(MIB - 50_000)
        length = chance.randrange(1, 50_000)
        write = disk.write(offset, view(new[offset : offset + length]))
        task = asyncio.ensure_future(write)
        for _ in range(patience % 9 + 1):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        task = asyncio.ensure_future(disk.flush())
        for _ in range(patience % 4 + 1):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    found = await content(disk, 0, MIB)
    assert all(byte in pair for byte, *pair in zip(found, golden, new, strict=True))
    await disk.close()
    check(path)
    assert read_by_qemu(path) == found
