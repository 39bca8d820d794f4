"""VDI: what qemu-img makes is read as qemu-img reads it."""

import hashlib
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import OpenDisk, check_disk, extent_map
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.mutants import Mutation, everything, mutations, outcome, threads
from tests.formats.table_images import (
    CONTENTS,
    converted,
    mapped_by_qemu,
    qemu,
    read_by_qemu,
    states_only,
)
from tests.formats.vdi.differencing import DATA_AT, discard, table_entry_at

MIB = 1 << 20
SCATTERED = CONTENTS[2]

each_content = pytest.mark.parametrize("image", CONTENTS, ids=lambda image: image.name)


def opener(path: str, workers: Workers) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(path, "", Opening(workers))

    return open_disk


async def refusal(path: str, workers: Workers) -> DiskError:
    """What reading all of it raises."""
    with pytest.raises(DiskError) as raised:
        await everything(path, "vdi", workers)
    return raised.value


@each_content
async def test_contract(tmp_path: Path, workers: Workers, image: Image) -> None:
    path, golden = converted(tmp_path, image, "vdi")
    await check_disk(opener(path, workers), golden, extents_granularity=512)


async def test_contract_of_a_fixed_image(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, CONTENTS[3], "vdi", "-o", "static=on")
    await check_disk(opener(path, workers), golden, extents_granularity=512)


@each_content
@pytest.mark.parametrize("static", ["off", "on"])
async def test_as_qemu_reads_it(
    tmp_path: Path, workers: Workers, image: Image, static: str
) -> None:
    path, _ = converted(tmp_path, image, "vdi", "-o", f"static={static}")
    disk = await open_image(path, "", Opening(workers))
    expected = read_by_qemu(path, "vdi")
    assert hashlib.sha256(expected).digest() == (
        hashlib.sha256(await content(disk, 0, disk.size)).digest()
    )
    states = states_only(await extent_map(disk))
    if static == "off":  # in a fixed image qemu asks the file system below, too
        assert mapped_by_qemu(path, "vdi") == states
    else:
        assert states == [(0, disk.size, False)]
    await disk.close()


async def test_written_in_any_order(tmp_path: Path, workers: Workers) -> None:
    path = str(tmp_path / "disk.vdi")
    qemu("qemu-img", "create", "-f", "vdi", path, "6M")
    for number, block in enumerate((4, 0, 5, 2), 1):
        qemu("qemu-io", "-f", "vdi", "-c", f"write -P {number} {block}M 1M", path)
    golden = b"".join(bytes([value]) * MIB for value in (2, 0, 4, 0, 1, 3))
    await check_disk(opener(path, workers), golden, extents_granularity=MIB)


