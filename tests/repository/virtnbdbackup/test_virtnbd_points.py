"""Points of directories: which there are, what they are called, and what is in them."""

from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, PointMissing, RepositoryError
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.opening import open_repository
from nbdsrv.repository.repository import CHANGED_SINCE, Point, Repository
from nbdsrv.repository.selector import select
from nbdsrv.repository.virtnbdbackup.repository import DOUBT
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.virtnbdbackup.backups import BEGIN, Backups, random_disk

SIZE = (3 << 20) + 5 * 512


async def opened(path: Path, workers: Workers) -> Repository:
    return await open_repository(parse_source(f"virtnbdbackup:{path}"), workers)


def by_id(points: list[Point] | tuple[Point, ...]) -> dict[str, Point]:
    return {point.id: point for point in points}


def chain(directory: Path, **options: object) -> Backups:
    """A full and everything that can follow it."""
    made = Backups(directory, random_disk(SIZE), **options)  # type: ignore[arg-type]
    made.full()
    made.change(100, b"first" * 3000)
    made.change(1 << 20, bytes(200_000))
    made.increment()
    made.change(SIZE - 700, b"tail" * 175)
    made.change(1 << 20, b"again" * 1000)
    made.difference()
    made.change(500_000, b"more" * 20_000)
    made.increment()
    made.change(90_000, bytes(70_000))
    made.difference()
    return made


