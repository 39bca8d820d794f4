"""Writing to qcow2 images: what stays, what is given up, where writes may be placed."""

import errno
import os
import time
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import FileRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.qcow2 import writable_base
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.checked import check
from tests.formats.qcow2.peer import converted, create, qemu_img, qemu_io, read_by_qemu

MIB = 1 << 20
CLUSTER = 65536
DATA = Image("data", MIB, ((0, 300_000), (500_000, 200_000)))


async def opened(path: Path, workers: Workers) -> Disk:
    return await open_image(str(path), "qcow2", Opening(workers, writable=True))


def view(data: bytes) -> memoryview:
    return memoryview(data)


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


async def test_place_is_for_clusters_of_our_own(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "disk.qcow2", "1M")
    disk = await opened(path, workers)
    await disk.write(0, view(b"x" * 3 * CLUSTER))
    # The entries are not durable yet, so a durable write must not be placed.
    assert Ability.DIRECT_FUA not in disk.abilities
    run = disk.place(1000, 512)
    assert run is not None
    assert run.length == 3 * CLUSTER - 1000
    os.pwrite(run.fd, b"placed", run.position)
    assert await content(disk, 1000, 6) == b"placed"
    assert disk.place(3 * CLUSTER - 1, 2) is None
    await disk.write(3 * CLUSTER, view(b"y"))
    assert disk.place(0, 512) == run._replace(length=4 * CLUSTER, position=run.position - 1000)
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


async def test_bitmaps_that_the_refcounts_call_free_are_not_written_over(
    tmp_path: Path, workers: Workers
) -> None:
    """Found by fuzzing: the directory's cluster was given away."""
    path = create(tmp_path / "disk.qcow2", "4M")
    qemu_img("bitmap", "--add", path, "b0")
    data = bytearray(path.read_bytes())
    extension = data.index(bytes.fromhex("23852875"), 72, 4096)
    directory = int.from_bytes(data[extension + 24 : extension + 32], "big")
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    count = block + directory // CLUSTER * 2
    assert data[count : count + 2] == b"\0\1"
    data[count : count + 2] = b"\0\0"
    path.write_bytes(data)
    kept = data[directory : directory + 32]
    disk = await opened(path, workers)
    for offset in range(0, 4 * MIB, CLUSTER):
        try:
            await disk.write(offset, view(b"x" * CLUSTER))
        except DiskError as error:
            assert "repair the image" in str(error)  # noqa: PT017
    await disk.close()
    after = path.read_bytes()[directory : directory + 32]
    assert after[:12] + after[16:] == kept[:12] + kept[16:]  # but for the flags
    again = await open_image(str(path), "qcow2", Opening(workers))
    await again.close()


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
