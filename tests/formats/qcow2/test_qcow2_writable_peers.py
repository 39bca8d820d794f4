"""Writable qcow2 images among other programs: locks, bitmaps, features we do not write."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.checked import check
from tests.formats.qcow2.peer import converted, create, qemu_img, qemu_io

MIB = 1 << 20
CLUSTER = 65536
DATA = Image("data", MIB, ((0, 300_000), (500_000, 200_000)))


async def opened(path: Path, workers: Workers) -> Disk:
    return await open_image(str(path), "qcow2", Opening(workers, writable=True))


def view(data: bytes) -> memoryview:
    return memoryview(data)


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
