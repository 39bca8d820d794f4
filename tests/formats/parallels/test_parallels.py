"""Parallels images: what qemu-img makes is read as qemu-img reads it; the old format by hand."""

import os
import random
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from protocol.extents import DATA, HOLE
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

MIB = 1 << 20
SCATTERED = CONTENTS[2]
IN_USE = struct.pack("<I", 0x746F6E59)

each_content = pytest.mark.parametrize("image", CONTENTS, ids=lambda image: image.name)


def opener(path: str, workers: Workers) -> OpenDisk:
    async def open_disk() -> Disk:
        return await open_image(path, "", Opening(workers))

    return open_disk


async def refusal(path: str, workers: Workers) -> DiskError:
    """What reading all of it raises."""
    with pytest.raises(DiskError) as raised:
        await everything(path, "parallels", workers)
    return raised.value


def patch(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def old_image(path: Path, cluster: int, disk_sectors: int, places: list[int]) -> bytes:
    """A ``WithoutFreeSpace`` image of ``cluster`` sectors; ``places`` in sectors, 0 is a hole."""
    chance = random.Random(cluster)
    header = struct.pack(
        "<16s5IQIIIQ", b"WithoutFreeSpace", 2, 16, 63, cluster, len(places),
        disk_sectors | 0xDEAD << 32, 0, 0, 0, 0,
    )  # fmt: skip
    image = bytearray(header + struct.pack(f"<{len(places)}I", *places))
    golden = bytearray()
    for place in places:
        data = chance.randbytes(cluster * 512) if place else bytes(cluster * 512)
        golden += data
        if place:
            image.extend(bytes(max(place * 512 + len(data) - len(image), 0)))
            image[place * 512 : place * 512 + len(data)] = data
    path.write_bytes(image)
    return bytes(golden[: disk_sectors * 512])


@each_content
async def test_contract(tmp_path: Path, workers: Workers, image: Image) -> None:
    path, golden = converted(tmp_path, image, "parallels")
    await check_disk(opener(path, workers), golden, extents_granularity=512)


@each_content
async def test_as_qemu_reads_it(tmp_path: Path, workers: Workers, image: Image) -> None:
    path, _ = converted(tmp_path, image, "parallels")
    disk = await open_image(path, "", Opening(workers))
    assert read_by_qemu(path, "parallels") == await content(disk, 0, disk.size)
    assert mapped_by_qemu(path, "parallels") == states_only(await extent_map(disk))
    await disk.close()


async def test_other_cluster_size(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, SCATTERED, "parallels", "-o", "cluster_size=65536")
    await check_disk(opener(path, workers), golden, extents_granularity=65536)
    disk = await open_image(path, "", Opening(workers))
    assert disk.facts["cluster_size"] == 65536
    assert disk.facts["magic"] == "WithouFreSpacExt"
    await disk.close()


async def test_old_format_counts_in_sectors(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "old.hdd"
    golden = old_image(path, 63, 63 * 4 + 7, [200, 0, 9, 72, 300])
    assert golden == read_by_qemu(str(path), "parallels")
    await check_disk(opener(str(path), workers), golden, extents_granularity=512)


async def test_not_closed_and_with_an_extension(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, SCATTERED, "parallels")
    patch(path, 44, IN_USE)
    end = os.path.getsize(path)
    patch(path, 56, struct.pack("<Q", end // 512))
    patch(path, end, struct.pack("<Q", 0xAB234CEF23DCEA87) + bytes(MIB - 8))
    disk = await open_image(path, "", Opening(workers))
    assert await content(disk, 0, disk.size) == golden
    assert disk.facts["in_use"] is True
    assert disk.facts["extension"] is True
    await disk.close()


async def test_image_marked_empty(tmp_path: Path, workers: Workers) -> None:
    path, golden = converted(tmp_path, CONTENTS[0], "parallels")
    patch(path, 52, struct.pack("<I", 1))
    await check_disk(opener(path, workers), golden)


async def test_image_marked_empty_that_is_not(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, SCATTERED, "parallels")
    patch(path, 52, struct.pack("<I", 1))
    error = await refusal(path, workers)
    what = "the image is marked as empty, and its table is not"
    assert str(error) == f"corrupt image: {path} at 64: {what}"


async def test_sixteen_tebibytes_open_at_once(tmp_path: Path, workers: Workers) -> None:
    path, size = str(tmp_path / "huge.hds"), 16 << 40
    qemu("qemu-img", "create", "-f", "parallels", path, str(size))
    qemu("qemu-io", "-f", "parallels", "-c", f"write -P 7 {size - MIB} 1M", path)
    start = time.monotonic()
    disk = await open_image(path, "", Opening(workers))
    assert await content(disk, size - 4096, 4096) == b"\7" * 4096
    assert time.monotonic() - start < 20  # a few milliseconds on a quiet machine
    assert [e.flags for e in await disk.extents(size - 2 * MIB, 2 * MIB)] == [HOLE, DATA]
    await disk.close()


# --- bundles ---------------------------------------------------------------------------------

BASE_GUID = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
TOP_GUID = "{11111111-6958-40ff-92a7-860e329aab41}"
NO_GUID = "{00000000-0000-0000-0000-000000000000}"
BASE = Image("base", 3 * MIB, ((0, 2 * MIB),))
TOP = Image("top", 3 * MIB, ((MIB, 4096),))


def descriptor(folder: Path, base: str, top: str, *, kind: str = "Compressed") -> Path:
    images = "".join(
        f"<Image><GUID>{guid}</GUID><Type>{what}</Type><File>{name}</File></Image>"
        for guid, name, what in ((BASE_GUID, base, kind), (TOP_GUID, top, "Compressed"))
    )
    shots = "".join(
        f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"
        for guid, parent in ((BASE_GUID, NO_GUID), (TOP_GUID, BASE_GUID))
    )
    path = folder / "DiskDescriptor.xml"
    path.write_text(
        "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version='1.0'>"
        f"<StorageData><Storage><Blocksize>2048</Blocksize>{images}</Storage></StorageData>"
        f"<Snapshots><TopGUID>{TOP_GUID}</TopGUID>{shots}</Snapshots></Parallels_disk_image>"
    )
    return path


def bundle(folder: Path) -> tuple[str, bytes]:
    """A base and a delta; path of the delta, and what it holds."""
    _, base_golden = converted(folder, BASE, "parallels")
    top, top_golden = converted(folder, TOP, "parallels")
    descriptor(folder, "base.parallels", "top.parallels")
    return top, base_golden[:MIB] + top_golden[MIB : 2 * MIB] + base_golden[2 * MIB :]


async def test_delta_in_a_bundle(tmp_path: Path, workers: Workers) -> None:
    top, golden = bundle(tmp_path)
    await check_disk(opener(top, workers), golden, extents_granularity=MIB)
    disk = await open_image(top, "", Opening(workers))
    assert str(disk.facts["parent"]).endswith("base.parallels")
    await disk.close()


async def test_plain_image_below_a_delta(tmp_path: Path, workers: Workers) -> None:
    top, golden = bundle(tmp_path)
    descriptor(tmp_path, "base.raw", "top.parallels", kind="Plain")
    disk = await open_image(top, "", Opening(workers))
    assert await content(disk, 0, disk.size) == golden
    await disk.close()


async def test_missing_base_of_a_bundle(tmp_path: Path, workers: Workers) -> None:
    top, _ = bundle(tmp_path)
    os.unlink(tmp_path / "base.parallels")
    error = await refusal(top, workers)
    assert "base.parallels" in str(error)
    assert f"the parent of {top}" in str(error)


async def test_descriptor_that_does_not_know_the_parent(tmp_path: Path, workers: Workers) -> None:
    top, _ = bundle(tmp_path)
    path = descriptor(tmp_path, "base.parallels", "top.parallels")
    path.write_text(path.read_text().replace(f"<GUID>{BASE_GUID}", f"<GUID>{NO_GUID}"))
    error = await refusal(top, workers)
    assert isinstance(error, CorruptImage)
    assert f"no image {BASE_GUID}, the parent of {TOP_GUID}" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<a>",
        "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
        "<a>" * 5000,
        "<?xml version='1.0' encoding='klingon'?><a/>",
        "\0\xff",
    ],
)
async def test_broken_descriptor(tmp_path: Path, workers: Workers, text: str) -> None:
    top, _ = bundle(tmp_path)
    (tmp_path / "DiskDescriptor.xml").write_text(text)
    error = await refusal(top, workers)
    assert isinstance(error, CorruptImage)
    assert "DiskDescriptor.xml at 0: " in str(error)


async def test_descriptor_of_another_disk(tmp_path: Path, workers: Workers) -> None:
    bundle(tmp_path)
    path, golden = converted(tmp_path, SCATTERED, "parallels")
    disk = await open_image(path, "", Opening(workers))
    assert await content(disk, 0, disk.size) == golden
    await disk.close()


async def test_split_disk(tmp_path: Path, workers: Workers) -> None:
    top, _ = bundle(tmp_path)
    path = descriptor(tmp_path, "base.parallels", "top.parallels")
    path.write_text(path.read_text().replace("</Storage>", "</Storage><Storage/>"))
    error = await refusal(top, workers)
    assert isinstance(error, UnsupportedImage)
    assert "split into 2 files" in str(error)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (28, struct.pack("<I", 0), "at 28: clusters of 0 sectors"),
        (28, b"\xff" * 4, "at 28: clusters of 4294967295 sectors"),
        (32, struct.pack("<I", 5), "at 32: 5 clusters of 2048 sectors for a disk of "),
        (32, struct.pack("<I", 1 << 31), "at 64: the cluster table reaches beyond"),
        (36, b"\xff" * 8, "at 32: "),
        (56, struct.pack("<Q", 1), "at 512: no format extension where the header says"),
        (56, b"\xff" * 8, "at "),
        (64, struct.pack("<I", 77), "at 64: the cluster at 80740352 lies beyond the end"),
        (64, b"\xff" * 4, "at 64: the cluster at "),
    ],
)
async def test_header_or_table_that_contradicts_itself(
    tmp_path: Path, workers: Workers, at: int, value: bytes, expected: str
) -> None:
    path, _ = converted(tmp_path, SCATTERED, "parallels")
    patch(path, at, value)
    error = await refusal(path, workers)
    assert isinstance(error, CorruptImage)
    assert str(error).startswith(f"corrupt image: {path} {expected}")


