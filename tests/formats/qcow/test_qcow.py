"""qcow, version 1: what qemu-img makes is read and mapped as QEMU does it."""

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, UnsupportedImage
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.formats.images import IMAGES, Image
from tests.formats.mutants import Mutation, mutations, outcome, threads
from tests.formats.qcow2.peer import (
    converted,
    create,
    opener,
    qemu_img,
    qemu_io,
    read_by_qemu,
    refusal,
    states_by_qemu,
)

MIB = 1 << 20
MIXED = Image("mixed", 3 * MIB + 512, ((0, 65536), (300_000, 70_000), (3 * MIB - 512, 1024)))
WHOLE_SECTORS = [image for image in IMAGES if image.size % 512 == 0 and image.size]


def compressed(raw: Path) -> Path:
    """The raw image as a compressed qcow. qemu-img 7.2 makes one, and then says it has failed."""
    path = raw.with_suffix(".qcow")
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow", raw, path], check=False)
    assert read_by_qemu(path, "qcow") == raw.read_bytes()
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("image", [MIXED, *WHOLE_SECTORS], ids=lambda image: image.name)
async def test_contract(tmp_path: Path, workers: Workers, image: Image, packed: bool) -> None:
    path, golden = converted(tmp_path, image, kind="qcow")
    if packed:
        path = compressed(path.with_suffix(".raw"))
    disk = await opener(path, workers)()
    assert disk.format == "qcow"
    assert await extent_map(disk) == states_by_qemu(path, "qcow")
    await disk.close()
    assert read_by_qemu(path, "qcow") == golden
    await check_disk(opener(path, workers), golden)


async def test_words_that_shrink(tmp_path: Path, workers: Workers) -> None:
    raw = tmp_path / "words.raw"
    golden = b"".join(b"%d bottles of beer on the wall\n" % n for n in range(50_000))
    golden = golden[: len(golden) // 512 * 512]
    raw.write_bytes(golden)
    path = compressed(raw)
    assert path.stat().st_size < len(golden) // 2
    disk = await opener(path, workers)()
    assert await content(disk, 0, len(golden)) == golden
    await disk.close()


@pytest.mark.parametrize("size", ["256k", "4M"])
async def test_shorter_and_longer_than_what_is_below(
    tmp_path: Path, workers: Workers, size: str
) -> None:
    converted(tmp_path, MIXED)
    path = tmp_path / "top.qcow"
    qemu_img("create", "-q", "-f", "qcow", "-F", "qcow2", "-b", "mixed.qcow2", path, size)
    qemu_io(path, "write -P 5 1000 3000")
    await check_disk(opener(path, workers), read_by_qemu(path, "qcow"))


async def test_a_huge_sparse_image(tmp_path: Path, workers: Workers) -> None:
    path = create(tmp_path / "huge.qcow", "2T", kind="qcow")
    qemu_io(path, "write -P 7 1T 4k")
    disk = await opener(path, workers)()
    assert await content(disk, (1 << 40) - 4, 8) == b"\0\0\0\0\7\7\7\7"
    await disk.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "disk.qcow", "1M", kind="qcow")
    qemu_io(path, "write -P 1 0 12k")
    return path


def patched(path: Path, at: int, value: int, size: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + size] = value.to_bytes(size, "big")
    path.write_bytes(data)
    return path


async def test_aes_is_refused(image: Path, workers: Workers) -> None:
    error = await refusal(patched(image, 36, 1, 4), workers)
    assert isinstance(error, UnsupportedImage)
    assert "encrypted (AES)" in str(error)


@pytest.mark.parametrize(
    ("at", "value", "size"),
    [
        (8, 40, 8),
        (8, 1 << 63, 8),
        (24, 1 << 63, 8),
        (24, 1 << 62, 8),
        (32, 8, 1),
        (32, 17, 1),
        (33, 5, 1),
        (33, 14, 1),
        (36, 2, 4),
        (40, 0, 8),
        (40, 1 << 60, 8),
        (40, 51, 8),
    ],
)
async def test_a_broken_header(
    image: Path, workers: Workers, at: int, value: int, size: int
) -> None:
    assert isinstance(await refusal(patched(image, at, value, size), workers), CorruptImage)


@pytest.mark.parametrize(
    "value", [4096 * 3 + 1, 1 << 50, 1 << 63 | 1 << 50, 1 << 63 | 4096, 48, 4096 * 2]
)
async def test_a_broken_entry_costs_only_its_cluster(
    image: Path, workers: Workers, value: int
) -> None:
    data = image.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    (l2,) = struct.unpack_from(">Q", data, l1)
    disk = await opener(patched(image, l2 + 8, value, 8), workers)()
    with pytest.raises(CorruptImage) as raised:
        await content(disk, 0, disk.size)
    # A sibling's cluster that it claims is doubtful as well.
    assert raised.value.offset in {0, 4096}
    assert await content(disk, 8192, 4096) == b"\1" * 4096
    await disk.close()


@pytest.mark.parametrize("size", [0, 10, 47, 50, 4096, 9000])
async def test_truncated(image: Path, workers: Workers, size: int) -> None:
    image.write_bytes(image.read_bytes()[:size])
    assert isinstance(await refusal(image, workers, kind="qcow"), CorruptImage)


def test_mutants(tmp_path: Path) -> None:
    path, _ = converted(tmp_path, Image("good", 65536, ((0, 9000), (50_000, 900))), kind="qcow")
    good = path.read_bytes()
    with threads() as (runner, workers):
        seen = set()

        @given(mutations(1024))
        @settings(max_examples=150, derandomize=True)
        def run(changes: list[Mutation]) -> None:
            found = runner.run(outcome(tmp_path / "mutant", good, changes, "qcow", workers))
            seen.add(found.partition(" at ")[0])

        run()
        assert len(seen) > 1
