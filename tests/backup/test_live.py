"""Running VMs: whatever fails or dies at whatever moment, all points are exact, no change is lost.

The hypervisor is made for these tests (``machine.py``), repositories and disks are the real ones.
"""

import asyncio
import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nbdsrv.backup.checkpoints import History, known_checkpoints, needed_checkpoints
from nbdsrv.backup.engine import Order
from nbdsrv.backup.live import LiveBackup, LiveReport
from nbdsrv.backup.several import Together, for_each
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, NbdsrvError, PointMissing
from nbdsrv.repository.native.destination import NativeDestination
from nbdsrv.repository.native.vault import Vault
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.moment import Moment
from nbdsrv.source.turn import turn
from nbdsrv.store.faulty import Crash, Crashed, Failure, FaultyStore, calls
from nbdsrv.store.faulty import Moment as When
from nbdsrv.store.memory import MemoryStore
from tests.backup.machine import BLOCK, STEPS, Killed, TrackedVm, as_machine
from tests.backup.tracked import destinations
from tests.repository.native.read_back import KIB, MIB, fresh_vault, listed, noise, read_back

CHUNK = 64 * KIB


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def machine(**changes: object) -> TrackedVm:
    content = {"vda": bytearray(noise(MIB)), "vdb": bytearray(noise(512 * KIB)) + bytes(CHUNK)}
    return TrackedVm("vm", content, **changes)  # type: ignore[arg-type]


def stores(count: int) -> list[MemoryStore]:
    made = [MemoryStore() for _ in range(count)]
    for store in made:
        fresh_vault(store)
    return made


def opened(store: MemoryStore | FaultyStore) -> Vault:
    return Vault.open(store, lambda: "")


async def back_up(
    workers: Workers,
    vaults: Sequence[Vault],
    vm: TrackedVm,
    order: Order | None = None,
    *,
    dry_run: bool = False,
    disks: Sequence[str] = (),
) -> LiveReport:
    work = LiveBackup(destinations(vaults), workers, order or Order(""), dry_run=dry_run)
    return await work.run(as_machine(vm, disks))


def check_points(vaults: Sequence[Vault], vm: TrackedVm) -> None:
    """Every point is what the disks were at its checkpoint."""
    for vault in vaults:
        for record in listed(vault):
            for disk in record.disks:
                assert disk.cbt is not None
                assert read_back(vault, record, disk.name) == vm.moments[disk.cbt["id"]][disk.name]


def modes(report: LiveReport) -> list[str]:
    return [disk.mode for disk in report.report.disks]


def scribble(vm: TrackedVm, source: random.Random, pieces: int = 3) -> None:
    for _ in range(pieces):
        disk = source.choice(list(vm.content))
        offset = source.randrange(len(vm.content[disk]))
        vm.write(disk, offset, source.randbytes(source.randrange(1, 3 * BLOCK)))


async def test_a_full_and_incrementals_while_the_guest_writes(workers: Workers) -> None:
    vm, vaults = machine(consistency="filesystem"), [opened(store) for store in stores(2)]
    source = random.Random(1)
    vm.step = lambda step: scribble(vm, source, 1) if step in {"read", "confirm"} else None
    assert modes(await back_up(workers, vaults, vm)) == ["full"] * 4
    for _ in range(4):
        scribble(vm, source)
        report = await back_up(workers, vaults, vm)
        assert modes(report) == ["incremental"] * 4
        assert report.warnings == []
        assert all("tells what changed since" in disk.reason for disk in report.report.disks)
        assert sum(disk.read_bytes for disk in report.report.disks) < 2 * MIB
    check_points(vaults, vm)
    record = listed(vaults[0])[-1]
    assert record.consistency == "filesystem"
    assert record.blobs["domain.xml"] == "<domain/>"
    assert record.blobs["machine"] == '{"name": "vm"}'
    assert "disks.json" in record.blobs
    assert len(vm.checkpoints) == 2  # the new one, and what it was built upon