async def test_cluster_used_twice(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, SCATTERED, "parallels")
    raw = Path(path).read_bytes()
    patch(path, 64, raw[68:72])
    (entry,) = struct.unpack("<I", raw[68:72])
    assert str(await refusal(path, workers)) == (
        f"corrupt image: {path} at 68: the cluster at {entry * MIB} is used twice"
    )


async def test_old_clusters_that_overlap(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "old.hdd"
    old_image(path, 63, 63 * 2, [200, 262])
    assert "at 68: the cluster at 134144 is used twice" in str(await refusal(str(path), workers))


async def test_other_version(tmp_path: Path, workers: Workers) -> None:
    path, _ = converted(tmp_path, SCATTERED, "parallels")
    patch(path, 16, struct.pack("<I", 3))
    assert isinstance(await refusal(path, workers), UnsupportedImage)


@pytest.mark.parametrize("left", [0, 16, 63, 66, 80, MIB, 2 * MIB + 5, -1])
async def test_truncated(tmp_path: Path, workers: Workers, left: int) -> None:
    path, _ = converted(tmp_path, SCATTERED, "parallels")
    os.truncate(path, left if left >= 0 else os.path.getsize(path) + left)
    error = await refusal(path, workers)
    assert isinstance(error, CorruptImage)
    assert str(error).startswith(f"corrupt image: {path} at ")


def test_mutants(tmp_path: Path) -> None:
    path, _ = converted(tmp_path, SCATTERED, "parallels")
    good = Path(path).read_bytes()
    mutant = tmp_path / "mutant.hds"
    with threads() as (runner, workers):

        @given(mutations(256))
        def search(changes: list[Mutation]) -> None:
            runner.run(outcome(mutant, good, changes, "parallels", workers))

        search()
