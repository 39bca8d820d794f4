"""Repositories Xen Orchestra itself wrote, whole and damaged, as their README says."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.repository import CHANGED_SINCE, Point
from nbdsrv.repository.xo.repository import XoRepository
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.fixtures import unpack_fixture
from tests.repository.xo.opened import contents, digest, opened, opener

REPOSITORIES = (
    "plain-vhd",
    "vhddir-none",
    "vhddir-gzip",
    "vhddir-brotli",
    "enc-chacha20",
    "enc-aes256",
    "plain-vhd-merged",
    "vhddir-merged",
    "xva-full",
)
FIRST, SECOND, THIRD = (f"2026010{day}T020304Z" for day in (1, 2, 3))
BLOCK = 2 << 20
Expected = dict[str, dict[str, dict[str, tuple[int, str]]]]
"""Repository, point, disk to size and SHA-256."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_fixture("xo-repositories.tar.zst", tmp_path_factory.mktemp("xo")) / "repos"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_fixture("xo-damaged.tar.zst", tmp_path_factory.mktemp("xo")) / "broken"


@pytest.fixture(scope="module")
def expected(whole: Path) -> Expected:
    said = json.loads((whole / "EXPECTED.json").read_text())
    return {
        repository: {
            point: {name: (disk["size"], disk["sha256"]) for name, disk in disks.items()}
            for point, disks in row["points"].items()
        }
        for repository, row in said.items()
    }


