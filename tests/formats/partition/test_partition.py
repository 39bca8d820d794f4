"""Partitions: the ranges that sfdisk says, for every kind of table."""

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.partition import open_partition, read_partitions
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.formats.mutants import Mutation, mutations, threads
from tests.formats.partition.tables import listed_by_sfdisk, numbered, run, with_table

MIB = 1 << 20

MBR = "label: dos\n start=2048, size=2MiB, type=83\n start=8192, size=1MiB, type=7, bootable\n"
LOGICAL = (
    "label: dos\n1: size=1MiB, type=83\n2: size=12MiB, type=f\n"
    "5: size=1MiB, type=83\n6: size=2MiB, type=82\n7: size=3MiB, type=83\n"
)
GPT = "label: gpt\n size=1MiB, name=first\n size=2MiB, name=zweite-ü\n size=+\n"
SCRIPTS = [pytest.param(s, id=n) for n, s in (("mbr", MBR), ("logical", LOGICAL), ("gpt", GPT))]


async def opened(path: Path, workers: Workers) -> Disk:
    return await open_image(str(path), "raw", Opening(workers))


async def listed(path: Path, workers: Workers) -> list[tuple[int, int, int]]:
    disk = await opened(path, workers)
    try:
        found = await read_partitions(disk)
        return [(p.number, p.offset, p.length) for p in found]
    finally:
        await disk.close()


async def refusal(path: Path, number: int, workers: Workers) -> DiskError:
    disk = await opened(path, workers)
    with pytest.raises(DiskError) as raised:
        await open_partition(disk, number)
    with pytest.raises(DiskError):  # it has been closed
        await content(disk, 0, 512)
    return raised.value


