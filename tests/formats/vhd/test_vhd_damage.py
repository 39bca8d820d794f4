"""VHDs that are broken: what can be read is, everything else is an error that says where."""

import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.formats.opening import Opening, open_image
from tests.disk.reading import content
from tests.formats.mutants import Mutation, mutations, outcome, threads
from tests.formats.vhd.vhd_images import (
    BASE_ID,
    CHILD_ID,
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    Block,
    Vhd,
)

SMALL = 4096
BAT = 1536
FIRST_BLOCK = BAT + 512


def image(**fields: object) -> Vhd:
    vhd = Vhd(**{"size": 8 * SMALL, "block_size": SMALL, **fields})  # type: ignore[arg-type]
    vhd.blocks = {n: Block(random.Random(n).randbytes(SMALL)) for n in (0, 1, 2, 5)}
    return vhd


async def read(path: Path, workers: Workers, kind: str = "") -> bytes:
    disk = await open_image(str(path), kind, Opening(workers))
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


async def refusal(path: Path, workers: Workers) -> DiskError:
    with pytest.raises(DiskError) as raised:
        await read(path, workers, "vhd")
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    return raised.value


def sum_up(raw: bytearray, start: int, length: int, at: int) -> None:
    """Correct the checksum of a footer or header that has been changed."""
    struct.pack_into(">I", raw, start + at, 0)
    total = sum(raw[start : start + length])
    struct.pack_into(">I", raw, start + at, ~total & 0xFFFFFFFF)


# --- footers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [512, 511, 1])
async def test_without_its_footer_the_copy_counts(
    tmp_path: Path, workers: Workers, cut: int
) -> None:
    raw = image().build()
    (tmp_path / "disk.vhd").write_bytes(raw[:-cut])
    assert await read(tmp_path / "disk.vhd", workers) == image().content()


async def test_a_damaged_footer_yields_to_the_copy(tmp_path: Path, workers: Workers) -> None:
    raw = bytearray(image().build())
    raw[-512 + 48] ^= 1  # the size
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert await read(tmp_path / "disk.vhd", workers) == image().content()


async def test_a_damaged_copy_does_not_matter(tmp_path: Path, workers: Workers) -> None:
    raw = bytearray(image().build())
    raw[100] ^= 1
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert await read(tmp_path / "disk.vhd", workers) == image().content()


async def test_of_two_intact_footers_the_one_at_the_end_counts(
    tmp_path: Path, workers: Workers
) -> None:
    raw = bytearray(image().build())
    raw[-512:] = image(size=7 * SMALL).footer()
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert await read(tmp_path / "disk.vhd", workers) == image().content()[: 7 * SMALL]


async def test_two_damaged_footers(tmp_path: Path, workers: Workers) -> None:
    raw = bytearray(image().build())
    raw[100] ^= 1
    raw[-100] ^= 1
    (tmp_path / "disk.vhd").write_bytes(raw)
    text = str(await refusal(tmp_path / "disk.vhd", workers))
    assert f"at {len(raw) - 512}: no footer" in text


async def test_a_guest_cannot_turn_its_fixed_disk_into_another(
    tmp_path: Path, workers: Workers
) -> None:
    inner = image(kind=DIFFERENCING, parent_name="/etc/passwd").build()
    outer = Vhd(size=len(inner), kind=FIXED)
    (tmp_path / "disk.vhd").write_bytes(inner + outer.footer())
    assert await read(tmp_path / "disk.vhd", workers) == inner


@pytest.mark.parametrize("kind", [DYNAMIC, FIXED])
async def test_footer_of_511_bytes(tmp_path: Path, workers: Workers, kind: int) -> None:
    raw = image(kind=kind).build()[:-1]
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert await read(tmp_path / "disk.vhd", workers, "vhd") == image().content()
    disk = await open_image(str(tmp_path / "disk.vhd"), "vhd", Opening(workers))
    assert disk.size == 8 * SMALL
    await disk.close()


@pytest.mark.parametrize(
    ("creator", "version", "read_well"),
    [(b"tap\0", 0x1, True), (b"tap\0", 0x10001, True), (b"tap\0", 0x10003, False),
     (b"test", 0x10001, False)],
)  # fmt: skip
async def test_hidden_without_summing_up_again(
    tmp_path: Path, workers: Workers, creator: bytes, version: int, read_well: bool
) -> None:
    vhd = image(
        creator=creator, creator_version=version, hidden=1, forget_hidden=True,
        least_first=version == 1,
    )  # fmt: skip
    vhd.write(tmp_path / "disk.vhd")
    if read_well:
        assert await read(tmp_path / "disk.vhd", workers) == vhd.content()
    else:
        await refusal(tmp_path / "disk.vhd", workers)


async def test_hidden_and_summed_up(tmp_path: Path, workers: Workers) -> None:
    image(hidden=1).write(tmp_path / "disk.vhd")
    assert await read(tmp_path / "disk.vhd", workers) == image().content()


@pytest.mark.parametrize("cut", [1, 512, SMALL])
async def test_a_truncated_fixed_disk(tmp_path: Path, workers: Workers, cut: int) -> None:
    vhd = image(kind=FIXED)
    raw = vhd.build()
    (tmp_path / "disk.vhd").write_bytes(raw[: -512 - cut] + raw[-512:])
    text = str(await refusal(tmp_path / "disk.vhd", workers))
    assert "truncated" in text


async def test_unknown_kinds(tmp_path: Path, workers: Workers) -> None:
    image(kind=6).write(tmp_path / "disk.vhd")
    assert isinstance(await refusal(tmp_path / "disk.vhd", workers), UnsupportedImage)
    raw = bytearray(image().build())
    for start in (0, len(raw) - 512):
        raw[start + 13] = 2
        sum_up(raw, start, 512, 64)
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert "version 2" in str(await refusal(tmp_path / "disk.vhd", workers))