def at(step: str, error: BaseException) -> Callable[[str], None]:
    def raised(now: str) -> None:
        if now == step:
            raise error

    return raised


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("step", STEPS)
async def test_a_kill_at_any_step(workers: Workers, step: str, merges: bool) -> None:
    vm, vaults = machine(merges=merges), [opened(store) for store in stores(2)]
    source = random.Random(step)
    await back_up(workers, vaults, vm)
    for _ in range(2):  # the second one meets what the first has left
        scribble(vm, source)
        vm.step = at(step, Killed())
        with pytest.raises(Killed):
            await back_up(workers, vaults, vm)
        vm.step = lambda _: None
        vm.reborn()
        scribble(vm, source)
    check_points(vaults, vm)
    report = await back_up(workers, vaults, vm)
    assert modes(report) == ["incremental"] * 4
    assert not vm.job
    check_points(vaults, vm)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
@pytest.mark.parametrize("which", [0, 1])
async def test_a_kill_at_any_commit(workers: Workers, which: int, when: When, merges: bool) -> None:
    vm, inside = machine(merges=merges), stores(2)
    vaults = [opened(store) for store in inside]
    source = random.Random(which)
    await back_up(workers, vaults, vm)
    for _ in range(2):
        scribble(vm, source)
        # Where is its commit? Found out by a run on copies, on which the hypervisor does not count.
        trial = [FaultyStore(copied(store)) for store in inside]
        await trial_run(workers, trial, vm)
        (number,) = [
            call.number
            for call in trial[which].log
            if call.method == "put_new" and call.key.startswith("points/")
        ]
        faulty: list[MemoryStore | FaultyStore] = list(inside)
        faulty[which] = FaultyStore(inside[which], crash=Crash(number, when))
        with pytest.raises(Crashed):
            await back_up(workers, [opened(store) for store in faulty], vm)
        vm.reborn()
        scribble(vm, source)
        check_points(vaults, vm)
    committed = [len(listed(vault)) for vault in vaults]
    assert committed[which] == (1 if when is When.BEFORE else 3)
    report = await back_up(workers, vaults, vm)
    assert modes(report) == ["incremental"] * 4
    check_points(vaults, vm)


def copied(store: MemoryStore) -> MemoryStore:
    twin = MemoryStore()
    for row in store.list(""):
        twin.put_new(row.key, store.get(row.key))
    return twin


async def trial_run(workers: Workers, trial: Sequence[FaultyStore], vm: TrackedVm) -> None:
    twin = TrackedVm(
        vm.name,
        {name: bytearray(content) for name, content in vm.content.items()},
        {each: {n: set(b) for n, b in dirty.items()} for each, dirty in vm.checkpoints.items()},
        merges=vm.merges,
        job=vm.job,
        unconfirmed=vm.unconfirmed,
    )
    twin.numbers = iter(range(1000, 2000))
    await back_up(workers, [opened(store) for store in trial], twin)


@pytest.mark.parametrize("error", [SourceError("QEMU is gone"), asyncio.CancelledError()])
@pytest.mark.parametrize("step", STEPS)
async def test_an_error_at_any_step(workers: Workers, step: str, error: BaseException) -> None:
    vm, vaults = machine(), [opened(store) for store in stores(2)]
    source = random.Random(step)
    await back_up(workers, vaults, vm)
    scribble(vm, source)
    vm.step = at(step, error)
    stored = step in {"succeed", "succeeded", "thaw", "thawed"}
    if stored and isinstance(error, SourceError):
        report = await back_up(workers, vaults, vm)
        assert report.warnings == ["vm: QEMU is gone"]
        assert modes(report) == ["incremental"] * 4
    else:
        with pytest.raises(type(error)):
            await back_up(workers, vaults, vm)
    vm.step = lambda _: None
    assert [len(listed(vault)) for vault in vaults] == [2 if stored else 1] * 2
    scribble(vm, source)
    report = await back_up(workers, vaults, vm)
    assert modes(report) == ["incremental"] * 4
    check_points(vaults, vm)


async def test_a_repository_that_failed_builds_upon_what_it_has(workers: Workers) -> None:
    vm, inside = machine(), stores(2)
    vaults = [opened(store) for store in inside]
    await back_up(workers, vaults, vm)
    source = random.Random(3)
    failing = Failure(calls("put_new", key="points/.*"), errno.ENOSPC)
    for _ in range(2):
        scribble(vm, source)
        bad = opened(FaultyStore(inside[1], failures=[failing]))
        report = await back_up(workers, [vaults[0], bad], vm)
        assert modes(report) == ["incremental"] * 2
        (failed,) = report.report.failed
        assert isinstance(failed.error, DiskError)
        scribble(vm, source)
    report = await back_up(workers, vaults, vm)
    assert modes(report) == ["incremental"] * 4
    check_points(vaults, vm)
    first = listed(vaults[0])[0].disks[0].cbt
    assert first is not None
    # Both have later ones now: the old checkpoint is not needed any more.
    await back_up(workers, vaults, vm)
    assert first["id"] not in vm.checkpoints