def patch(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("script", SCRIPTS)
async def test_as_sfdisk_lists_them(tmp_path: Path, workers: Workers, script: str) -> None:
    path = with_table(tmp_path / "disk.img", script)
    expected = listed_by_sfdisk(path)
    assert len(expected) >= 2
    assert expected == await listed(path, workers)


@pytest.mark.parametrize("script", SCRIPTS)
async def test_content(tmp_path: Path, workers: Workers, script: str) -> None:
    path = with_table(tmp_path / "disk.img", script)
    raw = path.read_bytes()
    for number, offset, length in listed_by_sfdisk(path):
        if number == 2 and script == LOGICAL:
            continue
        disk = await open_partition(await opened(path, workers), number)
        assert disk.name == f"{path}~p{number}"
        assert await content(disk, 0, disk.size) == raw[offset : offset + length]
        await disk.close()


async def test_contract(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", LOGICAL)
    (offset, length) = next(p[1:] for p in listed_by_sfdisk(path) if p[0] == 5)

    async def open_disk() -> Disk:
        return await open_partition(await opened(path, workers), 5)

    await check_disk(open_disk, path.read_bytes()[offset : offset + length])


async def test_kinds_and_names(tmp_path: Path, workers: Workers) -> None:
    disk = await opened(with_table(tmp_path / "gpt.img", GPT), workers)
    found = await read_partitions(disk)
    assert [p.name for p in found] == ["first", "zweite-ü", ""]
    assert found[0].kind == "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    await disk.close()
    disk = await opened(with_table(tmp_path / "mbr.img", MBR), workers)
    assert [p.kind for p in await read_partitions(disk)] == ["0x83", "0x07"]
    await disk.close()


async def test_gpt_by_sgdisk_with_gaps_in_the_numbers(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    numbered(path, 16 * MIB)
    run("sgdisk", "-n", "3:4096:8191", "-n", "128:10240:12287", str(path))
    expected = [(3, 4096 * 512, 4096 * 512), (128, 10240 * 512, 2048 * 512)]
    assert expected == await listed(path, workers)
    assert str(await refusal(path, 1, workers)) == f"{path}: no partition 1; it has 3, 128"


async def test_gpt_by_parted(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    numbered(path, 16 * MIB)
    run("parted", "-s", str(path), "mklabel", "gpt", "mkpart", "a", "1MiB", "3MiB")
    assert [(1, MIB, 2 * MIB)] == await listed(path, workers)


async def test_hybrid_mbr_is_a_gpt(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    numbered(path, 16 * MIB)
    run("sgdisk", "-n", "1:4096:8191", "-n", "2:8192:10239", "-h", "2", str(path))
    assert [(1, 4096 * 512, 4096 * 512), (2, 8192 * 512, 2048 * 512)] == await listed(path, workers)


async def test_gpt_of_4096_byte_sectors(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    numbered(path, 16 * MIB)
    run("fdisk", "-b", "4096", str(path), script="g\nn\n1\n256\n+256\nn\n2\n1024\n2047\nw\n")
    expected = [(1, MIB, 257 * 4096), (2, 4 * MIB, 4 * MIB)]
    assert expected == await listed(path, workers)
    patch(path, 4096, bytes(4096))
    assert expected == await listed(path, workers)


async def test_old_gpt_behind_a_new_mbr_does_not_count(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", GPT)
    other = with_table(tmp_path / "other.img", MBR)
    patch(path, 0, other.read_bytes()[:512])
    assert listed_by_sfdisk(other) == await listed(path, workers)


# --- damage ----------------------------------------------------------------------------------


async def test_backup_gpt_when_the_primary_is_bad(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", GPT)
    expected = listed_by_sfdisk(path)
    for at, data in ((512 + 60, b"!"), (1024 + 5, b"!"), (512, bytes(512)), (0, bytes(16384))):
        patch(path, at, data)
        assert expected == await listed(path, workers)


async def test_both_gpts_are_bad(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", GPT)
    patch(path, 16 * MIB - 512 + 40, b"!")
    patch(path, 1024 + 5, b"!")
    error = await refusal(path, 1, workers)
    assert isinstance(error, CorruptImage)
    what = "the GPT's entries do not match their checksum"
    assert str(error) == f"corrupt image: {path} at 1024: {what}"


async def test_promised_gpt_is_missing(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", GPT)
    patch(path, 512, bytes(512))
    patch(path, 16 * MIB - 512, bytes(512))
    assert "promises a GPT" in str(await refusal(path, 1, workers))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (80, struct.pack("<I", 1 << 31), "GPT with 2147483648 entries of 128 bytes"),
        (84, struct.pack("<I", 0), "GPT entries of 0 bytes"),
        (84, struct.pack("<I", 8192), "GPT entries of 8192 bytes"),
        (72, struct.pack("<Q", 1 << 63), "lie beyond the end of the disk"),
        (24, struct.pack("<Q", 7), "the GPT header belongs into sector 7"),
        (12, struct.pack("<I", 1 << 20), "GPT header of 1048576 bytes"),
        (12, struct.pack("<I", 4), "GPT header of 4 bytes"),
    ],
)
async def test_gpt_header_whose_checksum_is_right(
    tmp_path: Path, workers: Workers, field: int, value: bytes, expected: str
) -> None:
    path = with_table(tmp_path / "disk.img", GPT)
    patch(path, 16 * MIB - 512, bytes(512))
    header = bytearray(path.read_bytes()[512:1024])
    header[field : field + len(value)] = value
    header[16:20] = bytes(4)
    header[16:20] = struct.pack("<I", zlib.crc32(header[:92]))
    patch(path, 512, bytes(header))
    error = await refusal(path, 1, workers)
    assert isinstance(error, CorruptImage)
    assert expected in str(error)


async def test_no_table_at_all(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    for size in (0, 1, 511, 512, 600, 5 * MIB):
        numbered(path, size)
        assert "no partition table" in str(await refusal(path, 1, workers))


async def test_boot_sector_of_a_file_system(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes((b"\xeb\x3c\x90MSDOS5.0" + b"boot code" * 60)[:510] + b"\x55\xaa" + bytes(MIB))
    assert "no partition table" in str(await refusal(path, 1, workers))


async def test_no_such_partition(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", LOGICAL)
    error = await refusal(path, 4, workers)
    assert str(error) == f"{path}: no partition 4; it has 1, 5, 6, 7"
    assert "only holds the logical ones" in str(await refusal(path, 2, workers))


async def test_empty_table(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", "label: dos\n")
    assert str(await refusal(path, 1, workers)) == f"{path}: no partition 1; it has none"


@pytest.mark.parametrize("script", [MBR, GPT])
async def test_partition_beyond_the_end(tmp_path: Path, workers: Workers, script: str) -> None:
    path = with_table(tmp_path / "disk.img", script)
    with open(path, "r+b") as file:
        file.truncate(2 * MIB - 512)
    number = 1 if script == MBR else 2
    error = await refusal(path, number, workers)
    assert isinstance(error, CorruptImage)
    assert f"partition {number} from " in str(error)
    assert "is not within the disk of 2096640" in str(error)


async def test_partition_that_ends_before_it_begins(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", GPT)
    raw = bytearray(path.read_bytes()[: 34 * 512])
    struct.pack_into("<QQ", raw, 1024 + 32, 5000, 4000)
    struct.pack_into("<I", raw, 512 + 88, zlib.crc32(raw[1024:]))
    struct.pack_into("<I", raw, 512 + 16, 0)
    struct.pack_into("<I", raw, 512 + 16, zlib.crc32(raw[512 : 512 + 92]))
    patch(path, 0, bytes(raw))
    assert isinstance(await refusal(path, 1, workers), CorruptImage)


async def test_logical_chain_that_loops(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", LOGICAL)
    raw = path.read_bytes()
    (extended,) = struct.unpack_from("<I", raw, 446 + 16 + 8)
    (second,) = struct.unpack_from("<I", raw, extended * 512 + 446 + 16 + 8)
    at = (extended + second) * 512 + 446 + 16
    for target in (0, second):
        patch(path, at + 8, struct.pack("<I", target))
        error = await refusal(path, 1, workers)
        assert str(error) == (
            f"corrupt image: {path} at {at}: the chain of logical partitions does not end"
        )


async def test_logical_chain_that_leads_outside(tmp_path: Path, workers: Workers) -> None:
    path = with_table(tmp_path / "disk.img", LOGICAL)
    patch(path, 446 + 16 + 8, struct.pack("<I", 0xFFFF_FFFF))
    assert "no extended boot record at " in str(await refusal(path, 5, workers))


@pytest.mark.parametrize("script", SCRIPTS)
def test_mutants(tmp_path: Path, script: str) -> None:
    path = with_table(tmp_path / "disk.img", script, 8 * MIB if script != LOGICAL else 16 * MIB)
    good = path.read_bytes()

    async def attempt(number: int, workers: Workers) -> str:
        disk = await opened(path, workers)
        try:
            disk = await open_partition(disk, number)
            await content(disk, 0, min(disk.size, MIB))
        except DiskError as error:
            return str(error)
        finally:
            await disk.close()
        return ""

    async def mutant(changes: list[Mutation], workers: Workers) -> None:
        for at, data in changes:
            patch(path, at, data)
        for number in (1, 5):
            assert "\n" not in await attempt(number, workers)
        for at, data in changes:
            patch(path, at, good[at : at + len(data)])

    with threads() as (runner, workers):

        @given(mutations(2048))
        def search(changes: list[Mutation]) -> None:
            runner.run(mutant(changes, workers))

        search()
