"""Other tools' points become ours: when, how much is read, and what happens when it goes wrong."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio

from nbdsrv.backup.migrate import Migration, SourceFailed
from nbdsrv.backup.parent import choose_parent
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import RemoteRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.destination import NativeDestination
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.repository import CHANGED_SINCE, DiskFacts, Point, Repository
from nbdsrv.repository.selector import select
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.ulid import ulid_time
from protocol.extents import DATA, HOLE, ExtentList
from tests.cli.program import nbdsrv, refusal
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.repository.native.made import CHUNK, add_point, made, reopened
from tests.repository.native.made import content as chunks
from tests.repository.restic.forged import Forge

DAY_1 = 1_700_000_000.25
DAY = 86_400.0


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    async with running_workers() as running:
        yield running


# --- a foreign repository, of which everything can be counted ------------------------------------


@dataclass
class Foreign(Repository):
    """Points in memory, with changed-since contexts that may lie."""

    disks: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: list[Point] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    blind: bool = False
    mute: bool = False
    name = "/foreign"
    kind = "restic"
    identity = "an id"

    def __post_init__(self) -> None:
        self.read: dict[str, int] = {}

    def add(self, id_: str, disks: dict[str, bytes], group: str = "vm", **facts: object) -> Point:
        created = DAY_1 + DAY * len(self.made)
        rows = tuple(DiskFacts(name, len(data)) for name, data in disks.items())
        point = replace(Point(id_, group, created, rows), **facts)  # type: ignore[arg-type]
        self.disks[id_] = disks
        self.made.append(point)
        return point

    async def points(self, group: str | None = None) -> Sequence[Point]:
        return [point for point in self.made if group in {None, point.group}]

    async def open_disk(self, point: Point, name: str) -> Disk:
        if point.id in self.broken:
            raise CorruptImage("corrupt repository: /foreign: a block is gone")
        return ForeignDisk(self, point, name)

    async def close(self) -> None:
        pass


class ForeignDisk(Disk):
    """Bytes, counted as they are read; chunks of zeroes are holes."""

    format = "restic"

    def __init__(self, workers_of: Foreign, point: Point, name: str) -> None:
        super().__init__(THREADS[0])
        self.name = f"{point.id}/{name}"
        self.data = workers_of.disks[point.id][name]
        self.size = len(self.data)
        self.foreign = workers_of
        self.point = point
        self.disk = name
        if not workers_of.mute:
            others = [each.id for each in workers_of.made if name in workers_of.disks[each.id]]
            self.contexts = (*self.contexts, *(CHANGED_SINCE + each for each in others))

    def locate(self, offset: int, length: int) -> None:
        return None

    async def load(self, offset: int, length: int) -> None:
        raise NotImplementedError

    async def runs(self, offset: int, length: int) -> Sequence[RemoteRun]:
        return [RemoteRun(length)]

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        read = self.foreign.read
        read[self.point.id] = read.get(self.point.id, 0) + len(buffer)
        buffer[:] = self.data[offset : offset + len(buffer)]
        if b"unreadable" in bytes(buffer):
            raise CorruptImage("corrupt repository: a flipped bit")

    async def extents(self, offset: int, length: int) -> ExtentList:
        found = []
        for at in range(offset, offset + length, CHUNK):
            part = self.data[at : min(at + CHUNK, offset + length)]
            found.append((len(part), DATA if any(part) else HOLE))
        return ExtentList(offset, found)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        if not context.startswith(CHANGED_SINCE):
            return await super().status(context, offset, length)
        other = self.foreign.disks[context.removeprefix(CHANGED_SINCE)][self.disk]
        found = []
        for at in range(offset, offset + length, CHUNK):
            end = min(at + CHUNK, offset + length)
            same = self.foreign.blind or self.data[at:end] == other[at:end]
            found.append((end - at, 0 if same else 1))
        return ExtentList(offset, found)

    async def close(self) -> None:
        pass


THREADS: list[Workers] = []


@asynccontextmanager
async def target_of(path: Path, workers: Workers) -> AsyncIterator[NativeRepository]:
    THREADS[:] = [workers]
    store = DirectoryStore(str(path))
    vault = reopened(store) if (path / "nbdrepo.json").exists() else made(store)
    target = NativeRepository(vault, workers)
    try:
        yield target
    finally:
        await target.close()


async def everything(repository: Repository, point: Point, name: str) -> bytes:
    disk = await repository.open_disk(point, name)
    try:
        return await content(disk, 0, disk.size)
    finally:
        await disk.close()


TAIL = 100
FIRST, SECOND = chunks(1, 2, 0, 3, tail=TAIL), chunks(1, 4, 0, 3, tail=TAIL)
THIRD = chunks(1, 4, 5, 0, tail=TAIL)


async def test_a_history(tmp_path: Path, workers: Workers) -> None:
    """Names, times, order; only what is new is read and stored; a second run does nothing."""
    foreign = Foreign()
    states = {"a": FIRST, "b": SECOND, "c": THIRD}
    points = [foreign.add(id_, {"sdb": data, "sda": FIRST}) for id_, data in states.items()]
    async with target_of(tmp_path / "r", workers) as target:
        work = Migration(foreign, target)
        done = [await work.copy(point) for point in points]
        assert [True] * 3 == [each.copied for each in done]
        assert [None, done[0].id, done[1].id] == [each.parent for each in done]
        modes = [each.modes for each in done]
        incremental = {"sdb": "incremental", "sda": "incremental"}
        assert [{"sdb": "full", "sda": "full"}, incremental, incremental] == modes
        # What changed, and one chunk of each disk that is said not to have, maybe the short last.
        samples = {2 * CHUNK, CHUNK + TAIL, 2 * TAIL}
        assert foreign.read["a"] == 2 * (3 * CHUNK + TAIL)
        assert {foreign.read["b"] - CHUNK, foreign.read["c"] - CHUNK} <= samples
        there = await target.points("vm")
        assert [each.created for each in points] == [each.created for each in there]
        assert [["sdb", "sda"]] * 3 == [[disk.name for disk in each.disks] for each in there]
        for each, point in zip(there, points, strict=True):
            assert abs(ulid_time(each.id) - point.created) < 0.001
            assert states[point.id] == await everything(target, each, "sdb")
            assert FIRST == await everything(target, each, "sda")
            labels = each.facts["labels"]
            assert ("restic", "an id", point.id) == tuple(
                labels[f"origin.{name}"] for name in ("kind", "repository", "point")
            )
        read = dict(foreign.read)
        again = [await Migration(foreign, target).copy(point) for point in points]
        assert [False] * 3 == [each.copied for each in again]
        assert [each.id for each in done] == [each.id for each in again]
        assert read == foreign.read
        foreign.add("d", {"sdb": FIRST})
        new = await work.copy(foreign.made[-1])
        assert (done[2].id, {"sdb": "incremental"}) == (new.parent, new.modes)
        assert FIRST == await everything(target, (await target.points("vm"))[-1], "sdb")


async def test_what_is_newer_stays_the_latest(tmp_path: Path, workers: Workers) -> None:
    """Points of before ours: `latest`, and the parent of the next backup, are as they were."""
    foreign = Foreign()
    old = foreign.add("a", {"sda": SECOND})
    async with target_of(tmp_path / "r", workers) as target:
        ours = add_point(target.vault, "vm", {"sda": FIRST}, created=DAY_1 + 100 * DAY)
        done = await Migration(foreign, target).copy(old)
        assert ([done.id, ours.id], None) == (
            [point.id for point in await target.points("vm")],
            done.parent,
        )
        selected = await select(target, "vm/sda@latest")
        assert ours.id == selected.point.id
        parent = choose_parent(NativeDestination(target.vault), "vm", ["sda"], "auto")
        assert parent.record is not None
        assert ours.id == parent.record.id
        # One between the two is told in terms of the older one.
        second = await Migration(foreign, target).copy(foreign.add("b", {"sda": FIRST}))
        assert (done.id, {"sda": "incremental"}) == (second.parent, second.modes)
        ids = [point.id for point in await target.points("vm")]
        assert [done.id, second.id, ours.id] == ids


async def test_a_parent_of_somebody_else_proves_nothing(tmp_path: Path, workers: Workers) -> None:
    foreign = Foreign()
    async with target_of(tmp_path / "r", workers) as target:
        ours = add_point(target.vault, "vm", {"sda": FIRST}, created=DAY_1 - DAY)
        done = await Migration(foreign, target).copy(foreign.add("a", {"sda": SECOND}))
        assert (ours.id, {"sda": "scan"}) == (done.parent, done.modes)
        assert 3 * CHUNK + TAIL == done.read_bytes


@pytest.mark.parametrize("how", ["mute", "size", "renamed", "repository", "kind"])
async def test_no_proof_no_increment(tmp_path: Path, workers: Workers, how: str) -> None:
    """A name that is used again for another point is the worst: it would tell other changes."""
    foreign = Foreign(mute=how == "mute")
    foreign.add("a", {"sda": FIRST})
    async with target_of(tmp_path / "r", workers) as target:
        await Migration(foreign, target).copy(foreign.made[0])
        if how == "renamed":
            foreign.made[0] = replace(foreign.made[0], created=DAY_1 + 5)
            foreign.disks["a"] = {"sda": SECOND}
        elif how == "repository":
            foreign.identity = "another"
        elif how == "kind":
            foreign.kind = "borg"
        data = SECOND + b"longer" if how == "size" else SECOND
        point = foreign.add("b", {"sda": data})
        done = await Migration(foreign, target).copy(point)
        assert {"sda": "scan"} == done.modes
        assert data == await everything(target, (await target.points("vm"))[-1], "sda")
        if how == "renamed":
            again = await Migration(foreign, target).copy(foreign.made[0])
            assert again.copied
            (middle,) = [p for p in await target.points("vm") if p.id == again.id]
            assert SECOND == await everything(target, middle, "sda")


async def test_a_context_that_lies_is_found_out(tmp_path: Path, workers: Workers) -> None:
    foreign = Foreign(blind=True)
    foreign.add("a", {"sda": chunks(*[1] * 8)})
    data = chunks(*[2] * 8)
    async with target_of(tmp_path / "r", workers) as target:
        work = Migration(foreign, target)
        await work.copy(foreign.made[0])
        done = await work.copy(foreign.add("b", {"sda": data}))
        assert {"sda": "scan"} == done.modes
        point = (await target.points("vm"))[-1]
        assert "did not tell of all changes" in point.disks[0].facts["reason"]
        assert data == await everything(target, point, "sda")


async def test_damaged_points_leave_nothing(tmp_path: Path, workers: Workers) -> None:
    foreign = Foreign()
    bad = foreign.add("a", {"sda": FIRST})
    foreign.broken.add("a")
    listed = foreign.add("b", {}, flags=("damaged",), facts={"reason": "no tree"})
    midway = foreign.add("c", {"sda": FIRST, "sdb": b"unreadable" + FIRST})
    good = foreign.add("d", {"sda": SECOND})
    async with target_of(tmp_path / "r", workers) as target:
        work = Migration(foreign, target)
        for point, error in (
            (bad, "'vm', disk 'sda': corrupt repository: /foreign: a block is gone"),
            (listed, "point b of 'vm': no tree"),
            (midway, "disk 'sdb': corrupt repository: a flipped bit, at byte 0"),
        ):
            with pytest.raises(SourceFailed, match=error):
                await work.copy(point)
        assert [] == await target.points()
        done = await work.copy(good)
        assert (None, True) == (done.parent, done.copied)
        assert [] == list((tmp_path / "r" / "leases").glob("*"))


async def test_one_disk_then_all(tmp_path: Path, workers: Workers) -> None:
    foreign = Foreign()
    point = foreign.add("a", {"sda": FIRST, "sdb": SECOND})
    async with target_of(tmp_path / "r", workers) as target:
        work = Migration(foreign, target)
        one = await work.copy(point, "sdb")
        assert ({"sdb": "full"}, len(SECOND)) == (one.modes, one.size)
        assert not (await work.copy(point, "sdb")).copied
        both = await work.copy(point)
        assert both.copied
        assert not (await work.copy(point)).copied
        found = {p.id: [d.name for d in p.disks] for p in await target.points("vm")}
        assert {one.id: ["sdb"], both.id: ["sda", "sdb"]} == found


async def test_cancelled_it_leaves_nothing(tmp_path: Path, workers: Workers) -> None:
    foreign = Foreign()
    point = foreign.add("a", {"sda": chunks(*range(1, 90))})
    async with target_of(tmp_path / "r", workers) as target:
        for patience in (1, 5, 20, 60):
            task = asyncio.create_task(Migration(foreign, target).copy(point))
            for _ in range(patience):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if task.cancelled():
                assert [] == await target.points()
        assert [] == list((tmp_path / "r" / "leases").glob("*"))


async def test_times_that_no_clock_shows(tmp_path: Path, workers: Workers) -> None:
    """From the future, a point is not the latest for ever."""
    foreign = Foreign()
    point = replace(foreign.add("a", {"sda": FIRST}), created=4_000_000_000.0)
    foreign.made[0] = point
    async with target_of(tmp_path / "r", workers) as target:
        done = await Migration(foreign, target).copy(point)
        ours = add_point(target.vault, "vm", {"sda": SECOND}, created=4_000_000_001.0)
        assert done.id < ours.id
        assert not (await Migration(foreign, target).copy(point)).copied


# --- the command --------------------------------------------------------------------------------


PIECES = [bytes([n]) * (700_000 + n) for n in range(5)]


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A restic repository whose password is tried at once: three points of alpha, one of beta."""
    monkeypatch.setenv("RESTIC_PASSWORD", "secret words")
    forge = Forge(tmp_path / "restic")
    for day, host, pieces in (
        (1, "alpha", PIECES[:3]),
        (2, "alpha", [PIECES[0], *PIECES[3:]]),
        (3, "alpha", [PIECES[0], PIECES[4], PIECES[3]]),
        (4, "beta", PIECES[:2]),
    ):
        forge.file(pieces, snapshot={"time": f"2026-03-0{day}T10:00:00Z", "hostname": host})
    return forge.path


