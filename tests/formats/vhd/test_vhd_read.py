"""VHD: fixed and dynamic images are read as qemu-img reads them, and as the specification says."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.opening import Opening, open_image
from protocol.extents import DATA, HOLE
from tests.disk.check_disk import OpenDisk, check_disk, extent_map
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.table_images import (
    converted,
    mapped_by_qemu,
    read_by_qemu,
    states_only,
)
from tests.formats.vhd.vhd_images import DYNAMIC, FIXED, Block, Vhd

MIB = 1 << 20
CONTENTS = (
    Image("hole", 2 * MIB + 512),
    Image("scattered", 4 * MIB, ((MIB, 4096), (2 * MIB + 512, MIB), (4 * MIB - 512, 512))),
    Image("odd-tail", 2 * MIB + 1536, ((MIB, 1), (2 * MIB + 1024, 512))),
    Image("sector", 512, ((0, 512),)),
)


def opener(path: str, workers: Workers) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(path, "", Opening(workers))

    return open_disk


def some_data(length: int) -> bytes:
    return random.Random(length).randbytes(length)


@pytest.mark.parametrize("image", CONTENTS, ids=lambda image: image.name)
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
async def test_contract(tmp_path: Path, workers: Workers, image: Image, subformat: str) -> None:
    options = f"subformat={subformat},force_size=on"
    path, golden = converted(tmp_path, image, "vpc", "-o", options)
    await check_disk(opener(path, workers), golden, extents_granularity=512)


@pytest.mark.parametrize("image", CONTENTS, ids=lambda image: image.name)
@pytest.mark.parametrize("force_size", ["on", "off"])
async def test_as_qemu_reads_it(
    tmp_path: Path, workers: Workers, image: Image, force_size: str
) -> None:
    options = f"subformat=dynamic,force_size={force_size}"
    path, _ = converted(tmp_path, image, "vpc", "-o", options)
    disk = await open_image(path, "", Opening(workers))
    assert disk.format == "vhd"
    assert disk.facts["subformat"] == "dynamic"
    assert disk.facts["block_size"] == 2 * MIB
    assert await content(disk, 0, disk.size) == read_by_qemu(path, "vpc")
    states = states_only(await extent_map(disk))
    # Where a block is allocated but a hole in the file, qemu says zero: it asks the file system.
    holes_by_qemu = [(at, length) for at, length, zero in mapped_by_qemu(path, "vpc") if zero]
    for at, length in ((at, length) for at, length, zero in states if zero):
        assert any(start <= at and at + length <= start + span for start, span in holes_by_qemu)
    await disk.close()


async def test_fixed_is_its_data_and_not_its_footer(tmp_path: Path, workers: Workers) -> None:
    image = CONTENTS[1]
    path, golden = converted(tmp_path, image, "vpc", "-o", "subformat=fixed,force_size=on")
    disk = await open_image(path, "", Opening(workers))
    assert disk.size == image.size == Path(path).stat().st_size - 512
    assert disk.facts["subformat"] == "fixed"
    assert disk.facts["creator"] == "qem2 5.3"
    assert await content(disk, 0, disk.size) == golden
    await disk.close()


@pytest.mark.parametrize("block_size", [512, 4096, 8192, 16384, 512 << 10, 4 * MIB])
async def test_any_block_size(tmp_path: Path, workers: Workers, block_size: int) -> None:
    count = max(2, min(600, 3 * MIB // block_size))
    vhd = Vhd(size=(count - 1) * block_size + 512, block_size=block_size)
    numbers = [n for n in range(count) if n % 3 != 1]
    random.Random(1).shuffle(numbers[: len(numbers) // 2])
    for number in numbers:
        vhd.blocks[number] = Block(some_data(block_size))
    path = vhd.write(tmp_path / "disk.vhd")
    await check_disk(opener(path, workers), vhd.content(), extents_granularity=512)


async def test_a_block_larger_than_a_page(tmp_path: Path, workers: Workers) -> None:
    block_size = 64 * MIB
    path = tmp_path / "disk.vhd"
    sectors = frozenset({0, 1, 65535, 65536, 100_000})
    vhd = Vhd(size=block_size + 4096, block_size=block_size)
    vhd.blocks[0] = Block(some_data(4096).ljust(51_000_000) + some_data(2 * MIB), sectors)
    vhd.blocks[1] = Block(some_data(4096))
    vhd.write(path)
    golden = vhd.content()
    disk = await open_image(str(path), "", Opening(workers))
    assert await content(disk, 0, disk.size) == golden
    data = sum(e.length for e in await disk.extents(0, disk.size) if e.flags == DATA)
    assert data == len(sectors) * 512 + 4096
    await disk.close()


@pytest.mark.parametrize("least_first", [False, True])
async def test_what_the_bitmap_of_a_dynamic_disk_denies_is_zero(
    tmp_path: Path, workers: Workers, least_first: bool
) -> None:
    sectors = frozenset({0, 1, 9, 15, 16, 4094})
    vhd = Vhd(size=4 * MIB, least_first=least_first)
    if least_first:
        vhd.creator, vhd.creator_version = b"tap\0", 0x00000001
    vhd.blocks[1] = Block(some_data(2 * MIB), sectors)
    path = vhd.write(tmp_path / "disk.vhd")
    disk = await open_image(path, "", Opening(workers))
    assert await content(disk, 0, disk.size) == vhd.content()
    states = await extent_map(disk)
    for sector in range(4096):
        state = DATA if sector in sectors else HOLE
        assert states[2 * MIB + sector * 512] == state
    await disk.close()


async def test_the_geometry_says_nothing(tmp_path: Path, workers: Workers) -> None:
    vhd = Vhd(size=4 * MIB, creator=b"xo  ", geometry=(200, 16, 63))
    vhd.blocks[0] = Block(some_data(2 * MIB))
    disk = await open_image(vhd.write(tmp_path / "disk.vhd"), "", Opening(workers))
    assert disk.size == 4 * MIB
    await disk.close()


@pytest.mark.parametrize("cut", [2 * MIB - 1024, MIB, 512])
async def test_last_block_cut_off_behind_the_end_of_the_disk(
    tmp_path: Path, workers: Workers, cut: int
) -> None:
    vhd = Vhd(size=2 * MIB + 1024, cut=cut)
    for number in (0, 1):
        vhd.blocks[number] = Block(some_data(2 * MIB))
    path = vhd.write(tmp_path / "disk.vhd")
    await check_disk(opener(path, workers), vhd.content(), extents_granularity=512)


@pytest.mark.parametrize("kind", [DYNAMIC, FIXED])
async def test_the_file_is_opened_for_reading_only(
    tmp_path: Path, workers: Workers, kind: int
) -> None:
    vhd = Vhd(size=2 * MIB, kind=kind)
    vhd.blocks[0] = Block(some_data(2 * MIB))
    path = tmp_path / "disk.vhd"
    vhd.write(path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    disk = await open_image(str(path), "", Opening(workers))
    (run,) = await disk.runs(0, 512)
    flags = Path(f"/proc/self/fdinfo/{run.fd}").read_text(encoding="ascii")  # type: ignore[union-attr]
    assert int(flags.split()[3], 8) & 3 == 0
    await disk.close()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


async def test_two_tebibytes_open_and_map_fast(tmp_path: Path, workers: Workers) -> None:
    path = str(tmp_path / "disk.vhd")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", path, "2040G"],
        check=True,
        timeout=60,
    )
    subprocess.run(
        ["qemu-io", "-f", "vpc", "-c", "write -P 7 1500G 64k", path],
        check=True,
        capture_output=True,
        timeout=60,
    )
    started = time.monotonic()
    disk = await open_image(path, "", Opening(workers))
    opened = time.monotonic()
    assert disk.size == 2040 << 30
    assert await content(disk, 1500 << 30, 65536) == b"\7" * 65536
    at, data = 0, 0
    while at < disk.size:
        found = await disk.extents(at, disk.size - at)
        data += sum(e.length for e in found if e.flags == DATA)
        at = found.end
    assert data == 2 * MIB
    assert opened - started < 1
    assert time.monotonic() - opened < 20  # some 1.5 s on a quiet machine
    await disk.close()
