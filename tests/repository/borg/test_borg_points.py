"""Archives as points, their files as Disks: read by borg's own code, without touching anything."""

import asyncio
import hashlib
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from nbdsrv.disk.runs import ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, CorruptImage, DiskError, PointMissing, RepositoryError
from nbdsrv.repository.borg.repository import BorgRepository
from nbdsrv.repository.repository import CHANGED_SINCE
from nbdsrv.repository.selector import select
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.borg.archived import DISK, PASSPHRASE, Archived, archive, borg
from tests.repository.restic.opened import everything, opened, point_of

MIB = 1 << 20


def _state(path: Path) -> dict[str, tuple[int, int, str]]:
    return {
        str(each): (
            each.stat().st_mtime_ns,
            each.stat().st_size,
            hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else "",
        )
        for each in sorted(path.rglob("*"))
    }


async def test_every_disk_of_every_archive(original: Archived, workers: Workers) -> None:
    before = _state(original.path)
    async with opened(original.path, workers, scheme="borg") as repository:
        points = await repository.points()
        assert list(original.states) == [point.id for point in points]
        for point in points:
            expected = {
                name: data for name, data in original.states[point.id].items() if len(data) >= MIB
            }
            found = {disk.name: disk.size for disk in point.disks}
            assert {name: len(data) for name, data in expected.items()} == found
            assert point.stamp.startswith("2026-03-0")
            assert ("a comment", False) == (point.facts["comment"], point.facts["encrypted"])
            for name, data in expected.items():
                assert data == await everything(repository, point, name)
        assert len({point.group for point in points}) == 1
        for level in ("structure", "packs", "chunks"):
            check = await repository.verify(level)
            assert ([], [], 3, 6) == (check.findings, check.unread, check.points, check.disks)
    assert before == _state(original.path)
    assert [] == list(Path(os.environ["HOME"]).rglob("*"))


@pytest.mark.parametrize("name", [DISK, "vm1/other.img"])
async def test_the_contract_of_disks(original: Archived, workers: Workers, name: str) -> None:
    async with opened(original.path, workers, scheme="borg") as repository:
        point = await point_of(repository, "night-2")
        golden = original.states[point.id][name]
        await check_disk(partial(repository.open_disk, point, name), golden)


@pytest.mark.parametrize("encryption", ["repokey", "keyfile-blake2"])
async def test_encrypted(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, encryption: str
) -> None:
    made = archive(tmp_path, encryption, 1)
    if encryption.startswith("keyfile"):
        with pytest.raises(RepositoryError, match="No key file"):
            async with opened(made.path, workers, scheme="borg"):
                pass
        monkeypatch.setenv("BORG_KEYS_DIR", str(made.keys))
    with pytest.raises(ConfigError, match="set NBDSRV_PASSPHRASE"):
        async with opened(made.path, workers, scheme="borg"):
            pass
    monkeypatch.setenv("BORG_PASSPHRASE", "wrong")
    with pytest.raises(RepositoryError, match="the passphrase does not open it"):
        async with opened(made.path, workers, scheme="borg"):
            pass
    before = _state(tmp_path)
    monkeypatch.setenv("NBDSRV_PASSPHRASE", PASSPHRASE)  # ours counts first
    async with opened(made.path, workers, scheme="borg") as repository:
        for point in await repository.points():
            assert point.facts["encryption"] == encryption
            assert point.facts["encrypted"]
            assert made.states[point.id][DISK] == await everything(repository, point, DISK)
        disk = await repository.open_disk(await point_of(repository, "night-1"), DISK)
        assert extent_map_holes(await extent_map(disk)) > 4 * MIB
        await disk.close()
    monkeypatch.delenv("NBDSRV_PASSPHRASE")
    monkeypatch.setenv("BORG_PASSPHRASE", PASSPHRASE)
    async with opened(made.path, workers, scheme="borg") as repository:
        assert 1 == len(await repository.points())
    assert before == _state(tmp_path)


def extent_map_holes(states: bytes) -> int:
    return states.count(3)


async def test_zeroes_are_holes(original: Archived, workers: Workers) -> None:
    async with opened(original.path, workers, scheme="borg") as repository:
        for point in await repository.points():
            disk = await repository.open_disk(point, "vm1/other.img")
            runs = await disk.runs(0, 2 * MIB)
            assert all(isinstance(run, ZeroRun) for run in runs)
            await disk.close()


