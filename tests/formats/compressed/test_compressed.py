"""Compressed raw disks: every way a stream may be cut reads the same."""

import asyncio
import gzip
import lzma
import os
import random
import tempfile
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.compressed import gzip as gzip_source
from nbdsrv.formats.compressed import source as block_source
from nbdsrv.formats.image_file import open_image_file
from nbdsrv.formats.opening import Opening, open_file, open_image
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import OpenDisk, check_disk
from tests.disk.reading import content
from tests.formats.compressed.streams import STREAMS, Stream, disk_content, piped, zstd_frames
from tests.formats.mutants import everything

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB + 777

each_stream = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)


def opener(path: Path, workers: Workers, kind: str = "") -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(str(path), kind, Opening(workers))

    return open_disk


@each_stream
async def test_contract(tmp_path: Path, workers: Workers, stream: Stream) -> None:
    path, golden = tmp_path / "disk.img.z", disk_content(SIZE)
    path.write_bytes(stream.compress(golden))
    await check_disk(opener(path, workers, stream.kind), golden)


@each_stream
async def test_what_the_index_is_made_from(
    tmp_path: Path, workers: Workers, stream: Stream
) -> None:
    path = tmp_path / "disk.img.z"
    path.write_bytes(stream.compress(disk_content(SIZE)))
    disk = await open_image(str(path), stream.kind, Opening(workers))
    assert (disk.format, disk.facts["index"]) == (stream.kind, stream.index)
    assert disk.name == str(path)
    await disk.close()


@each_stream
@pytest.mark.parametrize("size", [0, 1, 511])
async def test_tiny_disks(tmp_path: Path, workers: Workers, stream: Stream, size: int) -> None:
    path, golden = tmp_path / "disk.img.z", random.Random(1).randbytes(size)
    path.write_bytes(stream.compress(golden))
    if path.stat().st_size:  # zstd_frames of nothing are no frames
        assert await everything(str(path), stream.kind, workers) == golden


async def test_zeroes_in_gzip_are_known(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img.gz"
    golden = bytes(MIB) + os.urandom(MIB) + bytes(MIB // 2 + 3)
    path.write_bytes(gzip.compress(golden))
    disk = await open_image(str(path), "", Opening(workers))
    found = [(e.length, e.flags) for e in await disk.extents(0, disk.size)]
    assert found == [(MIB, ZERO), (MIB, DATA), (MIB // 2 + 3, ZERO)]
    await disk.close()


async def test_zeroes_of_an_unpacked_stream_are_holes(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img.zst"
    golden = bytes(4 * MIB) + os.urandom(MIB) + bytes(MIB)
    path.write_bytes(piped(golden, "zstd", "-c"))
    disk = await open_image(str(path), "", Opening(workers))
    found = [(e.length, e.flags) for e in await disk.extents(0, disk.size)]
    assert found == [(4 * MIB, HOLE), (MIB, DATA), (MIB, HOLE)]
    assert disk.facts["unpacked_into"] == tempfile.gettempdir()
    await disk.close()


async def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = tmp_path / "disk.img.zst"
    path.write_bytes(piped(disk_content(SIZE), "zstd", "-c"))
    disk = await open_image(str(path), "", Opening(workers))
    assert os.listdir(tmp_path / "tmp") == []
    await disk.close()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match="corrupt image"):
        await open_image(str(path), "", Opening(workers))
    assert os.listdir(tmp_path / "tmp") == []


async def test_large_blocks_are_unpacked_once(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.formats.compressed.xz.MAX_BLOCK", MIB)
    path, golden = tmp_path / "disk.img.xz", disk_content(SIZE)
    path.write_bytes(lzma.compress(golden, preset=1) + bytes(8) + lzma.compress(b"tail"))
    disk = await open_image(str(path), "", Opening(workers))
    assert disk.facts["index"] == "none"
    assert await content(disk, 0, disk.size) == golden + b"tail"
    await disk.close()


async def test_checkpoints_far_apart(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_source, "MAX_CHECKPOINTS", 3)
    path, golden = tmp_path / "disk.img.gz", disk_content(5 * MIB)
    path.write_bytes(gzip.compress(golden[: 4 * MIB], 1) + gzip.compress(golden[4 * MIB :], 1))
    disk = await open_image(str(path), "", Opening(workers))
    assert disk.facts["checkpoint_distance"] == MIB
    for at in (4 * MIB + 5, 100, 3 * MIB, MIB + 7, 3 * MIB + 300 * KIB, 0):
        assert await content(disk, at, 400 * KIB) == golden[at : at + 400 * KIB]
    await disk.close()
    await check_disk(opener(path, workers), golden)


async def test_too_many_members_share_blocks(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.formats.compressed.bgzf.MAX_BLOCKS", 2)
    path, golden = tmp_path / "disk.img.gz", disk_content(3 * MIB)
    path.write_bytes(piped(golden, "bgzip", "-c"))
    disk = await open_image(str(path), "", Opening(workers))
    assert disk.facts["blocks"] == 2
    assert await content(disk, 0, disk.size) == golden
    await disk.close()


async def test_blocks_are_kept_in_the_shared_cache(tmp_path: Path, workers: Workers) -> None:
    path, golden = tmp_path / "disk.img.zst", disk_content(SIZE)
    path.write_bytes(b"".join(zstd_frames(golden, 300_000)))
    disk = await open_image(str(path), "", Opening(workers))
    assert await content(disk, 5, 10) == golden[5:15]
    os.truncate(path, 0)
    assert await content(disk, 200_000, 10) == golden[200_000:200_010]
    await disk.close()


@pytest.mark.parametrize("kind", ["gzip", "bgzip", "xz", "zstd"])
@pytest.mark.parametrize("inside", ["qcow2", "vmdk", "vpc", "vdi", "xz"])
async def test_other_images_inside_are_refused(
    tmp_path: Path, workers: Workers, kind: str, inside: str
) -> None:
    image = tmp_path / "inside"
    if inside == "xz":
        image.write_bytes(lzma.compress(b"twice"))
    else:
        options = ["-o", "subformat=fixed"] if inside == "vpc" else []
        piped(b"", "qemu-img", "create", "-q", "-f", inside, *options, str(image), "1M")
    path = tmp_path / "disk.z"
    path.write_bytes(piped(image.read_bytes(), kind, "-c"))
    with pytest.raises(UnsupportedImage) as raised:
        await open_image(str(path), "", Opening(workers))
    name = {"vpc": "vhd"}.get(inside, inside)
    assert str(raised.value).startswith(f"{path}: holds a {name} image; ")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
async def test_opening_can_be_cancelled(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("nbdsrv.formats.turns.TURN_S", 0)
    path = tmp_path / "disk.z"
    path.write_bytes(piped(disk_content(MIB), kind, "-c"))
    descriptors = len(os.listdir("/proc/self/fd"))
    for patience in range(0, 200, 7):
        file = open_image_file(str(path))
        opening = asyncio.ensure_future(open_file(file, kind, Opening(workers)))
        for _ in range(patience):
            await asyncio.sleep(0)
        if opening.cancel():
            with pytest.raises(asyncio.CancelledError):
                await opening
            file.close()
        else:  # it was quick
            await opening.result().close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_room_is_shared(workers: Workers) -> None:
    room, order = block_source.Room(10), []

    def take(name: str, amount: int) -> None:
        with room.take(amount):
            order.append(name)

    with room.take(8):
        waiting = workers.run(take, "large", 100)
        await workers.run(take, "small", 2)
        order.append("free")
    await waiting
    assert order == ["small", "free", "large"]
