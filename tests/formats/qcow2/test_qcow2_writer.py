"""New qcow2 images: what went in comes out of QEMU, and ``qemu-img check`` finds no fault."""

import asyncio
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.qcow2.structs import Compression
from nbdsrv.formats.qcow2.writer import Backing, Qcow2Writer, Shape
from nbdsrv.formats.qcow2.writer_space import Space
from nbdsrv.formats.raw import open_raw
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.writer import Plan
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.qcow2.checked import check
from tests.formats.qcow2.peer import qemu_img, read_by_qemu

MIB = 1 << 20
SIZES = (0, 1, 511, 512, 65536, 65537, 3 * MIB + 700, 9 * MIB)
SHAPES = {
    "plain": Shape(),
    "small clusters": Shape(cluster_bits=9),
    "large clusters": Shape(cluster_bits=21),
    "zlib": Shape(compression=Compression.ZLIB),
    "zlib 9": Shape(compression=Compression.ZLIB, level=9),
    "zstd": Shape(compression=Compression.ZSTD),
    "zstd 12, 4 KiB": Shape(12, Compression.ZSTD, 12),
    "zlib, 512 bytes": Shape(9, Compression.ZLIB),
    "zlib, 2 MiB": Shape(21, Compression.ZLIB),
}
COMPRESSED = ("zlib", "zstd", "zlib, 512 bytes")