async def test_facts(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    disk = await open_image(path, "", Opening(workers))
    assert disk.format == "vdi"
    assert disk.facts["kind"] == "dynamic"
    assert disk.facts["block_size"] == MIB
    assert disk.facts["creator"] == "QEMU VM Virtual Disk Image"
    await disk.close()


async def test_discarded_block_is_zero_and_absent_block_a_hole(
    tmp_path: Path, workers: Workers
) -> None:
    path, golden = converted(tmp_path, SCATTERED, "vdi")
    discard(path, 2)
    golden = golden[: 2 * MIB] + bytes(MIB) + golden[3 * MIB :]
    assert golden == read_by_qemu(path, "vdi")
    await check_disk(opener(path, workers), golden, extents_granularity=512)
    disk = await open_image(path, "", Opening(workers))
    found = [(e.length // MIB, e.flags) for e in await disk.extents(0, 6 * MIB)]
    assert found == [(1, HOLE), (1, DATA), (1, ZERO), (1, DATA), (1, HOLE), (1, DATA)]
    await disk.close()


async def test_extra_bytes_before_each_block(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, SCATTERED, "vdi")
    raw = Path(path).read_bytes()
    (data_at,) = struct.unpack_from("<I", raw, DATA_AT)
    spread = bytearray(raw[:data_at])
    struct.pack_into("<I", spread, 0x17C, 1024)
    for at in range(data_at, len(raw), MIB):
        spread += os.urandom(1024) + raw[at : at + MIB]
    Path(path).write_bytes(spread)
    await check_disk(opener(path, workers), golden, extents_granularity=512)


async def test_other_block_size(tmp_path: Path, workers: Workers) -> None:
    golden = os.urandom(65536) + bytes(65536) + os.urandom(1000)
    blocks = golden[:65536], golden[131072:].ljust(65536, b"\0")
    path, _ = converted(tmp_path, CONTENTS[-1], "vdi")
    raw = bytearray(Path(path).read_bytes()[:2048])
    struct.pack_into("<II", raw, 0x154, 512, 2048)
    struct.pack_into("<QIII", raw, 0x170, len(golden), 65536, 0, 3)
    struct.pack_into("<III", raw, 512, 1, 0xFFFF_FFFF, 0)
    Path(path).write_bytes(raw + blocks[1] + blocks[0])
    await check_disk(opener(path, workers), golden)


async def test_sixteen_tebibytes_open_at_once(tmp_path: Path, workers: Workers) -> None:
    path, size = str(tmp_path / "huge.vdi"), 16 << 40
    qemu("qemu-img", "create", "-f", "vdi", path, str(size))
    qemu("qemu-io", "-f", "vdi", "-c", f"write -P 7 {size - MIB} 1M", path)
    start = time.monotonic()
    disk = await open_image(path, "", Opening(workers))
    assert await content(disk, size - 4096, 4096) == b"\7" * 4096
    assert time.monotonic() - start < 20  # a few milliseconds on a quiet machine
    found, at = [], 0
    while at < size:
        answer = await disk.extents(at, size - at)
        found += [(e.length, e.flags) for e in answer]
        at = answer.end
    assert found == [(size - MIB, HOLE), (MIB, DATA)]
    await disk.close()


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "data", "expected"),
    [
        (0x178, struct.pack("<I", 0), "at 376: blocks of 0 bytes"),
        (0x178, struct.pack("<I", 1000), "at 376: blocks of 1000 bytes"),
        (0x17C, struct.pack("<I", 7), "at 380: 7 extra bytes"),
        (0x180, struct.pack("<I", 5), "at 384: 5 blocks of 1048576 bytes for 6291456"),
        (0x180, struct.pack("<I", 1 << 31), "at 344: blocks at"),
        (0x154, struct.pack("<I", 0), "at 340: the block table at 0 lies in the header"),
        (0x170, b"\xff" * 8, "at 384: "),
    ],
)
async def test_header_that_contradicts_itself(
    tmp_path: Path, workers: Workers, at: int, data: bytes, expected: str
) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    raw = bytearray(Path(path).read_bytes())
    raw[at : at + len(data)] = data
    Path(path).write_bytes(raw)
    error = await refusal(path, workers)
    assert isinstance(error, CorruptImage)
    assert str(error).startswith(f"corrupt image: {path} {expected}")


@pytest.mark.parametrize(("at", "value"), [(68, 2), (76, 3), (76, 0)])
async def test_versions_and_types_that_are_not_served(
    tmp_path: Path, workers: Workers, at: int, value: int
) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", value))
    error = await refusal(path, workers)
    assert isinstance(error, UnsupportedImage)
    assert path in str(error)


async def test_block_used_twice(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    discard(path, 4, 0)
    at = table_entry_at(path, 4)
    error = await refusal(path, workers)
    assert str(error) == f"corrupt image: {path} at {at}: stored block 0 is used twice"


@pytest.mark.parametrize("entry", [4, 1000, 0xFFFF_FFFD])
async def test_block_beyond_the_end(tmp_path: Path, workers: Workers, entry: int) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    discard(path, 4, entry)
    at = table_entry_at(path, 4)
    what = f"stored block {entry} lies beyond the end of the file"
    assert str(await refusal(path, workers)) == f"corrupt image: {path} at {at}: {what}"


@pytest.mark.parametrize("left", [0, 70, 400, 511, 530, 4096, 2 * MIB, -1, -600_000])
async def test_truncated(tmp_path: Path, workers: Workers, left: int) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    os.truncate(path, left if left >= 0 else os.path.getsize(path) + left)
    error = await refusal(path, workers)
    assert isinstance(error, CorruptImage)
    assert str(error).startswith(f"corrupt image: {path} at ")


async def test_last_block_stored_as_far_as_the_disk_goes(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, CONTENTS[3], "vdi")
    os.truncate(path, os.path.getsize(path) - MIB + 1536)
    await check_disk(opener(path, workers), golden, extents_granularity=512)


def test_mutants(tmp_path: Path) -> None:
    path, _ = converted(tmp_path, SCATTERED, "vdi")
    good = Path(path).read_bytes()
    mutant = tmp_path / "mutant.vdi"
    with threads() as (runner, workers):

        @given(mutations(1024))
        def search(changes: list[Mutation]) -> None:
            runner.run(outcome(mutant, good, changes, "vdi", workers))

        search()
