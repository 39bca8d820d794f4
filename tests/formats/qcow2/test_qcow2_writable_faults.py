"""Writing to broken qcow2 images, and to sound ones on disks that fail."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.opening import Opening, open_image
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.checked import check, leaks
from tests.formats.qcow2.peer import converted, create, qemu_io, read_by_qemu
from tests.formats.qcow2.texts import compressed

MIB = 1 << 20
CLUSTER = 65536
DATA = Image("data", MIB, ((0, 300_000), (500_000, 200_000)))


async def opened(path: Path, workers: Workers) -> Disk:
    return await open_image(str(path), "qcow2", Opening(workers, writable=True))


def view(data: bytes) -> memoryview:
    return memoryview(data)


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
