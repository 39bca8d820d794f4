"""Broken and hostile images: an error that says where, in bounded time; never a crash.

::

    image ── one or more bytes of metadata changed ──> opened, mapped, read in full
                                                        or DiskError: corrupt image: FILE at ...
"""

import asyncio
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.vmdk.descriptor import Descriptor, ExtentLine, render
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.formats.vmdk import laid_out
from tests.formats.vmdk.images import GOLDEN, MIB, qemu_img, qemu_io
from tests.formats.vmdk.laid_out import ZERO, described, hosted, se_sparse, vmfs_sparse

Kind = Callable[[Path], Path]
MAX_SECONDS = 5.0
"""For one broken image of a few MiB, on a machine that is busy with other things."""


async def opened(workers: Workers, path: Path) -> Disk:
    return await open_image(str(path), "vmdk", Opening(workers))


async def read_all(workers: Workers, path: Path) -> bytes:
    """Open, map and read; the error if there is one."""
    disk = await opened(workers, path)
    try:
        size = min(disk.size, 16 * MIB)
        at = 0
        while at < size:
            at += (await disk.extents(at, size - at)).length
        return await content(disk, 0, size)
    finally:
        await disk.close()


async def outcome(workers: Workers, path: Path) -> bytes | None:
    """What it reads as, None if it is refused, which must be done in one line."""
    refused = None
    try:
        return await read_all(workers, path)
    except DiskError as error:
        refused = error
    assert "\n" not in str(refused)
    assert str(path.parent) in str(refused)
    return None


def patched(path: Path, position: int, data: bytes) -> Path:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)
    return path


