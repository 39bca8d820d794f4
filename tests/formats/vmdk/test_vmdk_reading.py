"""VMDKs by qemu-img read as qemu-img reads them, map as it maps them, and keep the contract."""

import os
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.formats.vmdk.images import (
    GOLDEN,
    MIB,
    SUBFORMATS,
    extents_of,
    golden,
    qemu_img,
    qemu_io,
    qemu_map,
    qemu_raw,
    raw_file,
)


async def opened(workers: Workers, path: Path) -> Disk:
    return await open_image(str(path), "", Opening(workers))


def converted(directory: Path, subformat: str, raw: bytes, name: str = "disk") -> Path:
    path = directory / f"{name}.vmdk"
    source = raw_file(directory / f"{name}.raw", raw)
    options = f"subformat={subformat}"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", options, source, path)
    source.unlink()
    return path


@pytest.fixture(scope="module", params=SUBFORMATS)
def subformat(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def image(subformat: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp(subformat), subformat, GOLDEN)


async def test_content_is_what_qemu_img_reads(image: Path, workers: Workers) -> None:
    disk = await opened(workers, image)
    found = await content(disk, 0, disk.size)
    await disk.close()
    assert found == GOLDEN == qemu_raw(image)


async def test_map_is_what_qemu_img_maps(image: Path, workers: Workers) -> None:
    disk = await opened(workers, image)
    found = await extents_of(disk)
    await disk.close()
    assert any(zero for *_, zero in found)
    assert found == holes_as_we_call_them(qemu_map(image))


def holes_as_we_call_them(
    extents: list[tuple[int, int, bool, bool]],
) -> list[tuple[int, int, bool, bool]]:
    """qemu calls a hole of a flat extent's file data that is zero; it is no data."""
    return [(start, length, data and not zero, zero) for start, length, data, zero in extents]


async def test_contract(image: Path, workers: Workers) -> None:
    await check_disk(lambda: opened(workers, image), GOLDEN)


async def test_facts(image: Path, subformat: str, workers: Workers) -> None:
    disk = await opened(workers, image)
    facts = dict(disk.facts)
    await disk.close()
    assert disk.format == "vmdk"
    assert facts["create_type"] == subformat
    assert facts["adapter_type"] == "ide"
    assert facts.get("compressed", False) == (subformat == "streamOptimized")


async def test_read_only_and_untouched(image: Path, workers: Workers) -> None:
    for path in image.parent.glob("*.vmdk"):
        os.chmod(path, 0o444)
    before = {path: path.read_bytes() for path in image.parent.glob("*.vmdk")}
    disk = await opened(workers, image)
    await content(disk, 0, disk.size)
    await disk.close()
    assert before == {path: path.read_bytes() for path in image.parent.glob("*.vmdk")}


@pytest.mark.parametrize("size", [512, 65536, 65536 + 512, 32 * MIB, 32 * MIB + 512])
@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized"])
async def test_sizes_around_grain_and_table(
    tmp_path: Path, kind: str, size: int, workers: Workers
) -> None:
    raw = bytes(size - 512) + golden(512)
    path = converted(tmp_path, kind, raw)
    disk = await opened(workers, path)
    assert await content(disk, 0, disk.size) == raw
    assert await extents_of(disk) == holes_as_we_call_them(qemu_map(path))
    await disk.close()


async def test_extents_are_called_as_files_are(tmp_path: Path, workers: Workers) -> None:
    raw = golden(MIB)
    path = converted(tmp_path, "monolithicFlat", raw, "disk\u00a01")
    disk = await opened(workers, path)
    found = await content(disk, 0, disk.size)
    await disk.close()
    assert found == raw


async def test_split_into_several_files(tmp_path: Path, workers: Workers) -> None:
    # Extents of 2 GiB: data around the border between two.
    path = tmp_path / "disk.vmdk"
    border = 2 << 30
    for kind in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", path, border + 9 * MIB)
        qemu_io(path, f"write -P 7 {border - 70000} 140000", f"write -P 9 {border + 8 * MIB} 512")
        disk = await opened(workers, path)
        assert disk.size == border + 9 * MIB
        assert disk.facts["extents"] == 2
        around = await content(disk, border - 80000, 160_000)
        assert around == bytes(10000) + b"\x07" * 140_000 + bytes(10000)
        assert await content(disk, border + 8 * MIB - 1, 514) == b"\0" + b"\x09" * 512 + b"\0"
        assert await extents_of(disk) == holes_as_we_call_them(qemu_map(path))
        await disk.close()


async def test_zeroed_grains(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", "zeroed_grain=on", path, 4 * MIB)
    qemu_io(path, "write -P 1 0 512k", "write -z 128k 128k", "write -z 1M 1M")
    disk = await opened(workers, path)
    found = (await disk.extents(0, disk.size)).ranges()
    assert list(found) == [
        (0, 128 << 10, DATA),
        (128 << 10, 128 << 10, ZERO),
        (256 << 10, 256 << 10, DATA),
        (512 << 10, 512 << 10, HOLE),
        (MIB, MIB, ZERO),
        (2 * MIB, 2 * MIB, HOLE),
    ]
    assert await content(disk, 0, disk.size) == qemu_raw(path)
    await disk.close()


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse"])
async def test_16_tib_open_and_map_at_once(tmp_path: Path, kind: str, workers: Workers) -> None:
    path, size = tmp_path / "disk.vmdk", 16 << 40
    if kind == "twoGbMaxExtentSparse":
        size = 512 << 30
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", path, size)
    qemu_io(path, f"write -P 5 {size - 65536} 65536", f"write -P 6 {size // 2 + 512} 512")
    disk = await opened(workers, path)
    found = [extent async for extent in every_extent(disk, size // 2)]
    assert found == [
        (size // 2, 65536, DATA),
        (size // 2 + 65536, size // 2 - 2 * 65536, HOLE),
        (size - 65536, 65536, DATA),
    ]
    assert await content(disk, size - 65537, 65537) == b"\0" + b"\x05" * 65536
    assert await content(disk, size // 2, 1024) == bytes(512) + b"\x06" * 512
    await disk.close()


async def every_extent(disk: Disk, offset: int):
    """Merged over the answers."""
    last = None
    while offset < disk.size:
        for start, length, flags in (await disk.extents(offset, disk.size - offset)).ranges():
            if last is not None and last[2] == flags:
                last = (last[0], last[1] + length, flags)
            else:
                if last is not None:
                    yield last
                last = (start, length, flags)
            offset = start + length
    yield last


async def test_extent_of_a_split_disk_is_not_a_disk(tmp_path: Path, workers: Workers) -> None:
    path = converted(tmp_path, "twoGbMaxExtentSparse", GOLDEN)
    with pytest.raises(
        DiskError, match=r"disk-s001.vmdk: an extent of a split disk; open its desc"
    ):
        await opened(workers, path.with_name("disk-s001.vmdk"))