def test_the_command(tmp_path: Path, snapshots: Path) -> None:
    source, target = f"restic:{snapshots}", f"repo:{tmp_path}/r"
    assert 0 == nbdsrv("init", target).returncode
    process = nbdsrv("copy", f"{source}#alpha", target, "--json")
    assert (0, "") == (process.returncode, process.stderr)
    said = json.loads(process.stdout)
    modes = [each["modes"]["disk.raw"] for each in said["points"]]
    assert ["full", "scan", "incremental"] == modes  # the second has another size
    assert [] == said["damaged"]
    lines = nbdsrv("copy", source, target).stdout.splitlines()
    assert 4 == len(lines)
    assert 3 == sum("is there already" in line for line in lines)
    rows = json.loads(nbdsrv("ls", target, "--json").stdout)
    foreign = json.loads(nbdsrv("ls", source, "--json").stdout)
    assert [(row["group"], row["time"]) for row in foreign] == [
        (row["group"], row["time"]) for row in rows
    ]
    for row, other in ((rows[1], foreign[1]), (rows[2], foreign[2])):
        one = f"{target}#alpha/disk.raw@{row['point']}"
        two = f"{source}#alpha/disk.raw@{other['point']}"
        assert 0 == nbdsrv("compare", one, two).returncode
    damaged = next((snapshots / "snapshots").glob(f"{foreign[0]['point']}*"))
    damaged.write_bytes(b"x")
    process = nbdsrv("copy", source, target, "--json")
    assert 3 == process.returncode
    assert 1 == len(json.loads(process.stdout)["damaged"])
    assert f"not copied: point {foreign[0]['point']}" in process.stderr
    assert "corrupt repository" in refusal(1, "copy", f"{source}#@{foreign[0]['point']}", target)
    assert "no such group" in refusal(1, "copy", f"{source}#nobody", target)


def test_backup_of_a_foreign_disk(tmp_path: Path, snapshots: Path) -> None:
    """Through the ordinary engine: a point of now."""
    source, target = f"restic:{snapshots}#alpha/disk.raw@latest", f"repo:{tmp_path}/r"
    assert 0 == nbdsrv("init", target).returncode
    for mode in ("full", "scan"):
        process = nbdsrv("backup", source, "--to", target, "--group", "vm", "--json")
        assert 0 == process.returncode, process.stderr
        assert mode in process.stdout
    assert 0 == nbdsrv("compare", source, f"{target}#vm").returncode
