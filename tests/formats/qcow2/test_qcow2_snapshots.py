"""Internal snapshots: each a disk of its own."""

import struct
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.qcow2.snapshots import _HEAD
from nbdsrv.formats.qcow2.structs import SNAPSHOT
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.formats.qcow2.peer import create, opener, qemu_img, qemu_io, read_by_qemu, refusal

HEAD = 40


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two snapshots and a current state, each with other content and size."""
    path = create(tmp_path / "disk.qcow2", "1M")
    qemu_io(path, "write -P 1 0 300k")
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, "write -P 2 64k 64k", "write -z 200k 10k")
    qemu_img("snapshot", "-c", "after", path)
    qemu_io(path, "write -P 3 0 1M")
    return path


@pytest.mark.parametrize("wanted", ["before", "after", "1", "2"])
async def test_by_name_and_by_id(image: Path, workers: Workers, wanted: str) -> None:
    golden = read_by_qemu(image, "qcow2", "-l", wanted)
    await check_disk(opener(image, workers, snapshot=wanted), golden, extents_granularity=512)


async def test_the_current_state_is_another(image: Path, workers: Workers) -> None:
    disk = await opener(image, workers)()
    assert await content(disk, 0, disk.size) == read_by_qemu(image) == b"\3" * (1 << 20)
    listed = disk.facts["snapshots"]
    assert isinstance(listed, list)
    assert [(s["id"], s["name"], s["size"]) for s in listed] == [
        ("1", "before", 1 << 20),
        ("2", "after", 1 << 20),
    ]
    await disk.close()


async def test_a_snapshot_keeps_its_size(image: Path, workers: Workers) -> None:
    qemu_img("resize", image, "3M")
    disk = await opener(image, workers)()
    assert disk.size == 3 << 20
    await disk.close()
    disk = await opener(image, workers, snapshot="before")()
    assert disk.size == 1 << 20
    assert disk.facts["snapshot"] is not None
    await disk.close()


async def test_version_2_without_extra_data(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "old.qcow2", "1M", "-o", "compat=0.10")
    qemu_io(path, "write -P 1 0 300k")
    qemu_img("snapshot", "-c", "then", path)
    qemu_io(path, "write -P 2 0 300k")
    image = bytearray(path.read_bytes())
    (at,) = struct.unpack_from(">Q", image, 64)
    (extra,) = struct.unpack_from(">I", image, at + 36)
    struct.pack_into(">I", image, at + 36, 0)
    image[at + HEAD : at + HEAD + 5] = image[at + HEAD + extra : at + HEAD + extra + 5]
    path.write_bytes(image)
    disk = await opener(path, workers, snapshot="then")()
    assert disk.size == 1 << 20
    assert await content(disk, 0, 300 << 10) == b"\1" * (300 << 10)
    await disk.close()


async def test_an_unknown_one_is_refused_with_those_there_are(
    image: Path, workers: Workers
) -> None:
    error = await refusal(image, workers, snapshot="never")
    assert "'before', 'after'" in str(error)


async def test_an_ambiguous_name_needs_an_id(image: Path, workers: Workers) -> None:
    qemu_img("snapshot", "-c", "after", image)
    with pytest.raises(DiskError, match="by its id: '2', '3'"):
        await opener(image, workers, snapshot="after")()
    disk = await opener(image, workers, snapshot="3")()
    assert await content(disk, 0, 1) == b"\3"
    await disk.close()


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\xff" * 8),  # the L1 table is nowhere
        (0, (512).to_bytes(8, "big")),  # nor aligned
        (8, b"\xff" * 4),  # too large
        (8, bytes(4)),  # too small
        (36, b"\xff" * 4),  # extra data without end
        (48, b"\xff" * 8),  # a disk of 2^64 - 1 bytes
    ],
)
async def test_a_broken_entry(image: Path, workers: Workers, at: int, value: bytes) -> None:
    data = bytearray(image.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    data[table + at : table + at + len(value)] = value
    image.write_bytes(data)
    assert isinstance(await refusal(image, workers, snapshot="1"), CorruptImage)


def test_the_hot_struct_is_the_described_one() -> None:
    packed = bytes(range(40))
    described = SNAPSHOT.parse(packed)
    assert [v for k, v in described.items() if not k.startswith("_")] == list(_HEAD.unpack(packed))