async def test_a_repository_that_was_away(workers: Workers) -> None:
    """It cannot even tell what it has; once it is back it goes on from what is kept for it."""
    vm, inside = machine(), stores(2)
    vaults = [opened(store) for store in inside]
    await back_up(workers, vaults, vm)
    away = opened(FaultyStore(inside[1], failures=[Failure(calls(key="points/.*"), errno.EIO)]))
    for _ in range(2):
        report = await back_up(workers, [vaults[0], away], vm)
        assert modes(report) == ["incremental"] * 2
        assert len(report.report.failed) == 1
    assert modes(await back_up(workers, vaults, vm)) == ["incremental"] * 4
    check_points(vaults, vm)


async def test_a_vm_that_was_put_back(workers: Workers) -> None:
    """Its image is an older copy, with the bitmaps of then; its latest point is no parent."""
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    await back_up(workers, [vault], vm)
    image = {name: bytearray(content) for name, content in vm.content.items()}
    checkpoints = {each: dict(dirty) for each, dirty in vm.checkpoints.items()}
    for _ in range(2):
        vm.write("vda", 0, noise(CHUNK))
        await back_up(workers, [vault], vm)
    vm.content, vm.checkpoints = image, checkpoints
    vm.write("vdb", 0, b"changed")
    report = await back_up(workers, [vault], vm)
    assert modes(report) == ["incremental"] * 2
    assert sum(disk.read_bytes for disk in report.report.disks) == CHUNK
    check_points([vault], vm)


async def test_a_repository_that_is_new_is_filled_while_the_other_goes_on(workers: Workers) -> None:
    vm, vaults = machine(), [opened(store) for store in stores(2)]
    await back_up(workers, vaults[:1], vm)
    assert (
        modes(await back_up(workers, vaults, vm)) == ["incremental", "incremental"] + ["full"] * 2
    )
    assert modes(await back_up(workers, vaults, vm)) == ["incremental"] * 4
    check_points(vaults, vm)


async def test_one_that_was_left_out_too_long_scans_and_says_why(workers: Workers) -> None:
    vm, vaults = machine(), [opened(store) for store in stores(2)]
    await back_up(workers, vaults, vm)
    for _ in range(3):
        await back_up(workers, vaults[:1], vm)
    report = await back_up(workers, vaults, vm)
    assert modes(report) == ["incremental"] * 2 + ["scan"] * 2
    reasons = {disk.reason for disk in report.report.disks if disk.mode == "scan"}
    assert all("what changed is known since checkpoint c4, and" in reason for reason in reasons)
    check_points(vaults, vm)