@pytest.mark.parametrize("size", [0, 1, 511, 512])
async def test_files_too_short_for_anything(tmp_path: Path, workers: Workers, size: int) -> None:
    (tmp_path / "disk.vhd").write_bytes(image().build()[:size])
    await refusal(tmp_path / "disk.vhd", workers)


async def test_a_disk_of_no_bytes(tmp_path: Path, workers: Workers) -> None:
    Vhd(size=0, entries=4).write(tmp_path / "disk.vhd")
    assert await read(tmp_path / "disk.vhd", workers) == b""


# --- header and block table ----------------------------------------------------------------------


async def test_a_damaged_header(tmp_path: Path, workers: Workers) -> None:
    raw = bytearray(image().build())
    raw[512 + 700] ^= 0x10
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert "at 548: the checksum" in str(await refusal(tmp_path / "disk.vhd", workers))


@pytest.mark.parametrize(
    ("at", "form", "value", "text"),
    [
        (16, ">Q", 1 << 40, "beyond the end"),
        (16, ">Q", (1 << 64) - 1, "beyond the end"),
        (24, ">I", 0x00020000, "version 2"),
        (28, ">I", 7, "a table of 7 blocks"),
        (28, ">I", 0xFFFFFFFF, "beyond the end"),
        (32, ">I", 0, "blocks of 0 bytes"),
        (32, ">I", 256, "blocks of 256 bytes"),
        (32, ">I", 3 << 20, "not a power of 2"),
        (0, "8s", b"xxsparse", "no VHD header"),
    ],
)
async def test_impossible_headers(
    tmp_path: Path, workers: Workers, at: int, form: str, value: int, text: str
) -> None:
    raw = bytearray(image().build())
    struct.pack_into(form, raw, 512 + at, value)
    sum_up(raw, 512, 1024, 36)
    (tmp_path / "disk.vhd").write_bytes(raw)
    assert text in str(await refusal(tmp_path / "disk.vhd", workers))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (0, "on the copy of the footer"),
        (1, "on the header"),
        (2, "on the header"),
        (3, "on the block table"),
        (0x7FFFFFFF, "beyond the end"),
        (0xFFFFFFFE, "beyond the end"),
        (FIRST_BLOCK // 512, "overlaps"),
        (FIRST_BLOCK // 512 + 8, "overlaps"),
        (FIRST_BLOCK // 512 + 35, "overlaps"),
        (FIRST_BLOCK // 512 + 36, "beyond the end"),
    ],
)
async def test_impossible_entries(tmp_path: Path, workers: Workers, entry: int, text: str) -> None:
    image(bat={7: entry}).write(tmp_path / "disk.vhd")
    error = await refusal(tmp_path / "disk.vhd", workers)
    assert isinstance(error, CorruptImage)
    assert text in str(error)
    assert f"at {BAT + 4 * 7}: block 7" in str(error) or "overlaps" in text


async def test_a_block_on_the_name_of_the_parent(tmp_path: Path, workers: Workers) -> None:
    image().write(tmp_path / "base.vhd")
    vhd = image(
        kind=DIFFERENCING, unique_id=CHILD_ID, parent_id=BASE_ID, bat={7: 3},
        locators=[(b"W2ru", "base.vhd".encode("utf-16-le"))],
    )  # fmt: skip
    vhd.write(tmp_path / "disk.vhd")
    assert "on the name of the parent" in str(await refusal(tmp_path / "disk.vhd", workers))


async def test_one_bad_entry_leaves_the_other_pages_readable(
    tmp_path: Path, workers: Workers
) -> None:
    block = 2 << 20
    vhd = Vhd(size=64 * block, bat={40: 0x7FFFFFFF})
    vhd.blocks = {1: Block(random.Random(1).randbytes(block)), 63: Block(bytes(block))}
    vhd.write(tmp_path / "disk.vhd")
    disk = await open_image(str(tmp_path / "disk.vhd"), "", Opening(workers))
    assert await content(disk, block, block) == vhd.blocks[1].data
    with pytest.raises(CorruptImage, match="block 40"):
        await content(disk, 40 * block, 512)
    assert await content(disk, 63 * block, block) == bytes(block)
    await disk.close()


async def test_a_truncated_file_is_read_up_to_the_loss(tmp_path: Path, workers: Workers) -> None:
    raw = image().build()
    for length in range(512 + 1024, len(raw) - 512, 1000):
        (tmp_path / "disk.vhd").write_bytes(raw[:length])
        await refusal(tmp_path / "disk.vhd", workers)


# --- mutants -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=mutations(FIRST_BLOCK + 512))
def test_mutants(tmp_path_factory: pytest.TempPathFactory, changes: list[Mutation]) -> None:
    directory = tmp_path_factory.mktemp("mutants")
    image().write(directory / "base.vhd")
    vhd = image(
        kind=DIFFERENCING, unique_id=CHILD_ID, parent_id=BASE_ID, parent_name="base.vhd",
        locators=[(b"W2ru", "base.vhd".encode("utf-16-le"))],
    )  # fmt: skip
    good = bytearray(vhd.build())
    for at, value in changes:
        good[at : at + len(value)] = value
    # Checksums made right again, or nothing would get past them.
    sum_up(good, 0, 512, 64)
    sum_up(good, 512, 1024, 36)
    cut = good[:-512] if len(changes) % 2 else good
    with threads() as (runner, workers):
        runner.run(outcome(directory / "disk.vhd", bytes(cut), [], "vhd", workers))
