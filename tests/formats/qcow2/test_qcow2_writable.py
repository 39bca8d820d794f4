"""Writing to qcow2 images: against a model, beside other programs, through failures."""

import asyncio
import errno
import itertools
import json
import os
import random
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import FileRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.qcow2 import writable_base
from nbdsrv.formats.qcow2.writable import WritableQcow2
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.formats.images import Image
from tests.formats.qcow2.checked import check, leaks
from tests.formats.qcow2.peer import converted, create, qemu_img, qemu_io, read_by_qemu
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


# --- what stays --------------------------------------------------------------------------------


async def test_closing_without_a_flush_keeps_what_was_written(
    tmp_path: Path, workers: Workers
) -> None:
    path = create(tmp_path / "disk.qcow2", "1M")
    disk = await opened(path, workers)
    await disk.write(100_000, view(b"here"))
    await disk.close()
    check(path)
    assert read_by_qemu(path)[100_000:100_004] == b"here"


async def test_opening_alone_changes_nothing(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, DATA)
    qemu_img("bitmap", "--add", path, "b0")
    before = path.read_bytes()
    disk = await opened(path, workers)
    assert await content(disk, 0, MIB) == golden
    await disk.flush()
    await disk.close()
    assert path.read_bytes() == before


async def test_clusters_used_before_show_nothing_of_it(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, Image("secret", MIB, ((0, MIB),)))
    qemu_io(path, "discard 0 1M")  # refcounts are zero now, the bytes are still there
    disk = await opened(path, workers)
    size = path.stat().st_size
    golden = bytearray(MIB)
    for offset in range(5000, MIB, 3 * CLUSTER):
        await disk.write(offset, view(b"new"))
        golden[offset : offset + 3] = b"new"
    assert await content(disk, 0, MIB) == bytes(golden)
    await disk.close()
    assert path.stat().st_size == size
    check(path)
    assert read_by_qemu(path) == bytes(golden)


async def test_space_given_up_is_used_again(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writable_base, "QUARANTINE_S", 0.0)
    path, golden = converted(tmp_path, Image("full", MIB, ((0, MIB),)))
    disk = await opened(path, workers)
    size = path.stat().st_size
    for _ in range(3):
        await disk.trim(0, MIB)
        await disk.flush()
        assert path.stat().st_blocks * 512 < MIB // 2
        await disk.write(0, view(golden))
        await disk.flush()
    assert path.stat().st_size == size
    await disk.close()
    check(path)


async def test_space_given_up_is_left_alone_for_a_while(tmp_path: Path, workers: Workers) -> None:
    """Whoever located a cluster before it was given up may still be reading there."""
    path, golden = converted(tmp_path, Image("full", MIB, ((0, MIB),)))
    disk = await opened(path, workers)
    (run,) = await disk.runs(0, MIB)
    assert isinstance(run, FileRun)
    await disk.trim(0, MIB)
    await disk.flush()
    await disk.write(0, view(b"\xee" * MIB))
    await disk.flush()
    assert os.pread(run.fd, MIB, run.position) == golden
    await disk.close()
    check(path)


async def test_trimming_a_child_never_shows_its_parent(tmp_path: Path, workers: Workers) -> None:
    DATA.make(str(tmp_path / "base.raw"))
    for version in ("0.10", "1.1"):
        path = tmp_path / f"{version}.qcow2"
        create(path, "1M", "-b", "base.raw", "-F", "raw", "-o", f"compat={version}")
        disk = await opened(path, workers)
        await disk.write(0, view(b"\xee" * 4 * CLUSTER))
        await disk.trim(0, 2 * CLUSTER)
        found = await content(disk, 0, 4 * CLUSTER)
        assert set(found[: 2 * CLUSTER]) in ({0}, {0xEE})
        assert set(found[2 * CLUSTER :]) == {0xEE}
        await disk.close()
        check(path)


async def test_a_snapshot_keeps_its_content(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, DATA)
    qemu_img("snapshot", "-c", "before", path)
    disk = await opened(path, workers)
    assert disk.place(0, 512) is None
    await disk.write(1000, view(b"changed"))
    await disk.zero(CLUSTER, 3 * CLUSTER, punch=False, fast=True)
    await disk.trim(500_000, 200_000)
    await disk.flush()
    await disk.close()
    check(path)
    assert read_by_qemu(path, "qcow2", "-l", "before") == golden
    qemu_img("snapshot", "-d", "before", path)
    check(path)