def snapshot(root: Path) -> list[tuple[str, int, int]]:
    return sorted(
        (str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")
    )


@pytest.mark.parametrize("name", REPOSITORIES)
async def test_every_disk_of_every_point_is_exact_and_nothing_is_written(
    whole: Path, expected: Expected, name: str, workers: Workers
) -> None:
    before = snapshot(whole / name)
    async with opened(whole / name, workers) as repository:
        points = await repository.points()
        assert [point.id for point in points] == sorted(expected[name])
        for point in points:
            assert point.group == "research-vm"
            assert point.flags == ()
            assert [disk.name for disk in point.disks] == ["root", "odd"]
            for disk in point.disks:
                size, sum_ = expected[name][point.id][disk.name]
                found = await repository.open_disk(point, disk.name)
                assert found.size == disk.size
                assert sum_ == await digest(found, size), f"{point.id} {disk.name}"
    assert before == snapshot(whole / name)


@pytest.mark.parametrize("name", ["plain-vhd", "vhddir-none", "enc-chacha20"])
async def test_the_contract_of_disks(whole: Path, name: str, workers: Workers) -> None:
    async with opened(whole / name, workers) as repository:
        point = (await repository.points())[-1]
        golden = await contents(repository, "research-vm/odd@latest")
        await check_disk(opener(repository, point, "odd"), golden)


async def test_modes_parents_and_facts(whole: Path, workers: Workers) -> None:
    async with opened(whole / "enc-chacha20", workers) as repository:
        first, second, third = await repository.points()
        assert [point.parent for point in (first, second, third)] == [None, FIRST, SECOND]
        assert [point.disks[0].facts["mode"] for point in (first, third)] == ["full", "incremental"]
        assert third.facts["encryption"] == "chacha20-poly1305"
        assert third.facts["compression"] == "brotli"
        assert third.facts["layout"] == "vhd-directory"
        disk = await repository.open_disk(third, "root")
        assert (disk.facts["chain"], disk.facts["mode"]) == (3, "incremental")
        await disk.close()
    async with opened(whole / "plain-vhd-merged", workers) as repository:
        merged, after = await repository.points()
        assert (merged.disks[0].facts["mode"], after.parent) == ("full", SECOND)


async def test_changed_since_tells_every_change_and_no_more_than_blocks(
    whole: Path, workers: Workers
) -> None:
    async with opened(whole / "vhddir-brotli", workers) as repository:
        points = await repository.points()
        data = [await contents(repository, f"root@{point.id}") for point in points]
        disk = await repository.open_disk(points[-1], "root")
        try:
            assert disk.contexts[2:] == (CHANGED_SINCE + SECOND, CHANGED_SINCE + FIRST)
            for old, stamp in ((data[1], SECOND), (data[0], FIRST)):
                flags = await extent_map(disk, CHANGED_SINCE + stamp)
                told = 0
                for at in range(0, len(old), BLOCK):
                    block = slice(at, at + BLOCK)
                    assert len(set(flags[block])) == 1
                    told += flags[at]
                    assert flags[at] or old[block] == data[2][block], f"{stamp}: {at} not told"
                assert told == {SECOND: 3, FIRST: 5}[stamp]
        finally:
            await disk.close()


async def flags_of(repository: XoRepository) -> Sequence[tuple[str, ...]]:
    return [point.flags for point in await repository.points()]


async def exact(repository: XoRepository, expected: Expected, points: Sequence[Point]) -> None:
    for point in points:
        for disk in point.disks:
            size, sum_ = expected["plain-vhd"][point.id][disk.name]
            found = await digest(await repository.open_disk(point, disk.name), size)
            assert sum_ == found, f"{point.id} {disk.name}"


async def test_midmerge_serves_the_children_and_refuses_the_parent(
    broken: Path, expected: Expected, workers: Workers
) -> None:
    async with opened(broken / "midmerge", workers) as repository:
        first, second, third = await repository.points()
        assert (first.flags, first.disks) == (("damaged",), ())
        assert "being merged" in first.facts["reason"]
        with pytest.raises(CorruptImage, match="being merged"):
            await repository.open_disk(first, "root")
        assert (second.flags, third.flags) == ((), ())
        assert len(second.disks) == len(third.disks) == 2
        await exact(repository, expected, (second, third))
        disk = await repository.open_disk(third, "root")
        assert disk.contexts[2:] == (CHANGED_SINCE + SECOND,)  # the first is no more
        await disk.close()
        done = await repository.verify("chunks")
        (finding,) = done.findings
        assert [hurt.point for hurt in finding.hurts] == [f"research-vm/{FIRST}"]
        assert "merge" in finding.advice


async def test_partial_sector_bitmaps_are_honoured(
    broken: Path, expected: Expected, workers: Workers
) -> None:
    async with opened(broken / "partialbitmap", workers) as repository:
        points = await repository.points()
        assert [point.flags for point in points] == [(), (), ()]
        await exact(repository, expected, points)


async def test_a_lost_end_footer_is_served_from_the_copy(
    broken: Path, expected: Expected, workers: Workers
) -> None:
    async with opened(broken / "nofooter", workers) as repository:
        points = await repository.points()
        await exact(repository, expected, points)
        assert [["footer" in disk.facts for disk in point.disks] for point in points] == [
            [False, False],
            [False, False],
            [True, False],
        ]
        done = await repository.verify("structure")
        assert not done.findings
        assert [note.text.partition(";")[0] for note in done.notes] == [
            "has lost the footer at its end"
        ]


async def test_without_a_good_copy_the_file_is_named(broken: Path, workers: Workers) -> None:
    path = next((broken / "nofooter").glob(f"xo-vm-backups/*/vdis/*/cccccccc-*/{THIRD}.vhd"))
    good = path.read_bytes()
    path.write_bytes(b"\0" * 512 + good[512:])
    try:
        async with opened(broken / "nofooter", workers) as repository:
            third = (await repository.points())[-1]
            assert third.flags == ("partial",)
            assert [disk.name for disk in third.disks] == ["odd"]
            with pytest.raises(CorruptImage, match=rf"{THIRD}\.vhd at \d+: no footer"):
                await repository.open_disk(third, "root")
    finally:
        path.write_bytes(good)


async def test_another_disk_under_the_parents_name_is_never_served(
    broken: Path, expected: Expected, workers: Workers
) -> None:
    async with opened(broken / "wrongparent", workers) as repository:
        points = await repository.points()
        assert [point.flags for point in points] == [("partial",)] * 3
        await exact(repository, expected, points)
        for point in points:
            with pytest.raises(CorruptImage, match=f"{FIRST}") as refused:
                await repository.open_disk(point, "root")
            assert "another disk" in str(refused.value)
        done = await repository.verify("structure")
        assert len(done.findings) == 2
        hurt = {hurt.point for finding in done.findings for hurt in finding.hurts}
        assert hurt == {f"research-vm/{point.id}" for point in points}


async def test_a_missing_block_is_an_error_there_and_nowhere_else(
    broken: Path, whole: Path, workers: Workers
) -> None:
    async with opened(whole / "plain-vhd", workers) as repository:
        golden = await contents(repository, f"root@{THIRD}")
    async with opened(broken / "missingblock", workers) as repository:
        assert await flags_of(repository) == [(), (), ()]
        disk = await repository.open_disk((await repository.points())[-1], "root")
        try:
            for at in range(0, disk.size, BLOCK):
                if at != 15 * BLOCK:
                    assert await content(disk, at, BLOCK) == golden[at : at + BLOCK]
            with pytest.raises(DiskError, match=rf"{FIRST}\.vhd/blocks/0/15") as error:
                await content(disk, 15 * BLOCK - 10, 20)
            assert error.value.offset == 15 * BLOCK
        finally:
            await disk.close()
        done = await repository.verify("structure")
        (finding,) = done.findings
        assert finding.key.endswith("blocks/0/15")
        assert [(hurt.disk, hurt.ranges) for hurt in finding.hurts] == [
            ("root", [(15 * BLOCK, BLOCK)])
        ] * 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("bitrot", "a flipped bit in a block cannot be seen"), ("swapped", "two that were exchanged")],
)
async def test_what_the_format_cannot_show_is_said(
    broken: Path, expected: Expected, name: str, sentence: str, workers: Workers
) -> None:
    async with opened(broken / name, workers) as repository:
        done = await repository.verify("chunks")
        assert done.findings == []
        assert any(sentence in text for text in done.unchecked), done.unchecked
        found = await digest(await repository.open_disk((await repository.points())[0], "root"))
        assert found != expected["plain-vhd"][FIRST]["root"][1]  # that is why it is said


@pytest.mark.parametrize("name", REPOSITORIES)
async def test_whole_repositories_verify(whole: Path, name: str, workers: Workers) -> None:
    async with opened(whole / name, workers) as repository:
        for level in ("structure", "packs", "chunks"):
            done = await repository.verify(level)
            assert (done.findings, done.unread, done.notes) == ([], [], [])
            assert done.points == len(await repository.points())
        assert done.read_bytes > (16 << 20)
