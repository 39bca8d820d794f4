"""Backups of a simulated XCP-ng pool: exact, incremental, and full for a reason."""

import asyncio
import random
import re
from pathlib import Path

import pytest

from conformance.xapi.simulator import Simulator
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError
from nbdsrv.source import xapi_snapshots
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_owner import Owner, marked_name
from nbdsrv.source.xapi_records import find_vm, live_disks
from tests.source.xapi_pool import SIZE, Copy, add_vm, frozen_at, pool, read_all, vm_of


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xapi_snapshots, "BUSY_PAUSE_S", 0.02)


def bases(simulator: Simulator) -> list[str]:
    return [vdi["uuid"] for vdi in simulator.do("vdis") if vdi["type"] == "cbt_metadata"]


def snapshots_with_data(simulator: Simulator) -> list[str]:
    found = simulator.do("vdis")
    return [vdi["uuid"] for vdi in found if vdi["is_a_snapshot"] and vdi["type"] == "user"]


async def test_full_and_incrementals_are_exact_while_the_guest_writes(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        simulator.write(disk, 0, random.Random(1).randbytes(SIZE))
        simulator.do("guest", vdi=disk, seed=2)
        vm, copy = vm_of(simulator, workers), Copy()
        reasons = []
        for _ in range(5):
            found = await copy.take(vm, workers)
            reasons.append(found.reason)
            assert simulator.archived(found.checkpoint) == copy.content
        assert reasons == ["no checkpoint of it is known", "", "", "", ""]
        state = simulator.do("state")
        assert (state["sessions"], state["tasks"], state["snapshots"]) == (0, 0, [])
        assert not snapshots_with_data(simulator)
        assert sorted(bases(simulator)) == sorted(copy.checkpoints)


async def test_only_what_changed_is_told(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        vm, copy = vm_of(simulator, workers), Copy()
        await copy.take(vm, workers)
        simulator.write(disk, 65_535, b"ab")
        simulator.write(disk, SIZE - 1, b"z")
        async with frozen_at(vm, {"xvda": copy.checkpoints}) as frozen:
            _, changed = await read_all(frozen.disks[0], workers)
        last = SIZE // 65_536 * 65_536
        assert [(0, 131_072), (last, SIZE - last)] == changed


async def test_a_failed_backup_loses_no_change(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        vm, copy = vm_of(simulator, workers), Copy()
        await copy.take(vm, workers)
        base = bases(simulator)
        simulator.write(disk, 100_000, b"before the failure")

        async def fail() -> None:
            async with frozen_at(vm, {"xvda": copy.checkpoints}):
                simulator.write(disk, 900_000, b"while it was frozen")
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            await fail()
        assert base == bases(simulator)
        assert not snapshots_with_data(simulator)
        found = await copy.take(vm, workers)
        assert found.since == base[0]
        assert simulator.content(disk) == copy.content


async def test_cancelled_while_the_snapshot_is_taken(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        add_vm(simulator, "root")
        simulator.do("trouble", task_s=0.3)
        vm = vm_of(simulator, workers)

        async def freeze() -> None:
            async with frozen_at(vm, {}):
                raise AssertionError("was to be cancelled")

        for delay_s in (0.1, 0.3, 0.5):
            task = asyncio.create_task(freeze())
            await asyncio.sleep(delay_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [] == simulator.do("state")["snapshots"]
            assert not snapshots_with_data(simulator)


async def test_several_disks_at_one_moment(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path, hosts=2) as simulator:
        disks = add_vm(simulator, "root", "data", "[NOBAK] scratch")
        for number, disk in enumerate(disks):
            simulator.write(disk, number * 1000, b"disk %d" % number)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            assert ["xvda", "xvdb"] == [disk.name for disk in frozen.disks]
            assert ("web", "crash") == (frozen.vm, frozen.consistency)
            (card,) = frozen.facts["cards"]
            assert ("02:00:00:12:34:56", "Pool-wide") == (card["MAC"], card["network"])
            for disk in frozen.disks:
                content, _ = await read_all(disk, workers)
                assert simulator.archived(disk.checkpoint) == content
            assert 2 == len(snapshots_with_data(simulator))
            await frozen.succeed()
        assert 2 == len(bases(simulator))


async def test_hosts_that_cannot_leave_disks_out(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        add_vm(simulator, "root", "[NOBAK] scratch")
        simulator.do("trouble", no_ignore_vdis=True)
        async with frozen_at(vm_of(simulator, workers), {}) as frozen:
            assert ["xvda"] == [disk.name for disk in frozen.disks]
        assert not snapshots_with_data(simulator)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("off", "was off; it is on from now"),
        ("off-on", "cannot be told: SR_BACKEND_FAILURE_460.*unrelated"),
        ("gone", "is gone"),
        ("error", "cannot be told: SR_BACKEND_FAILURE_460.*CBTMetadataInconsistent"),
        ("resized", "was resized from"),
        ("moved", "snapshot of another disk"),
        ("foreign", "is gone"),
    ],
)
async def test_every_fallback_has_its_reason(
    trouble: str, reason: str, tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        simulator.write(disk, 0, b"first")
        vm, copy = vm_of(simulator, workers), Copy()
        await copy.take(vm, workers)
        known = list(copy.checkpoints)
        if trouble.startswith("off"):
            simulator.do("cbt", vdi=disk, on=False)
        if trouble == "off-on":
            simulator.do("cbt", vdi=disk, on=True)
        if trouble == "gone":
            simulator.do("destroy", vdi=known[0])
        if trouble == "error":
            simulator.do("trouble", cbt_error="CBTMetadataInconsistent")
        if trouble == "resized":
            simulator.do("resize", vdi=disk, size=SIZE + 65_536)
        if trouble == "moved":
            disk = simulator.do("move", vdi=disk)
        if trouble == "foreign":
            known = ["2d5a3d4e-0000-4000-8000-000000000000"]
        simulator.write(disk, 200_000, b"second")
        found = await copy.take(vm, workers, known=known)
        assert ("", "") == (found.context, found.since)
        assert re.search(reason, found.reason), found.reason
        assert simulator.content(disk) == copy.content
        simulator.write(disk, 300_000, b"third")
        found = await copy.take(vm, workers)
        assert not found.reason
        assert simulator.content(disk) == copy.content


async def test_an_older_base_serves_where_the_newest_is_gone(
    tmp_path: Path, workers: Workers
) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        vm, copy = vm_of(simulator, workers), Copy()
        await copy.take(vm, workers)
        old = copy.content
        simulator.write(disk, 10, b"since the first")
        await copy.take(vm, workers)
        newest, oldest = copy.checkpoints
        simulator.do("destroy", vdi=newest)  # its log becomes part of the next one's
        simulator.write(disk, 2_000_000, b"since the second")
        copy.content = old
        found = await copy.take(vm, workers)
        assert oldest == found.since
        assert simulator.content(disk) == copy.content


async def test_tracking_that_cannot_be_had(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root", cbt=False)
        copy = Copy()
        found = await copy.take(vm_of(simulator, workers), workers)
        assert "off; it is on from now" in found.reason
        assert found.checkpoint
        assert simulator.content(disk) == copy.content


# --- what crashes leave ---------------------------------------------------------------------------


async def test_what_a_dead_backup_left_is_a_base_for_the_next(
    tmp_path: Path, workers: Workers
) -> None:
    """Killed after the repository had committed: that point can still be built upon."""
    with pool(tmp_path) as simulator:
        (disk,) = add_vm(simulator, "root")
        vm, copy = vm_of(simulator, workers), Copy()
        session = vm._session()
        async with session:
            found = await find_vm(session, "web")
            disks = await live_disks(session, found)
            made = await xapi_snapshots.take(session, found, disks, disks)
            parts = Owner.new().run.split(".")
            parts[2:4] = ["4194304", "1"]  # a process there is not
            dead = Owner(".".join(parts))
            await session.call("VM.set_name_label", made.vm, marked_name("web", dead))
            await xapi_snapshots._set(
                session, "VDI", made.disks["xvda"].ref, xapi_snapshots.MARK, dead.run
            )
        copy.content = simulator.archived(made.disks["xvda"].uuid)
        copy.checkpoints = [made.disks["xvda"].uuid]
        (line,) = await vm.clean()
        assert "backup that has died" in line
        assert ([], []) == (simulator.do("state")["snapshots"], snapshots_with_data(simulator))
        assert copy.checkpoints == bases(simulator)
        simulator.write(disk, 77_777, b"after the crash")
        taken = await copy.take(vm, workers)
        assert taken.since == made.disks["xvda"].uuid
        assert simulator.content(disk) == copy.content


async def test_what_is_not_ours_or_is_alive_stays(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        add_vm(simulator, "root")
        vm = vm_of(simulator, workers)
        async with frozen_at(vm, {}) as frozen:
            assert [] == await vm.clean()
            await read_all(frozen.disks[0], workers)
            await frozen.succeed()
        assert 1 == len(bases(simulator))
        assert [] == await vm.clean()


async def test_old_bases_go(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xapi_snapshots, "SPARE_BASES", 1)
    with pool(tmp_path) as simulator:
        add_vm(simulator, "root")
        vm, copy = vm_of(simulator, workers), Copy()
        for _ in range(3):
            await copy.take(vm, workers)
        assert copy.checkpoints[0] in bases(simulator)
        assert 2 == len(bases(simulator))
        kept = bases(simulator)
        async with frozen_at(vm, {}) as frozen:
            await frozen.succeed(needed=kept)
        assert set(kept) < set(bases(simulator))


# --- who and where --------------------------------------------------------------------------------


async def test_names(tmp_path: Path, workers: Workers) -> None:
    with pool(tmp_path) as simulator:
        add_vm(simulator, "root")
        uuid = simulator.do("vm", name="other", disks=[])["uuid"]
        simulator.do("vm", name="other", disks=[])
        assert "web" == await vm_of(simulator, workers).vm()
        assert "other" == await vm_of(simulator, workers, vm=uuid).vm()
        with pytest.raises(SourceError, match=r"2 VMs are called 'other': .*give a uuid"):
            await vm_of(simulator, workers, vm="other").vm()
        with pytest.raises(SourceError, match="no VM 'nobody'"):
            await vm_of(simulator, workers, vm="nobody").vm()
        with pytest.raises(ConfigError, match="no disk 'xvdz'; it has xvda"):
            async with vm_of(simulator, workers).freeze({}, ["xvdz"]):
                pass
        with pytest.raises(SourceError, match="no disk that is not"):
            async with vm_of(simulator, workers, vm=uuid).freeze({}):
                pass
        assert [] == simulator.do("state")["snapshots"]
