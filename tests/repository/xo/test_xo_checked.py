"""What our own backups left, read back: their checksums show bit rot and exchanged blocks."""

from pathlib import Path

import brotli
import pytest

from nbdsrv.backup.engine import Order
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage
from tests.backup.tracked import BITMAP, Guest, back_up
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.repository.native.read_back import noise
from tests.repository.xo import written
from tests.repository.xo.opened import contents, opened, opener

MIB = 1 << 20
BLOCK = 2 * MIB
SIZE = 9 * MIB + 1536
LAYOUTS = [
    ("none", "vhd", ""),
    ("none", "vhd-directory", "none"),
    ("none", "vhd-directory", "brotli"),
    ("chacha20-poly1305", "vhd-directory", "brotli"),
]


async def backed_up(
    root: Path, workers: Workers, algorithm: str, layout: str, packing: str
) -> list[bytes]:
    """Two points; what the disk held at each."""
    written.make_remote(root, algorithm)
    guest, held = Guest(bytearray(SIZE)), []
    guest.write(0, noise(5 * MIB))
    for number in range(2):
        if number:
            guest.write(BLOCK + 4096, noise(4096))
        target = written.opened(root, layout, packing)
        order = written.changes_since(root, BITMAP) if number else Order("vm")
        await back_up(workers, target, guest, order)
        target.close()
        guest.backed_up()
        held.append(bytes(guest.content))
    return held


@pytest.mark.parametrize(("algorithm", "layout", "packing"), LAYOUTS)
async def test_our_own_backups_are_read_and_proven(
    tmp_path: Path, algorithm: str, layout: str, packing: str, workers: Workers
) -> None:
    held = await backed_up(tmp_path / "xo", workers, algorithm, layout, packing)
    async with opened(tmp_path / "xo", workers) as repository:
        points = await repository.points()
        for point, golden in zip(points, held, strict=True):
            assert await contents(repository, f"vm@{point.id}") == golden
        name = points[-1].disks[0].name
        disk = await repository.open_disk(points[-1], name)
        assert disk.facts["with_checksums"] == 2
        await disk.close()
        done = await repository.verify("chunks")
        assert (done.findings, done.unchecked, done.notes) == ([], [], [])
        if layout == "vhd":
            await check_disk(opener(repository, points[-1], name), held[-1])


async def test_bit_rot_is_an_error_for_that_block_alone(tmp_path: Path, workers: Workers) -> None:
    held = await backed_up(tmp_path / "xo", workers, "none", "vhd", "")
    path = min((tmp_path / "xo").glob("xo-vm-backups/*/vdis/*/*/*.vhd"))
    raw = bytearray(path.read_bytes())
    raw[raw.index(held[0][4 * MIB : 4 * MIB + 512])] ^= 1
    path.write_bytes(raw)
    async with opened(tmp_path / "xo", workers) as repository:
        for point, golden in zip(await repository.points(), held, strict=True):
            disk = await repository.open_disk(point, point.disks[0].name)
            for at in range(0, SIZE, BLOCK):
                length = min(BLOCK, SIZE - at)
                if at == 4 * MIB:
                    with pytest.raises(CorruptImage, match=r"block 2 .* checksum is wrong"):
                        await content(disk, at + MIB, 10)
                else:
                    assert await content(disk, at, length) == golden[at : at + length]
            await disk.close()
        (finding,) = (await repository.verify("chunks")).findings
        assert [hurt.ranges for hurt in finding.hurts] == [[(4 * MIB, BLOCK)]] * 2


async def test_exchanged_blocks_are_seen(tmp_path: Path, workers: Workers) -> None:
    await backed_up(tmp_path / "xo", workers, "chacha20-poly1305", "vhd-directory", "brotli")
    first = min((tmp_path / "xo").glob("xo-vm-backups/*/vdis/*/*/data/*"))
    one, other = first / "blocks/0/0", first / "blocks/0/2"
    one.rename(first / "x")
    other.rename(one)
    (first / "x").rename(other)
    async with opened(tmp_path / "xo", workers) as repository:
        with pytest.raises(CorruptImage, match="not what was backed up"):
            await contents(repository, "vm@latest")
        done = await repository.verify("chunks")
        assert [finding.key[-10:] for finding in done.findings] == ["blocks/0/0", "blocks/0/2"]


async def test_damaged_checksums_cost_no_backup(tmp_path: Path, workers: Workers) -> None:
    held = await backed_up(tmp_path / "xo", workers, "none", "vhd-directory", "none")
    for number, path in enumerate((tmp_path / "xo").rglob(".*.nbdsrv")):
        raw = bytearray(path.read_bytes())
        raw[-1 if number else 20] ^= 1
        path.write_bytes(raw)
    async with opened(tmp_path / "xo", workers) as repository:
        for point, golden in zip(await repository.points(), held, strict=True):
            assert await contents(repository, f"vm@{point.id}") == golden
        done = await repository.verify("chunks")
        assert [finding.hurts for finding in done.findings] == [[], []]
        assert all("nothing proves it" in finding.advice for finding in done.findings)
        assert any("not packed" in text for text in done.unchecked)


@pytest.mark.parametrize("packing", ["none", "brotli"])
async def test_a_table_that_has_lost_a_block(
    tmp_path: Path, packing: str, workers: Workers
) -> None:
    """Without checksums the old content, or zeroes, would be served: no format has a sum of it."""
    held = await backed_up(tmp_path / "xo", workers, "none", "vhd-directory", packing)
    for bat in (tmp_path / "xo").glob("xo-vm-backups/*/vdis/*/*/data/*/bat"):
        raw = bat.read_bytes() if packing == "none" else brotli.decompress(bat.read_bytes())
        lost = bytes([raw[0] & ~0x40]) + raw[1:]  # block 1: in both of them
        bat.write_bytes(lost if packing == "none" else brotli.compress(lost))
    async with opened(tmp_path / "xo", workers) as repository:
        for point, golden in zip(await repository.points(), held, strict=True):
            assert await contents(repository, f"vm@{point.id}") == golden
        done = await repository.verify("structure")
        assert len(done.findings) == 2
        assert all("leaves out 1 blocks" in finding.text for finding in done.findings)


async def test_a_table_in_a_file_that_has_lost_a_block(tmp_path: Path, workers: Workers) -> None:
    held = await backed_up(tmp_path / "xo", workers, "none", "vhd", "")
    path = min((tmp_path / "xo").glob("xo-vm-backups/*/vdis/*/*/*.vhd"))
    raw = bytearray(path.read_bytes())
    raw[1536:1540] = b"\xff" * 4  # block 0
    path.write_bytes(raw)
    async with opened(tmp_path / "xo", workers) as repository:
        point = (await repository.points())[0]
        disk = await repository.open_disk(point, point.disks[0].name)
        with pytest.raises(CorruptImage, match="block 0 is gone"):
            await content(disk, 100, 10)
        assert await content(disk, BLOCK, BLOCK) == held[0][BLOCK : 2 * BLOCK]
        await disk.close()