async def test_sixteen_tebibytes(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "16T")
    begun = time.monotonic()
    disk = await opened(path, workers)
    await disk.write((16 << 40) - 3, view(b"end"))
    await disk.trim(0, 16 << 40)
    await disk.write(9 << 40, view(b"middle"))
    await disk.zero(1 << 40, 12 << 40, punch=True, fast=True)
    assert await content(disk, 9 << 40, 6) == bytes(6)
    await disk.close()
    assert time.monotonic() - begun < 5
    check(path)


# --- place -------------------------------------------------------------------------------------


async def test_place_is_for_durable_clusters_of_our_own(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "1M")
    disk = await opened(path, workers)
    await disk.write(0, view(b"x" * 3 * CLUSTER))
    # With FUA, a placed write is durable when its data is: the entries must have been before.
    assert disk.place(0, 512) is None
    await disk.flush()
    run = disk.place(1000, 512)
    assert run is not None
    assert run.length == 3 * CLUSTER - 1000
    os.pwrite(run.fd, b"placed", run.position)
    assert await content(disk, 1000, 6) == b"placed"
    assert disk.place(3 * CLUSTER - 1, 2) is None
    await disk.write(3 * CLUSTER, view(b"y"))
    assert disk.place(3 * CLUSTER, 1) is None
    assert disk.place(0, 512) == run._replace(length=3 * CLUSTER, position=run.position - 1000)
    await disk.zero(CLUSTER, CLUSTER, punch=False, fast=False)
    assert disk.place(CLUSTER, 512) is None
    await disk.close()
    assert disk.place(0, 512) is None


async def test_nothing_is_placed_before_bitmaps_are_marked(
    tmp_path: Path, workers: Workers
) -> None:
    path, _ = converted(tmp_path, DATA)
    qemu_img("bitmap", "--add", path, "b0")
    disk = await opened(path, workers)
    await content(disk, 0, 10)
    assert disk.place(0, 512) is None
    await disk.write(0, view(b"x"))
    assert disk.place(0, 512) is not None
    await disk.close()


# --- abilities ---------------------------------------------------------------------------------


async def test_fast_zero_is_refused_where_it_would_be_slow(
    tmp_path: Path, workers: Workers
) -> None:
    golden = DATA.make(str(tmp_path / "base.raw"))
    base = ("-b", "base.raw", "-F", "raw")
    old = create(tmp_path / "old.qcow2", "1M", *base, "-o", "compat=0.10")
    new = create(tmp_path / "new.qcow2", "1M", *base)
    disk = await opened(old, workers)
    assert Ability.FAST_ZERO not in disk.abilities
    with pytest.raises(DiskError) as raised:
        await disk.zero(0, MIB, punch=True, fast=True)
    assert raised.value.errno == errno.EOPNOTSUPP
    assert await content(disk, 0, MIB) == golden
    await disk.close()
    disk = await opened(new, workers)
    with pytest.raises(DiskError) as raised:
        await disk.zero(10, CLUSTER, punch=True, fast=True)
    assert raised.value.errno == errno.EOPNOTSUPP
    await disk.zero(0, MIB, punch=True, fast=True)
    assert await content(disk, 0, MIB) == bytes(MIB)
    await disk.close()
    check(new)
    assert new.stat().st_size < MIB


# --- other programs ----------------------------------------------------------------------------


async def test_qemu_keeps_out_of_an_image_we_write(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "1M")
    disk = await opened(path, workers)
    done = subprocess.run(
        ["qemu-io", "-c", "write 0 512", str(path)], capture_output=True, check=False, timeout=20
    )
    assert done.returncode
    assert b"lock" in done.stderr
    with pytest.raises(DiskError) as raised:
        await opened(path, workers)
    assert raised.value.errno == errno.EBUSY
    reader = await open_image(str(path), "qcow2", Opening(workers))
    await reader.close()
    await disk.close()
    qemu_io(path, "write 0 512")