async def test_without_a_repository_the_old_checkpoint_stays(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    await back_up(workers, [vault], vm)
    vm.write("vda", 0, b"changed")
    bad = FaultyStore(inside, failures=[Failure(calls("put_new", key="points/.*"), errno.ENOSPC)])
    with pytest.raises(DiskError):
        await back_up(workers, [opened(bad)], vm)
    assert list(vm.checkpoints) == ["c1"]
    assert modes(await back_up(workers, [vault], vm)) == ["incremental"] * 2
    check_points([vault], vm)


async def test_a_dry_run_reads_and_leaves_nothing(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    store = FaultyStore(inside)
    vault = opened(store)
    (one, other) = (await back_up(workers, [vault], vm, dry_run=True)).previews
    assert (one.mode, one.changed_bytes) == ("full", None)
    await back_up(workers, [vault], vm)
    vm.write("vda", 5, b"changed")
    vm.blind = frozenset({"vdb"})
    before, known = {row.key for row in inside.list("")}, list(vm.checkpoints)
    store.log.clear()
    one, other = (await back_up(workers, [vault], vm, dry_run=True)).previews
    assert (one.group, one.disk, one.mode, one.changed_bytes) == ("vm", "vda", "incremental", CHUNK)
    assert (other.mode, other.reason) == ("scan", "no checkpoint of this disk is known")
    assert {row.key for row in inside.list("")} == before
    assert {call.method for call in store.log} <= {"get", "get_range", "list"}
    assert (list(vm.checkpoints), vm.job, vm.unconfirmed) == (known, False, "")


async def test_reasons(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    await back_up(workers, [vault], vm)

    async def reasons(order: Order | None = None) -> dict[str, tuple[str, str]]:
        report = await back_up(workers, [vault], vm, order)
        check_points([vault], vm)
        return {disk.disk: (disk.mode, disk.reason) for disk in report.report.disks}

    vm.content["vda"] += bytes(CHUNK)
    found = await reasons()
    assert found["vda"][0] == "scan"
    assert f"changed from {MIB} to {MIB + CHUNK} bytes" in found["vda"][1]
    assert found["vdb"][0] == "incremental"
    vm.wrong_context = True
    assert "has no context test:changed" in (await reasons())["vdb"][1]
    vm.wrong_context = False
    vm.content["vdc"] = bytearray(noise(CHUNK))
    found = await reasons()
    assert found["vdc"][0] == "full"
    assert "has no disk 'vdc'" in found["vdc"][1]
    assert found["vda"][0] == "incremental"
    assert (await reasons(Order("", since="full")))["vda"] == ("full", "--since full")
    vm.checkpoints.clear()  # the image was replaced
    assert (await reasons())["vda"] == ("scan", "no checkpoint of this disk is known")


async def test_a_point_that_the_user_names(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    source = random.Random(5)
    for _ in range(2):
        await back_up(workers, [vault], vm)
        scribble(vm, source)
    older = listed(vault)[0]
    report = await back_up(workers, [vault], vm, Order("", since=older.id))
    assert modes(report) == ["incremental"] * 2
    assert older.id in report.report.disks[0].reason
    check_points([vault], vm)
    vm.step = at("freeze", AssertionError("nothing is to be frozen"))
    with pytest.raises(PointMissing, match="no point of 'vm' match"):
        await back_up(workers, [vault], vm, Order("", since="01NONE"))


async def test_one_disk_of_several(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    await back_up(workers, [vault], vm, disks=["vdb"])
    (record,) = listed(vault)
    assert [disk.name for disk in record.disks] == ["vdb"]
    assert modes(await back_up(workers, [vault], vm)) == ["full", "incremental"]
    check_points([vault], vm)


async def test_what_a_crash_left_is_told(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    await back_up(workers, [vault], vm)
    vm.step = at("read", Killed())
    with pytest.raises(Killed):
        await back_up(workers, [vault], vm)
    vm.step = lambda _: None
    vm.reborn()
    report = await back_up(workers, [vault], vm)
    assert report.cleaned == ["job backup0", "checkpoint c2"]


async def test_one_at_a_time(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    with turn("test:vm"), pytest.raises(SourceError, match=r"process [0-9]+ of nbdsrv"):
        await back_up(workers, [opened(inside)], vm)
    await back_up(workers, [opened(inside)], vm)


async def test_several_vms_each_for_itself(workers: Workers) -> None:
    vault = opened(stores(1)[0])
    vms = [machine() for _ in range(4)]
    for number, vm in enumerate(vms):
        vm.name = f"vm{number}"
    vms[1].step = at("freeze", SourceError("vm1: no"))
    under_way, most = 0, 0
    seen: list[tuple[int, int]] = []
    together = Together(lambda *moved: seen.append(moved))
    work = LiveBackup(destinations([vault]), workers, Order(""))

    async def one(vm: TrackedVm) -> LiveReport:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await work.run(as_machine(vm), together.part())
        finally:
            under_way -= 1

    done = await for_each(vms, 2, one)
    assert most == 2
    assert isinstance(done[1], NbdsrvError)
    assert [each.vm for each in done if isinstance(each, LiveReport)] == ["vm0", "vm2", "vm3"]
    assert vault.groups() == ["vm0", "vm2", "vm3"]
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total in seen)


async def test_two_vms_of_one_name_are_not_one(workers: Workers) -> None:
    vault = opened(stores(1)[0])
    work = LiveBackup(destinations([vault]), workers, Order(""))
    await work.run(as_machine(machine()))
    with pytest.raises(SourceError, match="elsewhere is named 'vm', as test:vm is"):
        await work.run(replace(as_machine(machine()), place="test:elsewhere"))


async def test_a_moment_that_is_looked_at(workers: Workers) -> None:
    vm, (inside,) = machine(), stores(1)
    vault = opened(inside)
    await back_up(workers, [vault], vm)
    vm.write("vda", 0, b"changed")
    then = bytes(vm.content["vda"])
    moment = await Moment.open(as_machine(vm), workers)
    vm.write("vda", 0, b"later..")
    disk = await moment.disk("vda")
    buffer = bytearray(disk.size)
    await disk.read_into(0, memoryview(buffer))
    assert buffer == then
    assert disk.name == "vm/vda"
    with pytest.raises(SourceError, match="wait until it has ended"):
        await back_up(workers, [vault], vm)
    await disk.close()
    await moment.close()
    await moment.close()
    assert list(vm.checkpoints) == ["c1"]
    assert modes(await back_up(workers, [vault], vm)) == ["incremental"] * 2
    check_points([vault], vm)


async def test_the_only_disk_of_a_moment_ends_it(workers: Workers) -> None:
    vm = machine()
    moment = await Moment.open(as_machine(vm, ["vdb"]), workers)
    disk = await moment.only_disk()
    assert vm.job
    await disk.close()
    assert not vm.job
    disk = await (await Moment.open(as_machine(vm, ["vdb"]), workers)).only_disk()
    vm.step = at("confirm", SourceError("the scratch space is full"))
    with pytest.raises(SourceError, match="scratch space"):
        await disk.close()
    assert not vm.job
    vm.step = lambda _: None
    moment = await Moment.open(as_machine(vm), workers)
    with pytest.raises(ConfigError, match="vda, vdb"):
        await moment.only_disk()
    assert not vm.job
    vm.step = at("frozen", SourceError("no"))
    with pytest.raises(SourceError, match="no"):
        await Moment.open(as_machine(vm), workers)
    vm.step = lambda _: None
    opening = asyncio.ensure_future(Moment.open(as_machine(vm), workers))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not vm.job


def test_the_best_checkpoints_come_first(workers: Workers) -> None:
    del workers
    vault = fresh_vault()

    def history(*ids: str) -> History:
        from nbdsrv.repository.native.point import DiskRecord, PointRecord, Ref

        ref = Ref(id="0" * 64, pack="0" * 64, offset=0, length=0, codec=0)
        return History(
            NativeDestination(vault),
            "vm",
            [
                PointRecord(
                    id=f"01{each}",
                    group="vm",
                    created=0,
                    disks=[
                        DiskRecord(
                            name="vda",
                            size=1,
                            root=ref,
                            image_id="",
                            cbt={"kind": "qemu", "id": each},
                        )
                    ],
                )
                for each in ids
            ],
        )

    known = known_checkpoints([history("c4", "c2", "c1"), history("c3", "c2", "c1")], "qemu")
    assert known == {"vda": ["c2", "c1", "c4", "c3"]}
    assert known_checkpoints([history("c1")], "xapi") == {}
    assert needed_checkpoints(known) == ["c2", "c1", "c4", "c3"]


@pytest.mark.parametrize("seed", range(12))
async def test_any_history(workers: Workers, seed: int) -> None:
    """Kills, errors and repositories that come and go, in any order: exact, and not full again."""
    source = random.Random(seed)
    vm, inside = machine(merges=bool(seed % 2)), stores(3)
    vaults = [opened(store) for store in inside]
    await back_up(workers, vaults, vm)
    for _ in range(10):
        scribble(vm, source)
        what = source.choice(["kill", "error", "store", "store", "good"])
        used = list(vaults)
        if what in {"kill", "error"}:
            error = Killed() if what == "kill" else SourceError("no")
            vm.step = at(source.choice(STEPS), error)
        elif what == "store":
            number = source.randrange(3)
            method, key = source.choice(
                [("put_new", "p.*"), ("list", "points/.*"), ("get", "metas/.*")]
            )
            failure = Failure(calls(method, key=key), errno.EIO, times=source.choice([1, None]))
            used[number] = opened(FaultyStore(inside[number], failures=[failure]))
        try:
            await back_up(workers, used, vm)
        except (Killed, NbdsrvError):
            pass
        vm.step = lambda _: None
        vm.reborn()
        check_points(vaults, vm)
    scribble(vm, source)
    report = await back_up(workers, vaults, vm)
    assert len(report.report.disks) == 6
    check_points(vaults, vm)
