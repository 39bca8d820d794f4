"""Snapshots as points, their files as Disks."""

import hashlib
import os
from functools import partial
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import BlockRun, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, PointMissing, RepositoryError
from nbdsrv.repository.repository import CHANGED_SINCE
from nbdsrv.repository.selector import select
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.restic.made import SIZE, Made, restic
from tests.repository.restic.opened import everything, opened, point_of

DISK = "vm1/disk.raw"
MIB = 1 << 20


@pytest.mark.parametrize("version", [1, 2])
async def test_every_disk_of_every_snapshot(
    request: pytest.FixtureRequest, version: int, workers: Workers
) -> None:
    made: Made = request.getfixturevalue("original" if version == 2 else "original_v1")
    before = _state(made.path)
    async with opened(made.path, workers) as repository:
        points = await repository.points()
        assert [*made.points, made.beta] == [point.id for point in points]
        for point in points:
            expected = {
                name: data for name, data in made.states[point.id].items() if len(data) >= MIB
            }
            found = {disk.name: disk.size for disk in point.disks}
            assert {name: len(data) for name, data in expected.items()} == found
            for name, data in expected.items():
                assert data == await everything(repository, point, name)
    assert before == _state(made.path)


def _state(path: Path) -> dict[str, tuple[int, int, str]]:
    return {
        str(each): (
            each.stat().st_mtime_ns,
            each.stat().st_size,
            hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else "",
        )
        for each in sorted(path.rglob("*"))
    }


@pytest.mark.parametrize("name", [DISK, "vm1/other.img"])
async def test_the_contract_of_disks(original: Made, workers: Workers, name: str) -> None:
    id_ = original.points[1]
    async with opened(original.path, workers) as repository:
        point = await point_of(repository, id_)
        await check_disk(partial(repository.open_disk, point, name), original.states[id_][name])


async def test_what_is_said_of_a_snapshot(original: Made, workers: Workers) -> None:
    async with opened(original.path, workers) as repository:
        first, second, *_ = await repository.points("alpha")
        assert repository.identity in restic(original.path, "cat", "config")
        assert ("alpha", first.id) == (first.group, second.parent)
        assert ["nightly", "vm"] == first.facts["tags"]
        assert first.facts["snapshot"].startswith(first.id)
        assert first.stamp.startswith("2026-03-01T")
        disk = await repository.open_disk(first, DISK)
        assert ("raw", first.id) == (disk.facts["content"], disk.facts["point"])
        await disk.close()
        assert ["alpha", "beta"] == await repository.groups()


async def test_zeroes_are_holes_and_nothing_is_read_for_them(made: Made, workers: Workers) -> None:
    async with opened(made.path, workers) as repository:
        disk = await repository.open_disk(
            await point_of(repository, made.points[0]), "vm1/other.img"
        )
        for pack in (made.path / "data").rglob("*"):
            if pack.is_file():
                pack.unlink()
        assert bytes(2 * MIB + 1) == await content(disk, 0, disk.size)
        runs = await disk.runs(0, disk.size)
        assert all(isinstance(run, ZeroRun) for run in runs)
        await disk.close()


async def test_a_hole_in_data(original: Made, workers: Workers) -> None:
    async with opened(original.path, workers) as repository:
        disk = await repository.open_disk(await point_of(repository, original.points[0]), DISK)
        states = await extent_map(disk)
        golden = original.states[original.points[0]][DISK]
        holes = sum(1 for at in range(0, SIZE, 4096) if states[at] == 3)
        assert holes * 4096 > 4 * MIB  # of some seven MiB of zeroes
        assert not any(golden[at] for at in range(SIZE) if states[at] == 3)
        assert any(isinstance(run, BlockRun) for run in await disk.runs(0, SIZE))
        await disk.close()


async def test_what_changed_since(original: Made, workers: Workers) -> None:
    async with opened(original.path, workers) as repository:
        points = await repository.points("alpha")
        for mine in points:
            disk = await repository.open_disk(mine, DISK)
            others = [point.id for point in points if point.id != mine.id]
            announced = [each for each in disk.contexts if each.startswith(CHANGED_SINCE)]
            assert [CHANGED_SINCE + each for each in reversed(others)] == announced
            for other in others:
                flags = await extent_map(disk, CHANGED_SINCE + other)
                _judge(original.states[mine.id][DISK], original.states[other][DISK], flags)
            await disk.close()