def simple(path: Path, **raw: int) -> Path:
    text = Descriptor("monolithicSparse", (ExtentLine(2 * MIB // 512, "SPARSE", path.name),))
    grains = {0: b"a" * 65536, 1: ZERO, 3: b"b" * 65536, 31: b"c" * 65536}
    return hosted(path, 2 * MIB, grains, descriptor=render(text).encode(), **raw)


def stream(path: Path) -> Path:
    pieces = {at // 65536: GOLDEN[at : at + 65536] for at in range(0, 2 * MIB, 65536)}
    grains = {number: piece for number, piece in pieces.items() if any(piece)}
    return laid_out.stream(path, 2 * MIB + 512, grains | {32: GOLDEN[:512]})


def delta(path: Path) -> Path:
    vmfs_sparse(path.with_name("extent.vmdk"), 2 * MIB, {5: b"x" * 512, 4095: b"y" * 512})
    line = ExtentLine(2 * MIB // 512, "VMFSSPARSE", "extent.vmdk")
    described(path, "vmfsSparse", line)
    return path.with_name("extent.vmdk")


def se_delta(path: Path) -> Path:
    grains = {5: b"x" * 4096, 6: ZERO, 511: b"y" * 4096}
    se_sparse(path.with_name("extent.vmdk"), 2 * MIB, grains)
    described(path, "seSparse", ExtentLine(2 * MIB // 512, "SESPARSE", "extent.vmdk"))
    return path.with_name("extent.vmdk")


# --- one thing wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("version", 0, "VMDK version 0 is not served"),
        ("version", 4, "VMDK version 4 is not served"),
        ("newlines", b"\n \n\n", "at 73: line ends were converted"),
        ("capacity", 0, "at 12: a disk of 0 sectors"),
        ("capacity", 1 << 54, "at 12: a disk of"),
        ("capacity", 1 << 53, "at 0: its grain directory at 16384 lies beyond the end"),
        ("grain_size", 0, "at 20: grains of 0 sectors"),
        ("grain_size", 3, "at 20: grains of 3 sectors"),
        ("grain_size", 1 << 22, "at 20: grains of 4194304 sectors"),
        ("grain_size", 1 << 63, "at 20: grains of"),
        ("entries_per_table", 0, "at 44: grain tables of 0 entries"),
        ("entries_per_table", 513, "at 44: grain tables of 513 entries"),
        ("gd_offset", 1 << 40, "at 0: its grain directory at 562949953421312 lies beyond"),
        ("gd_offset", (1 << 64) - 1, "a stream without footer, was it cut off?"),
        ("compression", 2, "compression method 2 is not known"),
        ("flags", 1 << 16, "at 77: compressed grains, but no compression method"),
        ("descriptor_offset", 1 << 40, "descriptor lies beyond the end"),
        ("descriptor_size", 1 << 30, "a descriptor of 549755813888 bytes"),
    ],
)
async def test_header(tmp_path: Path, field: str, value: int, what: str, workers: Workers) -> None:
    path = simple(tmp_path / "disk.vmdk", **{field: value})
    with pytest.raises(DiskError) as raised:
        await read_all(workers, path)
    assert what in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("position", "entry", "what"),
    [
        (64 * 512, 1 << 30, "at 32768: a grain at 549755813888 lies beyond the end of the file"),
        (64 * 512, 2, "at 32768: a grain at 1024 lies within the metadata"),
        (64 * 512, 32, "at 32768: a grain at 16384 lies within the metadata"),
        (64 * 512 + 4 * 31, 384 + 64, "at 32768: two grains share the bytes at"),
        (32 * 512, 1 << 30, "grain table lies beyond the end of the file"),
        (32 * 512, 1, "at 512: a grain table at 512 lies within the metadata"),
    ],
)
async def test_table_entries(
    tmp_path: Path, position: int, entry: int, what: str, workers: Workers
) -> None:
    path = patched(simple(tmp_path / "disk.vmdk"), position, struct.pack("<I", entry))
    with pytest.raises(CorruptImage) as raised:
        await read_all(workers, path)
    assert what in str(raised.value)


async def test_two_grains_in_one_place(tmp_path: Path, workers: Workers) -> None:
    path = simple(tmp_path / "disk.vmdk")
    entry = path.read_bytes()[64 * 512 : 64 * 512 + 4]
    with pytest.raises(CorruptImage, match="at 32768: two grains share the bytes at"):
        await read_all(workers, patched(path, 64 * 512 + 20, entry))


async def test_zero_grain_in_an_image_that_has_none(tmp_path: Path, workers: Workers) -> None:
    path = simple(tmp_path / "disk.vmdk", flags=0)
    with pytest.raises(CorruptImage, match="at 32772: a grain of zeroes, but its header knows"):
        await read_all(workers, path)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (4 << 60, "no place of a grain: 0x4000000000000000"),
        (1, "no place of a grain: 0x1"),
        (3 << 60 | 1 << 40, "lies beyond the end of the file"),
    ],
)
async def test_se_sparse_entries(tmp_path: Path, entry: int, what: str, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    patched(se_delta(path), 32 * 512 + 8 * 20, struct.pack("<Q", entry))
    with pytest.raises(CorruptImage, match=what):
        await read_all(workers, path)


async def test_se_sparse_tables_elsewhere(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    patched(se_delta(path), 16 * 512, struct.pack("<Q", 1 << 60 | 7))
    with pytest.raises(CorruptImage, match="at 8192: no place of a table: 0x1000000000000007"):
        await read_all(workers, path)


# --- streams ---------------------------------------------------------------------------------


def first_grain(path: Path) -> tuple[int, int]:
    """Position of the first grain's marker, and how long its deflated bytes are."""
    data = path.read_bytes()
    position = data.index(b"\x78", 65536) - 12
    return position, struct.unpack_from("<QI", data, position)[1]


async def test_grain_marked_for_another_place(tmp_path: Path, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    position, _ = first_grain(path)
    patched(path, position, struct.pack("<Q", 0x4242))
    with pytest.raises(
        CorruptImage, match=f"at {position}: .* marked as for sector 16962"
    ) as raised:
        await read_all(workers, path)
    assert f"at {position}: " in str(raised.value)
    assert raised.value.offset is not None
    assert raised.value.offset % 65536 == 0


@pytest.mark.parametrize("size", [0, 131_073, 0xFFFFFFFF])
async def test_grain_of_impossible_length(tmp_path: Path, size: int, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    position, _ = first_grain(path)
    patched(path, position + 8, struct.pack("<I", size))
    with pytest.raises(
        CorruptImage, match=f"at {position + 8}: a compressed grain of {size} bytes"
    ):
        await read_all(workers, path)


async def test_grain_that_is_no_zlib_stream(tmp_path: Path, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    position, _ = first_grain(path)
    patched(path, position + 12, b"\xff" * 20)
    with pytest.raises(CorruptImage, match=f"at {position}: a compressed grain is broken"):
        await read_all(workers, path)


async def test_grain_whose_checksum_is_wrong(tmp_path: Path, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    position, size = first_grain(path)
    last = path.read_bytes()[position + 12 + size - 1]
    patched(path, position + 12 + size - 1, bytes([last ^ 1]))
    with pytest.raises(CorruptImage, match="a compressed grain is broken"):
        await read_all(workers, path)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (bytes(65536 + 1), "a compressed grain is longer than a grain"),
        (bytes(100 << 20), "a compressed grain is longer than a grain"),
        (bytes(65535), "a compressed grain gives 65535 bytes only"),
        (b"", "a compressed grain gives 0 bytes only"),
    ],
)
async def test_grain_that_inflates_to_another_length(
    tmp_path: Path, raw: bytes, what: str, workers: Workers
) -> None:
    path = stream(tmp_path / "disk.vmdk")
    position, _ = first_grain(path)
    packed = zlib.compress(raw, 9)[:120_000]
    patched(path, position + 8, struct.pack("<I", len(packed)) + packed)
    with pytest.raises(CorruptImage, match=what):
        await read_all(workers, path)


async def test_grain_that_ends_too_early(tmp_path: Path, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    position, size = first_grain(path)
    patched(path, position + 8, struct.pack("<I", size - 5))
    with pytest.raises(CorruptImage, match="a compressed grain ends too early"):
        await read_all(workers, path)


@pytest.mark.parametrize("lost", [1, 512, 1024, 1536, 100_000])
async def test_stream_that_was_cut_off(tmp_path: Path, lost: int, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    os.truncate(path, path.stat().st_size - lost)
    with pytest.raises(CorruptImage, match="a stream without footer, was it cut off"):
        await read_all(workers, path)


async def test_footer_that_is_no_better_than_the_header(tmp_path: Path, workers: Workers) -> None:
    path = stream(tmp_path / "disk.vmdk")
    size = path.stat().st_size
    patched(path, size - 1024 + 56, b"\xff" * 8)
    with pytest.raises(CorruptImage, match=f"at {size - 1024}: the stream's footer does not say"):
        await read_all(workers, path)


# --- cut off, and everything else ------------------------------------------------------------


@pytest.mark.parametrize("make", [simple, stream, delta, se_delta])
async def test_cut_off_anywhere(tmp_path: Path, make: Kind, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    file = make(path)
    whole = file.read_bytes()
    full = await read_all(workers, path)
    for size in sorted({*range(0, 4096, 512), *range(1, len(whole), len(whole) // 23)}):
        file.write_bytes(whole[:size])
        assert await outcome(workers, path) in {full, None}, f"cut off at {size}"


METADATA = {
    simple: ((0, 80), (512, 400), (32 * 512, 8), (64 * 512, 128)),
    stream: ((0, 80), (512, 400), (65536, 600), (-6144, 6144)),
    delta: ((0, 40), (4 * 512, 8), (8 * 512, 64), (8 * 512 + 16300, 84)),
    se_delta: ((0, 240), (512, 32), (16 * 512, 16), (32 * 512, 64), (32 * 512 + 4080, 16)),
}
"""Where it matters what the bytes are: (position, length), from the end where negative."""


@st.composite
def mutations(draw: st.DrawFn, make: Kind) -> list[tuple[int, bytes]]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        position, length = draw(st.sampled_from(METADATA[make]))
        inside = draw(st.integers(0, length - 1))
        values = (
            st.binary(min_size=1, max_size=8)
            | st.sampled_from((b"\xff" * 4, bytes(4), b"\xff" * 8, bytes(8), b"\x01\0\0\0"))
            | st.integers(0, 1 << 33).map(lambda value: value.to_bytes(8, "little"))
        )
        found.append((position + inside, draw(values)))
    return found


@pytest.mark.parametrize("make", METADATA)
def test_mutated_metadata(tmp_path_factory: pytest.TempPathFactory, make: Kind) -> None:
    path = tmp_path_factory.mktemp("mutated") / "disk.vmdk"
    file = make(path)
    whole = file.read_bytes()

    @given(mutations(make))
    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    def mutated(changes: list[tuple[int, bytes]]) -> None:
        mutant = bytearray(whole)
        for position, data in changes:
            start = position % len(whole)
            end = min(start + len(data), len(whole))
            mutant[start:end] = data[: end - start]
        file.write_bytes(mutant)
        asyncio.run(examine(path))

    mutated()


async def examine(path: Path) -> None:
    async with running_workers() as workers:
        begun = time.monotonic()
        await outcome(workers, path)
        assert time.monotonic() - begun < MAX_SECONDS


async def test_huge_sizes_cost_nothing(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", path, 2 * MIB)
    qemu_io(path, "write -P 1 0 512")
    for capacity in (1 << 32, 1 << 40, 1 << 53):
        patched(path, 12, struct.pack("<Q", capacity))
        begun = time.monotonic()
        with pytest.raises(CorruptImage):
            await read_all(workers, path)
        assert time.monotonic() - begun < MAX_SECONDS