KINDS = {
    "plain": {},
    "v1": {"version": 1},
    "lz4": {"packed": 2},
    "lz4 in slices": {"packed": 1, "max_request": 300_000},
    "lz4 independent": {"packed": True, "linked": False},
    "lz4 without block sums": {"packed": 2, "block_sums": False, "max_request": 1 << 20},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_every_point_is_what_the_disk_was(
    tmp_path: Path, workers: Workers, kind: str
) -> None:
    made = chain(tmp_path, **KINDS[kind])
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    assert points.keys() == made.golden.keys()
    for id_, golden in made.golden.items():
        disk = await repository.open_disk(points[id_], "vda")
        assert await content(disk, 0, disk.size) == golden, id_
        await disk.close()
    latest = points["virtnbdbackup.2"]
    await check_disk(lambda: repository.open_disk(latest, "vda"), made.golden["virtnbdbackup.2"])
    await repository.close()


async def test_what_is_said_of_points(tmp_path: Path, workers: Workers) -> None:
    made = chain(tmp_path / "web" if (tmp_path / "web").mkdir() is None else tmp_path)
    repository = await opened(tmp_path, workers)
    points = await repository.points()
    assert [point.group for point in points] == ["web"] * 5
    ids = [point.id for point in points]
    assert ids[:2] == ["virtnbdbackup.0", "virtnbdbackup.1"]
    assert ids[2].startswith("diff.")
    assert ids[3] == "virtnbdbackup.2"
    assert [point.parent for point in points] == [
        None,
        "virtnbdbackup.0",
        "virtnbdbackup.1",
        "virtnbdbackup.1",
        "virtnbdbackup.2",
    ]
    assert points[0].created == BEGIN.timestamp()
    assert [point.disks[0].facts["mode"] for point in points] == [
        "full",
        "incremental",
        "differential",
        "incremental",
        "differential",
    ]
    assert points[3].disks[0].size == len(made.disk)
    assert points[3].disks[0].facts["files"] == 3
    for selector, id_ in {
        "web/vda@virtnbdbackup.1": "virtnbdbackup.1",
        "@diff": None,
        "@2026-11-20T04": "virtnbdbackup.1",
        "web/vda@latest": ids[4],
        "vda": ids[4],
        f"@{ids[2]}": ids[2],
    }.items():
        if id_ is None:
            with pytest.raises(RepositoryError, match="may mean several points"):
                await select(repository, selector)
        else:
            assert (await select(repository, selector)).point.id == id_
    with pytest.raises(PointMissing):
        await repository.open_disk(points[0], "vdb")
    await repository.close()


async def test_the_offline_increment_is_since_the_checkpoint_it_names(
    tmp_path: Path, workers: Workers
) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    made.change(4096, b"offline")
    made.offline()
    made.change(70_000, b"online")
    made.increment()  # the bitmap goes on: it has what the offline one had
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    assert points["virtnbdbackup.0+offline"].disks[0].facts["mode"] == "incremental, offline"
    for id_, golden in made.golden.items():
        disk = await repository.open_disk(points[id_], "vda")
        assert await content(disk, 0, SIZE) == golden, id_
        await disk.close()
    await repository.close()


async def test_an_increment_by_name_may_be_a_full_backup(tmp_path: Path, workers: Workers) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    made.change(0, b"lost track of")
    # The checkpoint is not valid any more: the level changes, the name of the file does not.
    made._write(
        "inc.virtnbdbackup.1.data", made._allocated(), "virtnbdbackup.1", "", incremental=False
    )
    made.golden["virtnbdbackup.1"] = bytes(made.disk)
    made.count, made.dirty = 1, set()
    made.change(9000, b"and on")
    made.increment()
    (tmp_path / "vda.full.data").unlink()
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    assert points["virtnbdbackup.1"].disks[0].facts["mode"] == "full"
    disk = await repository.open_disk(points["virtnbdbackup.2"], "vda")
    assert await content(disk, 0, SIZE) == made.golden["virtnbdbackup.2"]
    await disk.close()
    await repository.close()


async def test_all_disks_of_a_checkpoint_and_a_raw_one_beside_them(
    tmp_path: Path, workers: Workers
) -> None:
    first = Backups(tmp_path, random_disk(SIZE, 1), "vda")
    second = Backups(tmp_path, random_disk(SIZE // 2, 2), "sdb", packed=2)
    third = Backups(tmp_path, random_disk(1 << 20, 3), "vdc")
    first.full()
    second.full()
    third.raw()
    first.change(1, b"1")
    first.increment()
    (tmp_path / "web 1.cpt").write_text('["virtnbdbackup.0", "virtnbdbackup.1"]')
    repository = await opened(tmp_path, workers)
    points = await repository.points()
    assert {point.group for point in points} == {"web 1"}
    assert [[disk.name for disk in point.disks] for point in points] == [
        ["sdb", "vda", "vdc"],
        ["vda"],
    ]
    goldens = {"vda": first.golden["virtnbdbackup.0"], "sdb": bytes(second.disk)}
    goldens["vdc"] = bytes(third.disk)
    for name, golden in goldens.items():
        disk = await repository.open_disk(points[0], name)
        assert await content(disk, 0, disk.size) == golden
        await disk.close()
    await repository.close()


async def test_copies(tmp_path: Path, workers: Workers) -> None:
    for name, packed in (("a", False), ("b", 2)):
        (tmp_path / name).mkdir()
        Backups(tmp_path / name, random_disk(SIZE, 7), packed=packed).full("copy")
    (tmp_path / "c").mkdir()
    Backups(tmp_path / "c", random_disk(SIZE, 7)).raw()
    repository = await opened(tmp_path, workers)
    points = await repository.points()
    assert [(point.group, point.id) for point in points] == [(n, "copy") for n in "abc"]
    for point in points:
        disk = await repository.open_disk(point, "vda")
        assert await content(disk, 0, disk.size) == bytes(random_disk(SIZE, 7))
        # What an overlay over it goes by, also over the image of a raw disk.
        known = [disk.facts[key] for key in ("group", "disk", "point")]
        assert known == [point.group, "vda", "copy"]
        await disk.close()
    await repository.close()


async def test_a_disk_that_was_made_larger_and_smaller(tmp_path: Path, workers: Workers) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    del made.disk[1 << 20 :]
    made.increment()
    made.disk += bytes(2 << 20)
    made.change((2 << 20) + 100, b"beyond what was cut off")
    made.increment()
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    for id_, golden in made.golden.items():
        disk = await repository.open_disk(points[id_], "vda")
        assert await content(disk, 0, disk.size) == golden, id_
        await disk.close()
    disk = await repository.open_disk(points["virtnbdbackup.1"], "vda")
    since = await extent_map(disk, CHANGED_SINCE + "virtnbdbackup.0")
    assert since == bytes(1 << 20)
    await disk.close()
    await repository.close()


async def test_what_has_changed_since_other_points(tmp_path: Path, workers: Workers) -> None:
    made = chain(tmp_path, packed=2)
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    for id_, golden in made.golden.items():
        disk = await repository.open_disk(points[id_], "vda")
        assert CHANGED_SINCE + id_ not in disk.contexts
        for other, was in made.golden.items():
            if other == id_:
                continue
            told = await extent_map(disk, CHANGED_SINCE + other)
            sectors = range(0, len(golden), 512)
            differ = [at for at in sectors if golden[at : at + 512] != was[at : at + 512]]
            missed = [at for at in differ if 0 in told[at : at + 512]]
            assert not missed, (id_, other, missed[:3])
            assert sum(told) < 600_000, "and not everything is called changed"
        await disk.close()
    await repository.close()


async def test_new_and_removed_files_are_noticed(tmp_path: Path, workers: Workers) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    repository = await opened(tmp_path, workers)
    assert len(await repository.points()) == 1
    first = (await repository.points())[0]
    assert (await repository.points())[0] is first, "what is known is not read again"
    made.change(5, b"more")
    made.increment()
    points = await repository.points()
    assert [point.id for point in points] == ["virtnbdbackup.0", "virtnbdbackup.1"]
    disk = await repository.open_disk(points[1], "vda")
    made.written.unlink()
    assert [point.id for point in await repository.points()] == ["virtnbdbackup.0"]
    assert await content(disk, 0, SIZE) == made.golden["virtnbdbackup.1"], "it is open"
    await disk.close()
    with pytest.raises(PointMissing):
        await repository.open_disk(points[1], "vda")
    await repository.close()


@pytest.mark.parametrize(
    ("version", "options", "doubtful"),
    [
        (None, "", True),
        ("1.9.15", "", False),
        ("2.20", "", False),
        ("2.21", "", True),
        ("2.47", "-S /tmp", True),
        ("2.24", "--no-sparse-detection", False),
    ],
)
async def test_increments_that_may_have_lost_zeroes(
    tmp_path: Path, workers: Workers, version: str | None, options: str, *, doubtful: bool
) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    made.change(0, b"x")
    made.increment()
    if version is not None:
        made.log(version, options)
    repository = await opened(tmp_path, workers)
    full, increment = await repository.points()
    assert full.flags == ()
    assert (DOUBT in increment.flags) == doubtful
    assert ("doubt" in increment.facts) == doubtful
    if version:
        assert increment.facts["tool_version"] == version
    await repository.close()


async def test_damaged_points_beside_sound_ones(tmp_path: Path, workers: Workers) -> None:
    made = chain(tmp_path)
    (tmp_path / "vda.inc.virtnbdbackup.1.data").unlink()
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    assert points["virtnbdbackup.0"].flags == ()
    assert "damaged" in points["virtnbdbackup.2"].flags
    assert points["virtnbdbackup.2"].disks == ()
    reason = str(points["virtnbdbackup.2"].facts["reason"])
    assert "changes since virtnbdbackup.1" in reason
    assert "vda.inc.virtnbdbackup.2.data" in reason
    with pytest.raises(CorruptImage, match="no file that vda has made it"):
        await repository.open_disk(points["virtnbdbackup.2"], "vda")
    disk = await repository.open_disk(points["virtnbdbackup.0"], "vda")
    assert await content(disk, 0, SIZE) == made.golden["virtnbdbackup.0"]
    await disk.close()
    await repository.close()


async def test_a_file_from_another_backup_is_no_parent(tmp_path: Path, workers: Workers) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    made.change(0, b"x")
    made.increment()
    other = Backups(tmp_path, random_disk(SIZE, 5))
    other.hours = 100
    other.full()
    repository = await opened(tmp_path, workers)
    points = by_id(tuple(await repository.points()))
    with pytest.raises(DiskError, match="from another backup"):
        await repository.open_disk(points["virtnbdbackup.1"], "vda")
    await repository.close()


async def test_two_files_of_one_checkpoint_are_not_guessed(
    tmp_path: Path, workers: Workers
) -> None:
    made = Backups(tmp_path, random_disk(SIZE))
    made.full()
    (tmp_path / "other.full.data").write_bytes(made.written.read_bytes())
    made.change(0, b"x")
    made.increment()
    repository = await opened(tmp_path, workers)
    for point in await repository.points():
        assert "damaged" in point.flags
        with pytest.raises(DiskError, match=r"several files|made by"):
            await repository.open_disk(point, "vda")
    await repository.close()


async def test_closed(tmp_path: Path, workers: Workers) -> None:
    Backups(tmp_path, random_disk(SIZE)).full()
    repository = await opened(tmp_path, workers)
    (point,) = await repository.points()
    disk = await repository.open_disk(point, "vda")
    await repository.close()
    await repository.close()
    assert await content(disk, 0, disk.size) == bytes(random_disk(SIZE))
    await disk.close()
    with pytest.raises(DiskError):
        await repository.open_disk(point, "vda")