async def test_we_keep_out_of_an_image_qemu_writes(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "1M")
    with subprocess.Popen(
        ["qemu-io", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write(b"length\n")
        qemu.stdin.flush()
        assert qemu.stdout.readline()  # it has opened the image
        with pytest.raises(DiskError, match="another program has it open") as raised:
            await opened(path, workers)
        assert raised.value.errno == errno.EBUSY
        qemu.stdin.close()
        qemu.wait(20)
    disk = await opened(path, workers)
    await disk.close()


async def test_bitmaps_become_inconsistent_with_the_first_change(
    tmp_path: Path, workers: Workers
) -> None:
    path, _ = converted(tmp_path, DATA)
    for name in ("b0", "a longer name"):
        qemu_img("bitmap", "--add", path, name)
    disk = await opened(path, workers)
    assert not [context for context in disk.contexts if "bitmap" in context]
    await disk.write(0, view(b"x"))
    await disk.close()
    check(path)
    info = json.loads(qemu_img("info", "--output=json", path))
    bitmaps = info["format-specific"]["data"]["bitmaps"]
    assert [bitmap["flags"] for bitmap in bitmaps] == [["in-use", "auto"]] * 2
    qemu_img("bitmap", "--remove", path, "b0")
    check(path)


async def test_unknown_autoclear_features_are_cleared(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, DATA)
    with path.open("r+b") as file:
        file.seek(88)
        file.write((1 << 40).to_bytes(8, "big"))
    disk = await opened(path, workers)
    await disk.trim(0, CLUSTER)
    assert path.read_bytes()[88:96] == bytes(8)
    await disk.close()
    check(path)


@pytest.mark.parametrize("bit", [0, 1], ids=["dirty", "corrupt"])
async def test_broken_images_are_repaired_first(bit: int, tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, DATA)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(bytes([1 << bit]))
    with pytest.raises(UnsupportedImage, match="qemu-img check -r all") as raised:
        await opened(path, workers)
    assert str(path) in str(raised.value)
    reader = await open_image(str(path), "qcow2", Opening(workers))
    assert await content(reader, 0, MIB) == golden
    await reader.close()


@pytest.mark.parametrize(
    "options", ["extended_l2=on", "data_file=data.raw", "data_file=data.raw,data_file_raw=on"]
)
async def test_images_that_are_only_read(options: str, tmp_path: Path, workers: Workers) -> None:
    options = options.replace("data.raw", str(tmp_path / "data.raw"))
    path = create(tmp_path / "disk.qcow2", "1M", "-o", options)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UnsupportedImage, match="served read-only"):
        await opened(path, workers)
    assert os.listdir("/proc/self/fd") == before


async def test_snapshots_are_only_read(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, DATA)
    qemu_img("snapshot", "-c", "before", path)
    with pytest.raises(UnsupportedImage, match="snapshots are served read-only"):
        await open_image(str(path), "qcow2", Opening(workers, writable=True, snapshot="before"))


# --- broken images -----------------------------------------------------------------------------


def word_at(path: Path, position: int) -> int:
    return int.from_bytes(path.read_bytes()[position : position + 8], "big")


def set_word(path: Path, position: int, word: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(word.to_bytes(8, "big"))


def l2_position(path: Path) -> int:
    """Of the first L2 table."""
    return word_at(path, word_at(path, 40)) & ((1 << 56) - (1 << 9))


@pytest.mark.parametrize(
    "where",
    ["header", "l1", "l2", "refcounts", "block", "outside", "odd", "packed l1", "packed header"],
)
async def test_an_entry_that_points_at_a_table_is_not_followed(
    where: str, tmp_path: Path, workers: Workers
) -> None:
    path, golden = converted(tmp_path, DATA)
    table = l2_position(path)
    refcounts = word_at(path, 48)
    target = {
        "header": CLUSTER * 0,
        "l1": word_at(path, 40),
        "l2": table,
        "refcounts": refcounts,
        "block": word_at(path, refcounts),
        "outside": 1 << 40,
        "odd": 5 * CLUSTER + 512,
    }[where.removeprefix("packed ")]
    set_word(path, table, target + 100 | 1 << 62 if "packed" in where else target | 1 << 63)
    before = path.read_bytes()
    disk = await opened(path, workers)
    changes = (
        disk.write(0, view(b"evil")),
        disk.write(0, view(b"evil" * CLUSTER)),
        disk.trim(0, MIB),
        disk.zero(0, MIB, punch=True, fast=True),
    )
    for change in changes:
        with pytest.raises(CorruptImage, match=f"{path} at"):
            await change
    assert disk.place(0, 512) is None
    assert await content(disk, CLUSTER, CLUSTER) == golden[CLUSTER : 2 * CLUSTER]
    await disk.close()
    assert path.read_bytes() == before


async def test_an_l1_table_that_names_a_table_twice(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "1G")
    qemu_io(path, "write 0 512")
    l1 = word_at(path, 40)
    set_word(path, l1 + 8, word_at(path, l1))
    with pytest.raises(CorruptImage, match="where another one lies"):
        await opened(path, workers)


@pytest.mark.parametrize("target", [0, CLUSTER + 512, 1 << 40, (1 << 63) + CLUSTER])
async def test_a_refcount_table_that_makes_no_sense(
    target: int, tmp_path: Path, workers: Workers
) -> None:
    path, _ = converted(tmp_path, DATA)
    set_word(path, word_at(path, 48), target)
    with pytest.raises(CorruptImage, match=f"{path} at"):
        await opened(path, workers)


async def test_a_table_that_refcounts_call_free_is_not_given_away(
    tmp_path: Path, workers: Workers
) -> None:
    path, golden = converted(tmp_path, DATA)
    block = word_at(path, word_at(path, 48))
    table = l2_position(path)
    with path.open("r+b") as file:
        file.seek(block + table // CLUSTER * 2)
        file.write(bytes(2))
    disk = await opened(path, workers)
    with pytest.raises(CorruptImage, match="qemu-img check"):
        await disk.write(6 * CLUSTER, view(b"x"))
    assert await content(disk, 0, MIB) == golden
    await disk.close()


# --- failures ----------------------------------------------------------------------------------


class Failing:
    """Makes a call of ``os`` fail a number of times, for one file."""

    def __init__(self, patch: pytest.MonkeyPatch, path: Path, name: str) -> None:
        self.left = 0
        self.number = errno.EIO
        real = getattr(os, name)

        def call(fd: int, *args: Any) -> Any:
            if self.left and os.readlink(f"/proc/self/fd/{fd}") == str(path):
                self.left -= 1
                raise OSError(self.number, os.strerror(self.number))
            return real(fd, *args)

        patch.setattr(os, name, call)


async def test_a_full_disk_fails_the_write_and_nothing_else(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, golden = compressed(tmp_path, DATA)
    disk = await opened(path, workers)
    failing = Failing(monkeypatch, path, "pwrite")
    failing.left, failing.number = 2, errno.ENOSPC
    for _ in range(2):
        with pytest.raises(DiskError) as raised:
            await disk.write(100, view(b"x" * 200_000))
        assert raised.value.errno == errno.ENOSPC
    assert await content(disk, 0, MIB) == golden
    await disk.write(100, view(b"x" * 200_000))
    failing.left = 1
    with pytest.raises(DiskError) as raised:
        await disk.flush()
    assert raised.value.errno == errno.ENOSPC
    await disk.flush()  # the tables were still in memory
    await disk.close()
    check(path)
    assert read_by_qemu(path)[100:200_100] == b"x" * 200_000


@pytest.mark.parametrize("when", [0, 1])
async def test_after_a_failed_flush_nothing_more_is_promised(
    when: int, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, golden = converted(tmp_path, DATA)
    disk = await opened(path, workers)
    await disk.write(700_000, view(b"x" * 100_000))
    failing = Failing(monkeypatch, path, "fdatasync")
    if when:
        await disk.flush()
        await disk.write(850_000, view(b"x" * 100_000))
    failing.left = 1
    with pytest.raises(DiskError) as raised:
        await disk.flush()
    assert raised.value.errno == errno.EIO
    for _ in range(2):
        with pytest.raises(DiskError, match="open the image anew"):
            await disk.flush()
    with pytest.raises(DiskError, match="open the image anew"):
        await disk.write(0, view(b"y"))
    assert disk.place(0, 512) is None
    await disk.close()
    leaks(path)
    assert read_by_qemu(path)[:700_000] == golden[:700_000]
    disk = await opened(path, workers)
    await disk.write(0, view(b"y"))
    await disk.flush()
    await disk.close()


async def test_a_backing_file_that_cannot_be_read_fails_the_write(
    tmp_path: Path, workers: Workers
) -> None:
    DATA.make(str(tmp_path / "base.raw"))
    path = create(tmp_path / "disk.qcow2", "1M", "-b", "base.raw", "-F", "raw")
    disk = await opened(path, workers)
    os.truncate(tmp_path / "base.raw", 10)
    with pytest.raises(DiskError, match="truncated"):
        await disk.write(100_000, view(b"x"))
    await disk.write(2 * CLUSTER, view(b"x" * CLUSTER))
    await disk.close()
    check(path)