def mixed(size: int, seed: object = 0) -> bytes:
    """Text, noise and zeroes in pieces that no cluster is aligned with."""
    chance = random.Random(f"{size} {seed}")
    found = bytearray()
    while len(found) < size:
        length = chance.choice((700, 5000, 70_000, 300_000))
        kind = chance.randrange(3)
        if kind == 0:
            found += bytes(length)
        elif kind == 1:
            found += chance.randbytes(length)
        else:
            found += b"".join(b"line %d of the text\n" % n for n in range(length // 20 + 1))
    return bytes(found[:size])


def ranges_of(golden: bytes, step: int) -> list[tuple[int, int]]:
    """Ranges of whole steps that hold data, one step in four left out of merging."""
    found: list[tuple[int, int]] = []
    for at in range(0, len(golden), step):
        piece = golden[at : at + step]
        if any(piece):
            if found and sum(found[-1]) == at:
                found[-1] = (found[-1][0], found[-1][1] + len(piece))
            else:
                found.append((at, len(piece)))
    return found


async def write(
    writer: Qcow2Writer, golden: bytes, zeroes: Sequence[tuple[int, int]] = (), seed: int = 1
) -> None:
    """The way ``copy`` does it: pieces in any order and at once, unless they must be ordered."""
    step = max(writer.granularity, 65536)
    planned = ranges_of(golden, step)
    await writer.open(len(golden))
    await writer.begin(Plan(len(golden), lambda: iter(planned)))
    chance = random.Random(seed)
    pieces = []
    for offset, length in planned:
        at = offset
        while at < offset + length:
            count = min(chance.choice((1, 3, 12)) * step, offset + length - at)
            pieces.append((at, count))
            at += count

    async def store(offset: int, length: int) -> None:
        buffer = bytearray(golden[offset : offset + length])
        await writer.data(offset, memoryview(buffer))
        buffer[:] = b"\xa5" * length  # done with it: nobody may look at it any more

    if writer.ordered:
        for piece in pieces:
            await store(*piece)
    else:
        chance.shuffle(pieces)
        await asyncio.gather(
            *(store(*piece) for piece in pieces), *(writer.zero(*zero) for zero in zeroes)
        )
    await writer.finish()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHAPES)
async def test_what_goes_in_comes_out(
    name: str, size: int, tmp_path: Path, workers: Workers
) -> None:
    golden = mixed(size)
    path = tmp_path / "disk.qcow2"
    await write(Qcow2Writer(workers, TargetFile(str(path)), SHAPES[name]), golden)
    check(path)
    rounded = golden.ljust(-(-size // 512) * 512, b"\0")
    assert read_by_qemu(path) == rounded
    assert os.listdir(tmp_path) == ["disk.qcow2", "disk.qcow2.read"]
    disk = await open_image(str(path), "", Opening(workers))
    assert await content(disk, 0, disk.size) == rounded
    await disk.close()


@pytest.mark.parametrize("name", COMPRESSED)
async def test_compression_makes_it_smaller(name: str, tmp_path: Path, workers: Workers) -> None:
    golden = b"".join(b"line %d of the text\n" % n for n in range(200_000))
    path, plain = tmp_path / "disk.qcow2", tmp_path / "plain.qcow2"
    await write(Qcow2Writer(workers, TargetFile(str(path)), SHAPES[name]), golden)
    await write(Qcow2Writer(workers, TargetFile(str(plain)), SHAPES["plain"]), golden)
    assert path.stat().st_size * 2 < plain.stat().st_size
    info = json.loads(qemu_img("info", "--output=json", path))
    expected = SHAPES[name].compression
    assert expected is not None
    assert info["format-specific"]["data"]["compression-type"] == expected.name.lower()


async def test_what_does_not_shrink_is_stored_as_it_is(tmp_path: Path, workers: Workers) -> None:
    golden = random.Random(1).randbytes(MIB)
    path = tmp_path / "disk.qcow2"
    await write(Qcow2Writer(workers, TargetFile(str(path)), SHAPES["zstd"]), golden)
    check(path)
    assert read_by_qemu(path) == golden
    assert "0.00% compressed" in qemu_img("check", path)


async def test_zeroes_are_left_out(tmp_path: Path, workers: Workers) -> None:
    golden = bytes(4 * MIB) + b"x" + bytes(4 * MIB - 1)
    path = tmp_path / "disk.qcow2"
    writer = Qcow2Writer(workers, TargetFile(str(path)))
    await writer.open(len(golden))
    await writer.begin(Plan(len(golden), lambda: iter([(0, len(golden))])))
    await writer.data(0, memoryview(golden))
    await writer.zero(0, 4 * MIB)
    await writer.finish()
    assert "1/128 = 0.78% allocated" in qemu_img("check", path)
    assert read_by_qemu(path) == golden


async def test_many_small_clusters_need_many_refcount_blocks(
    tmp_path: Path, workers: Workers
) -> None:
    golden = random.Random(2).randbytes(3 * MIB)
    path = tmp_path / "disk.qcow2"
    await write(Qcow2Writer(workers, TargetFile(str(path)), Shape(cluster_bits=9)), golden)
    check(path)
    assert read_by_qemu(path) == golden


async def test_tables_that_do_not_fit_in_memory_come_back(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdsrv.formats.qcow2.writer_tables.MAX_TABLE_BYTES", 1024)
    golden = mixed(2 * MIB)
    path = tmp_path / "disk.qcow2"
    await write(Qcow2Writer(workers, TargetFile(str(path)), Shape(cluster_bits=9)), golden)
    check(path)
    assert read_by_qemu(path) == golden


def test_no_cluster_is_shared_by_more_than_can_be_counted(tmp_path: Path) -> None:
    target = TargetFile(str(tmp_path / "disk.qcow2"))
    target.open()
    space = Space(target, Shape(cluster_bits=21))
    positions = [space.packed(1) for _ in range(65_537)]
    assert {position >> 21 for position in positions[:65_535]} == {0}
    assert positions[65_535:] == [1 << 21, (1 << 21) + 1]
    target.discard()


async def test_sixteen_tebibytes(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.qcow2"
    writer = Qcow2Writer(workers, TargetFile(str(path)))
    size = 16 << 40
    await writer.open(size)
    await writer.begin(Plan(size, lambda: iter(())))
    await writer.data(size - 65536, memoryview(b"x" * 65536))
    await writer.finish()
    check(path)
    disk = await open_image(str(path), "", Opening(workers))
    assert disk.size == size
    assert await content(disk, size - 65537, 65537) == b"\0" + b"x" * 65536
    await disk.close()


# --- into a pipe -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["plain", "small clusters", "large clusters"])
async def test_pipe(
    name: str, size: int, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = mixed(size, "pipe")
    path = tmp_path / "disk.qcow2"
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup", lambda _: writing)
    target = TargetFile("-")
    writer = Qcow2Writer(workers, target, SHAPES[name])
    assert writer.ordered
    assert not writer.seekable

    def drain() -> None:
        with open(reading, "rb") as source:
            path.write_bytes(source.read())

    draining = asyncio.create_task(workers.look_up(drain))
    await write(writer, golden)
    await draining
    check(path)
    assert read_by_qemu(path) == golden.ljust(-(-size // 512) * 512, b"\0")


async def test_pipe_where_planned_data_does_not_come(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup", lambda _: writing)
    path = tmp_path / "disk.qcow2"
    writer = Qcow2Writer(workers, TargetFile("-"))
    planned = [(0, 3 * 65536), (10 * 65536, 100), (20 * 65536 + 5, 65536)]

    def drain() -> None:
        with open(reading, "rb") as source:
            path.write_bytes(source.read())

    draining = asyncio.create_task(workers.look_up(drain))
    await writer.open(22 * 65536)
    await writer.begin(Plan(22 * 65536, lambda: iter(planned)))
    await writer.data(65536, memoryview(b"a" * 65536))
    await writer.data(20 * 65536, memoryview(b"b" * 65536))
    await writer.finish()
    await draining
    golden = bytearray(22 * 65536)
    golden[65536 : 2 * 65536] = b"a" * 65536
    golden[20 * 65536 : 21 * 65536] = b"b" * 65536
    check(path)
    assert read_by_qemu(path) == bytes(golden)


@pytest.mark.parametrize("kind", Compression)
def test_pipe_refuses_compression(kind: Compression, workers: Workers) -> None:
    with pytest.raises(ConfigError, match="compressed qcow2 image cannot be written into a pipe"):
        Qcow2Writer(workers, TargetFile("-"), Shape(compression=kind))


# --- over a backing file -----------------------------------------------------------------------

BELOW = Image("below", 2 * MIB - 1000, ((0, 900_000), (1_200_000, 500_000)))


@pytest.mark.parametrize("name", ["plain", "zlib", "small clusters", "large clusters"])
async def test_holes_fall_through_and_zeroes_do_not(
    name: str, tmp_path: Path, workers: Workers
) -> None:
    below = BELOW.make(str(tmp_path / "base.raw"))
    size = 2 * MIB + 512 * 3
    golden = bytearray(below.ljust(size, b"\0"))
    zeroes = [
        (10, 20),
        (70_000, 30),
        (70_100, 200_000),
        (1_300_000, 1),
        (2_000_000, size - 2_000_000),
    ]
    for offset, length in zeroes:
        golden[offset : offset + length] = bytes(length)
    backing = await open_raw(str(tmp_path / "base.raw"), workers, writable=False)
    path = tmp_path / "disk.qcow2"
    shape = SHAPES[name]
    shape = Shape(shape.cluster_bits, shape.compression, 0, Backing("base.raw", "raw", backing))
    writer = Qcow2Writer(workers, TargetFile(str(path)), shape)
    await writer.open(size)
    await writer.begin(Plan(size, lambda: iter(())))
    cluster = writer.granularity
    data_at = 800_000 // cluster * cluster or 0
    if data_at >= 300_000:
        data = random.Random(3).randbytes(cluster)
        golden[data_at : data_at + cluster] = data
        await writer.data(data_at, memoryview(data))
    await asyncio.gather(*(writer.zero(*zero) for zero in zeroes))
    await writer.finish()
    await backing.close()
    check(path)
    assert read_by_qemu(path) == bytes(golden)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.raw", "raw")


async def test_format_names_are_qemus(tmp_path: Path, workers: Workers) -> None:
    BELOW.make(str(tmp_path / "base.raw"))
    backing = await open_raw(str(tmp_path / "base.raw"), workers, writable=False)
    path = tmp_path / "disk.qcow2"
    shape = Shape(backing=Backing("base.vhd", "vhd", backing))
    writer = Qcow2Writer(workers, TargetFile(str(path)), shape)
    await writer.open(MIB)
    await writer.begin(Plan(MIB, lambda: iter(())))
    await writer.finish()
    await backing.close()
    info = json.loads(qemu_img("info", "-U", "--output=json", path))
    assert info["backing-filename-format"] == "vpc"


async def test_pipe_refuses_a_backing_file(tmp_path: Path, workers: Workers) -> None:
    BELOW.make(str(tmp_path / "base.raw"))
    backing = await open_raw(str(tmp_path / "base.raw"), workers, writable=False)
    with pytest.raises(ConfigError, match="backing file cannot be written into a pipe"):
        Qcow2Writer(workers, TargetFile("-"), Shape(backing=Backing("base.raw", "raw", backing)))
    await backing.close()


# --- what cannot be ----------------------------------------------------------------------------


async def test_too_large_for_its_clusters(tmp_path: Path, workers: Workers) -> None:
    writer = Qcow2Writer(workers, TargetFile(str(tmp_path / "a")), Shape(cluster_bits=9))
    with pytest.raises(UnsupportedImage, match="use larger clusters"):
        await writer.open(1 << 50)
    await writer.abort()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "shape", [(8,), (22,), (16, Compression.ZLIB, 10), (16, Compression.ZSTD, 20)]
)
def test_shapes_there_are_not(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Shape(*shape)  # type: ignore[arg-type]


async def test_a_backing_name_that_does_not_fit(tmp_path: Path, workers: Workers) -> None:
    BELOW.make(str(tmp_path / "base.raw"))
    backing = await open_raw(str(tmp_path / "base.raw"), workers, writable=False)
    shape = Shape(cluster_bits=9, backing=Backing("x" * 600, "raw", backing))
    writer = Qcow2Writer(workers, TargetFile(str(tmp_path / "disk.qcow2")), shape)
    with pytest.raises(ConfigError, match="too long"):
        await writer.open(MIB)
    await writer.abort()
    await backing.close()
    assert os.listdir(tmp_path) == ["base.raw"]


async def test_abort_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, workers: Workers
) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"precious")
    writer = Qcow2Writer(workers, TargetFile(str(path), replace=True), SHAPES["zstd"])
    await writer.open(MIB)
    await writer.begin(Plan(MIB, lambda: iter([(0, MIB)])))
    await writer.data(0, memoryview(mixed(MIB)))
    await writer.abort()
    await writer.abort()
    assert os.listdir(tmp_path) == ["disk.qcow2"]
    assert path.read_bytes() == b"precious"


async def test_before_finish_it_is_no_image(tmp_path: Path, workers: Workers) -> None:
    target = TargetFile(str(tmp_path / "disk.qcow2"))
    writer = Qcow2Writer(workers, target)
    await writer.open(MIB)
    await writer.begin(Plan(MIB, lambda: iter([(0, MIB)])))
    await writer.data(0, memoryview(mixed(MIB)))
    (unfinished,) = tmp_path.iterdir()
    with pytest.raises(DiskError):
        await open_image(str(unfinished), "qcow2", Opening(workers))
    await writer.abort()