def _judge(mine: bytes, theirs: bytes, flags: bytes) -> None:
    """All changes are told, and most of what did not change.

    Byte by byte: restic cuts where it likes, in each repository elsewhere, and not at sectors.
    """
    for at in range(0, len(mine), 512):
        if mine[at : at + 512] != theirs[at : at + 512]:
            bytes_ = range(at, min(at + 512, len(mine)))
            untold = [n for n in bytes_ if mine[n] != theirs[n] and not flags[n]]
            assert not untold, f"changes at {untold} are not told"
    assert flags.count(0) > len(mine) // 3


@pytest.mark.parametrize(
    ("selector", "number", "disk"),
    [
        ("alpha/vm1/disk.raw", 2, DISK),
        ("alpha/vm1/disk.raw@latest", 2, DISK),
        ("alpha/vm1/disk.raw@2026-03-02", 1, DISK),
        ("vm1/other.img@2026-03-01T", 0, "vm1/other.img"),
        ("alpha/vm1/notes.txt@2026-03-02", 1, "vm1/notes.txt"),
        ("alpha/vm1/notes.txt", 2, "vm1/notes.txt"),
        ("beta", 3, DISK),
    ],
)
async def test_selectors(
    original: Made, workers: Workers, selector: str, number: int, disk: str
) -> None:
    """Also a file that is too small to be listed, by its path."""
    async with opened(original.path, workers, selector) as repository:
        selected = await select(repository, selector)
        assert ([*original.points, original.beta][number], disk) == (
            selected.point.id,
            selected.disk,
        )
        data = await everything(repository, selected.point, selected.disk)
        assert original.states[selected.point.id][disk] == data


async def test_new_and_forgotten_snapshots_are_noticed(made: Made, workers: Workers) -> None:
    async with opened(made.path, workers) as repository:
        before = await repository.points()
        new = made.path.parent / "new.raw"
        new.write_bytes(os.urandom(MIB + 5))
        restic(made.path, "backup", "--host", "gamma", "new.raw", directory=made.path.parent)
        (added,) = await repository.points("gamma")
        assert new.read_bytes() == await everything(repository, added, "new.raw")
        restic(made.path, "forget", made.points[0])
        after = await repository.points()
        assert [point.id for point in before[1:]] + [added.id] == [point.id for point in after]
        with pytest.raises(PointMissing, match="has been forgotten"):
            await repository.open_disk(before[0], DISK)


async def test_a_prune_meanwhile(made: Made, workers: Workers) -> None:
    """What is still needed is found where it lies now."""
    async with opened(made.path, workers) as repository:
        kept = await point_of(repository, made.points[2])
        disk: Disk = await repository.open_disk(kept, DISK)
        await content(disk, 0, 512)
        restic(made.path, "forget", "--prune", "--max-unused", "0", *made.points[:2])
        assert made.states[kept.id][DISK] == await content(disk, 0, disk.size)
        await disk.close()


async def test_passwords(
    made: Made, workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    second.write_text("another\n")
    restic(made.path, "key", "add", "--new-password-file", second)
    monkeypatch.setenv("NBDSRV_PASSPHRASE_FILE", str(second))
    monkeypatch.setenv("RESTIC_PASSWORD", "wrong")  # ours counts first
    async with opened(made.path, workers) as repository:
        assert 4 == len(await repository.points())
    monkeypatch.delenv("NBDSRV_PASSPHRASE_FILE")
    with pytest.raises(RepositoryError, match="opens none of its 2 keys"):
        async with opened(made.path, workers):
            pass
    monkeypatch.delenv("RESTIC_PASSWORD")
    with pytest.raises(ConfigError, match="set NBDSRV_PASSPHRASE"):
        async with opened(made.path, workers):
            pass
    monkeypatch.setenv("RESTIC_PASSWORD_FILE", str(second))
    async with opened(made.path, workers) as repository:
        assert 4 == len(await repository.points())


async def test_disks_outlive_the_repository(original: Made, workers: Workers) -> None:
    async with opened(original.path, workers) as repository:
        point = await point_of(repository, original.points[0])
        disk = await repository.open_disk(point, DISK)
    assert original.states[point.id][DISK] == await content(disk, 0, disk.size)
    await disk.close()
    with pytest.raises(RepositoryError, match="is closed"):
        await repository.points()


async def test_no_repository(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(RepositoryError, match="no restic repository"):
        async with opened(tmp_path, workers):
            pass