async def test_what_changed_since(original: Archived, workers: Workers) -> None:
    async with opened(original.path, workers, scheme="borg") as repository:
        disk = await repository.open_disk(await point_of(repository, "night-2"), DISK)
        contexts = [each for each in disk.contexts if each.startswith(CHANGED_SINCE)]
        assert [CHANGED_SINCE + "night-3", CHANGED_SINCE + "night-1"] == contexts
        flags = await extent_map(disk, CHANGED_SINCE + "night-1")
        changed = b"".join(bytes([at // MIB == 2]) * MIB for at in range(0, 10 * MIB, MIB))
        assert changed[: disk.size] == flags
        await disk.close()


@pytest.mark.parametrize(
    ("selector", "name", "disk"),
    [
        (DISK, "night-3", DISK),
        (f"{DISK}@latest", "night-3", DISK),
        (f"{DISK}@2026-03-02", "night-2", DISK),
        ("vm1/notes.txt@night-1", "night-1", "vm1/notes.txt"),
    ],
)
async def test_selectors(
    original: Archived, workers: Workers, selector: str, name: str, disk: str
) -> None:
    async with opened(original.path, workers, selector, scheme="borg") as repository:
        selected = await select(repository, selector)
        assert (name, disk) == (selected.point.id, selected.disk)
        data = await everything(repository, selected.point, disk)
        assert original.states[name][disk] == data


async def test_new_and_deleted_archives_are_noticed(archived: Archived, workers: Workers) -> None:
    async with opened(archived.path, workers, scheme="borg") as repository:
        first, *_ = await repository.points()
        kept = await repository.open_disk(await point_of(repository, "night-2"), DISK)
        await content(kept, 0, 1)
        new = archived.path.parent / "new.raw"
        new.write_bytes(os.urandom(MIB + 5))
        borg(archived, "create", "::new", "new.raw")
        point = await point_of(repository, "new")
        assert new.read_bytes() == await everything(repository, point, "new.raw")
        borg(archived, "delete", "::night-1")
        borg(archived, "compact", "--threshold", "0")
        assert ["night-2", "night-3", "new"] == [p.id for p in await repository.points()]
        with pytest.raises(PointMissing, match="has been deleted"):
            await repository.open_disk(first, DISK)
        # What borg has moved is found where it is now.
        assert archived.states["night-2"][DISK] == await content(kept, 0, kept.size)
        await kept.close()


@pytest.mark.parametrize("how", ["gone", "garbage", "older"])
async def test_an_index_that_is_not_there_is_made_in_memory(
    archived: Archived, workers: Workers, how: str
) -> None:
    """borg would write one; here nothing is written."""
    (index,) = archived.path.glob("index.*")
    if how == "gone":
        index.unlink()
    elif how == "garbage":
        index.write_bytes(os.urandom(index.stat().st_size))
    else:
        for kind in ("index", "hints", "integrity"):
            (path,) = archived.path.glob(f"{kind}.*")
            path.rename(archived.path / f"{kind}.1")
    before = _state(archived.path)
    async with opened(archived.path, workers, scheme="borg") as repository:
        for point in await repository.points():
            assert archived.states[point.id][DISK] == await everything(repository, point, DISK)
    assert before == _state(archived.path)


async def test_what_a_killed_borg_left_is_not_read(archived: Archived, workers: Workers) -> None:
    """A segment behind the last commit, as a backup under way has it."""
    (index,) = archived.path.glob("index.*")
    number = int(index.suffix[1:]) + 1
    segment = archived.path / "data" / "0" / str(number)
    segment.write_bytes(b"BORG_SEG" + os.urandom(5000))
    before = _state(archived.path)
    async with opened(archived.path, workers, scheme="borg") as repository:
        assert 3 == len(await repository.points())
    assert before == _state(archived.path)


async def test_a_locked_repository_is_read(archived: Archived, workers: Workers) -> None:
    (archived.path / "lock.exclusive").mkdir()
    (archived.path / "lock.exclusive" / "host@1.1-1").touch()
    async with opened(archived.path, workers, scheme="borg") as repository:
        assert 3 == len(await repository.points())


# --- damage --------------------------------------------------------------------------------------


async def test_one_flipped_bit_spoils_one_chunk(archived: Archived, workers: Workers) -> None:
    golden = archived.states["night-1"][DISK]
    segments = sorted((archived.path / "data" / "0").iterdir(), key=lambda path: int(path.name))
    places = ((path, path.read_bytes().find(golden[:64])) for path in segments)
    path, at = next((path, at) for path, at in places if at >= 0)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    async with opened(archived.path, workers, scheme="borg") as repository:
        disk = await repository.open_disk(await point_of(repository, "night-1"), DISK)
        with pytest.raises(CorruptImage, match="checksum mismatch"):
            await content(disk, 0, 512)
        assert golden[MIB:] == await content(disk, MIB, disk.size - MIB)
        await disk.close()
        assert [] == (await repository.verify("structure")).findings
        for level in ("packs", "chunks"):
            check = await repository.verify(level)
            (finding,) = check.findings
            hurts = {(h.point.partition("/")[2], h.disk): h.ranges for h in finding.hurts}
            expected = {("night-1", DISK): [(0, MIB)], ("night-2", DISK): [(0, MIB)]}
            assert expected == hurts
            assert "checksum mismatch" in finding.text


async def test_a_lost_segment(archived: Archived, workers: Workers) -> None:
    """Whatever was in it; the others are served, or said to be damaged."""
    segments = sorted((archived.path / "data" / "0").iterdir(), key=lambda path: int(path.name))
    largest = max(segments, key=lambda path: path.stat().st_size)
    largest.unlink()
    async with opened(archived.path, workers, scheme="borg") as repository:
        points = await repository.points()
        assert 3 == len(points)
        right, wrong = 0, 0
        for point in points:
            for disk in point.disks:
                try:
                    data = await everything(repository, point, disk.name)
                except DiskError:
                    wrong += 1
                else:
                    assert archived.states[point.id][disk.name] == data
                    right += 1
        damaged = [point for point in points if "damaged" in point.flags]
        assert wrong or damaged
        assert right
        assert (await repository.verify("packs")).findings


@pytest.mark.parametrize("which", ["data", "commit"])
async def test_a_pipe_in_place_of_a_segment_is_not_waited_for(
    archived: Archived, workers: Workers, which: str
) -> None:
    """It is damage: of what lay in it, or of everything where the last commit did."""
    segments = [path for path in (archived.path / "data").rglob("*") if path.is_file()]
    chosen = max(
        segments, key=lambda path: (which == "data" and path.stat().st_size, int(path.name))
    )
    chosen.unlink()
    os.mkfifo(chosen)

    async def read() -> None:
        async with opened(archived.path, workers, scheme="borg") as repository:
            await everything(repository, (await repository.points())[0], DISK)

    with pytest.raises(CorruptImage, match=f"/{chosen.name}: no regular file"):
        await asyncio.wait_for(read(), 60)


# --- the process ---------------------------------------------------------------------------------


async def test_a_killed_worker_is_started_again(original: Archived, workers: Workers) -> None:
    async with opened(original.path, workers, scheme="borg") as repository:
        assert isinstance(repository, BorgRepository)
        disk = await repository.open_disk(await point_of(repository, "night-1"), DISK)
        for pid in repository.borg.pids:
            os.kill(pid, signal.SIGKILL)
        golden = original.states["night-1"][DISK]
        assert golden == await content(disk, 0, disk.size)
        pids = repository.borg.pids
        await disk.close()
    assert pids
    await asyncio.sleep(0)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def test_one_that_dies_again_is_an_error(
    archived: Archived, workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crashing = tmp_path / "crashing"
    crashing.write_text("#!/bin/sh\nexit 3\n")
    crashing.chmod(0o755)
    monkeypatch.setenv("NBDSRV_BORG_PYTHON", str(crashing))
    with pytest.raises(RepositoryError, match=r"did not start: it ended; install borg"):
        async with opened(archived.path, workers, scheme="borg"):
            pass
    monkeypatch.setenv("NBDSRV_BORG_PYTHON", str(tmp_path / "none"))
    with pytest.raises(RepositoryError, match="is no program"):
        async with opened(archived.path, workers, scheme="borg"):
            pass


async def test_a_python_without_borg(
    archived: Archived, workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = tmp_path / "python"
    without.write_text('#!/bin/sh\nexec /usr/bin/python3 -S "$@"\n')
    without.chmod(0o755)
    monkeypatch.setenv("NBDSRV_BORG_PYTHON", str(without))
    with pytest.raises(RepositoryError, match="No module named 'borg'; install borg"):
        async with opened(archived.path, workers, scheme="borg"):
            pass


async def test_no_repository(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(RepositoryError, match="no borg repository"):
        async with opened(tmp_path, workers, scheme="borg"):
            pass
    (tmp_path / "data").mkdir()
    (tmp_path / "config").write_text("[something]\nelse = 1\n")
    with pytest.raises(DiskError, match=r"config|repository"):
        async with opened(tmp_path, workers, scheme="borg"):
            pass


async def test_links_that_lead_out(archived: Archived, workers: Workers, tmp_path: Path) -> None:
    config = archived.path / "config"
    (tmp_path / "config").write_bytes(config.read_bytes())
    config.unlink()
    config.symlink_to(tmp_path / "config")
    with pytest.raises(CorruptImage, match="leads out"):
        async with opened(archived.path, workers, scheme="borg"):
            pass
