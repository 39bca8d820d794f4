"""Extents qemu-img reads but does not make: ESX snapshots, zeroes, files in pieces and places."""

import random
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.vmdk.descriptor import ExtentLine
from protocol.extents import DATA, HOLE
from protocol.extents import ZERO as ZEROES
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.formats.places import loop_device
from tests.formats.vmdk.images import GOLDEN, MIB, extents_of, qemu_map, qemu_raw
from tests.formats.vmdk.laid_out import (
    ZERO,
    described,
    hosted,
    se_sparse,
    stream,
    vmfs_sparse,
    with_grains,
)

SIZE = 3 * MIB + 512


async def opened(workers: Workers, path: Path) -> Disk:
    return await open_image(str(path), "", Opening(workers))


def some_grains(grain: int, count: int, *, zeroes: bool) -> dict[int, bytes]:
    chance = random.Random(grain)
    numbers = chance.sample(range(-(-SIZE // grain)), count)
    numbers += [number + 1 for number in numbers[: count // 2] if (number + 2) * grain < SIZE]
    found = {number: chance.randbytes(grain) for number in numbers}
    found[SIZE // grain] = chance.randbytes(grain)  # the last one is cut by the disk's end
    if zeroes:
        found |= dict.fromkeys(numbers[::3], ZERO)
    return found


def base(directory: Path) -> Path:
    (directory / "base-flat.vmdk").write_bytes(GOLDEN[:SIZE])
    line = ExtentLine(SIZE // 512, "VMFS", "base-flat.vmdk")
    return described(directory / "base.vmdk", "vmfs", line, content_id=0xABC)


def delta(directory: Path, kind: str, create_type: str) -> Path:
    return described(
        directory / "delta.vmdk",
        create_type,
        ExtentLine(SIZE // 512, kind, "extent.vmdk"),
        parent_content_id=0xABC,
        parent_name="base.vmdk",
    )


@pytest.mark.parametrize("grain", [512, 4096, 65536])
async def test_vmfs_sparse_snapshot(tmp_path: Path, grain: int, workers: Workers) -> None:
    grains = some_grains(grain, 20, zeroes=False)
    base(tmp_path)
    vmfs_sparse(tmp_path / "extent.vmdk", SIZE, grains, grain=grain)
    path = delta(tmp_path, "VMFSSPARSE", "vmfsSparse")
    expected = with_grains(SIZE, grain, grains, GOLDEN)
    assert qemu_raw(path) == expected
    disk = await opened(workers, path)
    assert await extents_of(disk) == qemu_map(path)
    assert disk.facts["grain_size"] == grain
    await disk.close()
    await check_disk(lambda: opened(workers, path), expected)


async def test_se_sparse_snapshot(tmp_path: Path, workers: Workers) -> None:
    grains = some_grains(4096, 60, zeroes=True)
    base(tmp_path)
    se_sparse(tmp_path / "extent.vmdk", SIZE, grains)
    path = delta(tmp_path, "SESPARSE", "seSparse")
    expected = with_grains(SIZE, 4096, grains, GOLDEN)
    assert qemu_raw(path) == expected
    disk = await opened(workers, path)
    assert await extents_of(disk) == qemu_map(path)
    await disk.close()
    await check_disk(lambda: opened(workers, path), expected)


async def test_se_sparse_of_40_tib(tmp_path: Path, workers: Workers) -> None:
    size = 40 << 40
    grains = {number: bytes([number % 250 + 1]) * 4096 for number in (0, 5000, size // 4096 - 1)}
    directory = -(-size // (16 * MIB) * 8 // 512)
    places = {"gd_size": directory, "tables_offset": 16 + directory}
    se_sparse(tmp_path / "extent.vmdk", size, grains, **places)
    line = ExtentLine(size // 512, "SESPARSE", "extent.vmdk")
    disk = await opened(workers, described(tmp_path / "disk.vmdk", "seSparse", line))
    for number, data in grains.items():
        assert await content(disk, number * 4096, 4096) == data
    assert await content(disk, 20 << 40, 4096) == bytes(4096)
    await disk.close()


async def test_journal_that_was_not_replayed(tmp_path: Path, workers: Workers) -> None:
    base(tmp_path)
    se_sparse(tmp_path / "extent.vmdk", SIZE, {}, replay_journal=1)
    with pytest.raises(UnsupportedImage, match="journal was never replayed"):
        await opened(workers, delta(tmp_path, "SESPARSE", "seSparse"))


@pytest.mark.parametrize("make", [vmfs_sparse, se_sparse])
async def test_snapshot_without_its_descriptor(tmp_path: Path, make, workers: Workers) -> None:
    make(tmp_path / "extent.vmdk", SIZE, {})
    with pytest.raises(UnsupportedImage, match="an extent of a snapshot; open its descriptor"):
        await opened(workers, tmp_path / "extent.vmdk")


async def test_extents_of_all_kinds_in_one_disk(tmp_path: Path, workers: Workers) -> None:
    # Lengths are no multiples of anything, so that grains of one begin anywhere in a page.
    pieces = [GOLDEN[:1000448], bytes(70144), GOLDEN[65536 : 65536 + 300032], GOLDEN[:5120]]
    (tmp_path / "one").write_bytes(b"x" * 1024 + pieces[0] + b"beyond")
    grains = {at: pieces[2][at * 65536 :][:65536] for at in range(5)}
    hosted(tmp_path / "three", len(pieces[2]), grains)
    (tmp_path / "four").write_bytes(pieces[3])
    path = described(
        tmp_path / "disk.vmdk",
        "custom",
        ExtentLine(len(pieces[0]) // 512, "FLAT", "one", first=2),
        ExtentLine(len(pieces[1]) // 512, "ZERO"),
        ExtentLine(len(pieces[2]) // 512, "SPARSE", "three", access="RDONLY"),
        ExtentLine(len(pieces[3]) // 512, "FLAT", "four"),
    )
    await check_disk(lambda: opened(workers, path), b"".join(pieces))
    disk = await opened(workers, path)
    found = [flags for *_, flags in (await disk.extents(0, disk.size)).ranges()]
    assert found == [DATA, ZEROES, DATA]
    await disk.close()


async def test_grains_of_hosted_extents_in_any_order(tmp_path: Path, workers: Workers) -> None:
    grains = some_grains(8192, 40, zeroes=True)
    hosted(tmp_path / "extent", SIZE, grains, grain=8192)
    line = ExtentLine(SIZE // 512, "SPARSE", "extent")
    path = described(tmp_path / "disk.vmdk", "twoGbMaxExtentSparse", line)
    expected = with_grains(SIZE, 8192, grains)
    assert qemu_raw(path) == expected
    await check_disk(lambda: opened(workers, path), expected)
    disk = await opened(workers, path)
    flags = {flags for *_, flags in (await disk.extents(0, disk.size)).ranges()}
    assert flags == {DATA, ZEROES, HOLE}
    await disk.close()


@pytest.mark.parametrize("markers", [True, False])
async def test_stream_with_its_directory_at_the_end(
    tmp_path: Path, markers: bool, workers: Workers
) -> None:
    size = 5 * MIB + 512  # two tables, and a last grain of one sector
    grains = {number: GOLDEN[number * 5000 :][:8192] for number in (0, 1, 3, 511, 512, 640)}
    grains[7] = ZERO
    path = stream(tmp_path / "disk.vmdk", size, grains, grain=8192, markers=markers)
    expected = with_grains(size, 8192, grains)
    if markers:  # qemu-img cannot read it without
        assert qemu_raw(path) == expected
    disk = await opened(workers, path)
    assert await extents_of(disk) == qemu_map(path)
    assert disk.facts["compressed"]
    await disk.close()
    await check_disk(lambda: opened(workers, path), expected)


async def test_zero_extent_hides_the_parent(tmp_path: Path, workers: Workers) -> None:
    base(tmp_path)
    path = described(
        tmp_path / "disk.vmdk",
        "custom",
        ExtentLine(SIZE // 512, "ZERO"),
        parent_content_id=0xABC,
        parent_name="base.vmdk",
    )
    await check_disk(lambda: opened(workers, path), bytes(SIZE))


async def test_descriptor_with_windows_line_ends_and_paths(
    tmp_path: Path, workers: Workers
) -> None:
    (tmp_path / "Größe-flat.vmdk").write_bytes(GOLDEN)
    text = (
        '# Disk DescriptorFile\r\nversion=1\r\nencoding="windows-1252"\r\ncid=1234abcd\r\n'
        'parentCID=ffffffff\r\nCreateType = "monolithicFlat"\r\n\r\n'
        f'RW {len(GOLDEN) // 512} FLAT "D:\\VMs\\Größe-flat.vmdk" 0\r\n'
        'ddb.adapterType = "lsilogic"\r\nddb.comment = ""\r\n'
    )
    (tmp_path / "disk.vmdk").write_bytes(text.encode("cp1252"))
    disk = await opened(workers, tmp_path / "disk.vmdk")
    assert await content(disk, 0, disk.size) == GOLDEN
    assert disk.facts["content_id"] == "1234abcd"
    assert disk.facts["adapter_type"] == "lsilogic"
    await disk.close()


async def test_absolute_and_upward_names_are_followed(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "flat").write_bytes(GOLDEN[:4096])
    for name in (str(tmp_path / "flat"), "../flat"):
        line = ExtentLine(8, "FLAT", name)
        path = described(tmp_path / "vm" / "disk.vmdk", "monolithicFlat", line)
        disk = await opened(workers, path)
        assert await content(disk, 0, 4096) == GOLDEN[:4096]
        await disk.close()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (ExtentLine(8, "FLAT", "nbd://host/export"), r"not a plain file name; not followed \(an"),
        (ExtentLine(8, "VMFS", "vsan://1234"), "not a plain file name"),
        (ExtentLine(8, "FLAT", "gone"), r"gone: No such file or directory \(an extent of .*disk"),
        (ExtentLine(8, "FLAT", "."), r"is a directory.* \(an extent of .*disk"),
        (ExtentLine(8, "FLAT"), "an extent of kind FLAT without a file"),
        (ExtentLine(8, "VMFSRDM", "rdm"), "an extent of kind VMFSRDM is not served"),
        (ExtentLine(8, "FLAT", "flat", access="NOACCESS"), "marked NOACCESS"),
        (ExtentLine(9, "FLAT", "flat"), "flat at 4096: the file ends within an extent of 4608"),
        (ExtentLine(8, "FLAT", "flat", first=1), "flat at 4096: the file ends within an extent"),
        (ExtentLine(8, "SPARSE", "flat"), "flat at 0: no sparse header"),
    ],
)
async def test_extents_that_are_refused(
    tmp_path: Path, line: ExtentLine, what: str, workers: Workers
) -> None:
    (tmp_path / "flat").write_bytes(bytes(4096))
    path = described(tmp_path / "disk.vmdk", "custom", line)
    with pytest.raises(DiskError, match=what) as raised:
        await opened(workers, path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["fullDevice", "partitionedDevice", "vmfsRawDeviceMap"])
async def test_disks_that_are_devices(tmp_path: Path, kind: str, workers: Workers) -> None:
    path = described(tmp_path / "disk.vmdk", kind, ExtentLine(8, "FLAT", "/dev/null"))
    with pytest.raises(UnsupportedImage, match=f"a {kind} disk; serve the device itself"):
        await opened(workers, path)


async def test_device_as_an_extent(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with loop_device(str(tmp_path / "raw")) as device:
        path = described(tmp_path / "disk.vmdk", "monolithicFlat", ExtentLine(8, "FLAT", device))
        with pytest.raises(UnsupportedImage, match="is a device; serve it itself instead"):
            await opened(workers, path)


async def test_holes_of_flat_extents(tmp_path: Path, workers: Workers) -> None:
    for name in ("one", "two"):
        with open(tmp_path / name, "wb") as file:
            file.write(b"d" * 65536)
            file.truncate(MIB)
    lines = [ExtentLine(2048, "FLAT", name) for name in ("one", "two")]
    path = described(tmp_path / "disk.vmdk", "twoGbMaxExtentFlat", *lines)
    disk = await opened(workers, path)
    found = await extents_of(disk)
    assert [(start, length) for start, length, data, _ in found if data] == [
        (0, 65536),
        (MIB, 65536),
    ]
    runs = await disk.runs(0, 2 * MIB)
    assert sum(run.length for run in runs) == 2 * MIB
    await disk.close()


async def test_sparse_extent_of_another_size_than_described(
    tmp_path: Path, workers: Workers
) -> None:
    hosted(tmp_path / "extent", MIB, {0: b"x" * 65536})
    for sectors, fits in ((2047, True), (2048, True), (2049, False)):
        line = ExtentLine(sectors, "SPARSE", "extent")
        path = described(tmp_path / "disk.vmdk", "twoGbMaxExtentSparse", line)
        if not fits:
            with pytest.raises(CorruptImage, match="an extent of 2048 sectors, described as"):
                await opened(workers, path)
            continue
        disk = await opened(workers, path)
        assert disk.size == sectors * 512
        await disk.close()
