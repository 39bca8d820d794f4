"""QemuVm against a real QEMU: every frozen disk is the disk at one moment, whatever happens.

Writes come through the devices of a machine without a guest, at any time; the log of them is the
model that frozen disks are compared with.
"""

import asyncio
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.source import qemu_frozen, qmp
from nbdsrv.source.hypervisor import Frozen, SourceError
from nbdsrv.source.opening import open_frozen
from nbdsrv.source.qemu import QemuVm
from nbdsrv.source.qemu_frozen import QemuFrozen
from nbdsrv.source.qemu_move import MoveTarget, QemuMove
from nbdsrv.source.qemu_scratch import Scratch
from nbdsrv.source.qmp import QmpClient, open_qmp
from tests.disk.reading import content
from tests.source.victims import victim
from tests.source.virtual_machine import BLOCK, MIB, Drive, Machine, machine

DRIVES = (
    Drive("vd0", 6 * MIB),
    Drive("vd1", 3 * MIB + 512, iothread=True),
    Drive("vd2", 2 * MIB, "raw"),
)


def vm_of(vm: Machine, workers: Workers, more: str = "") -> QemuVm:
    return QemuVm(f"{vm.monitor}?scratch={vm.folder}{more}", workers)


async def images(frozen: Frozen, workers: Workers) -> dict[str, bytes]:
    """What each of its disks holds."""
    held = {}
    for disk in frozen.disks:
        async with open_frozen(disk, workers) as opened:
            held[disk.name] = await content(opened, 0, opened.size)
    return held


async def told(frozen: Frozen, workers: Workers) -> dict[str, set[int]]:
    """The blocks that each disk says have changed."""
    found = {}
    for disk in frozen.disks:
        async with open_frozen(disk, workers) as opened:
            extents = await opened.status(disk.context, 0, opened.size)
            assert extents.end == opened.size
            found[disk.name] = {
                block
                for offset, length, flags in extents.ranges()
                if flags
                for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
            }
    return found


def known(*frozen: Frozen) -> dict[str, list[str]]:
    """The checkpoints of these, the last one first."""
    names: dict[str, list[str]] = {}
    for each in reversed(frozen):
        for disk in each.disks:
            names.setdefault(disk.name, []).append(disk.checkpoint)
    return names


async def backed_up(vm: QemuVm, before: dict[str, list[str]]) -> QemuFrozen:
    """A backup that succeeds, of which nothing is read."""
    async with vm.freeze(before) as frozen:
        await frozen.succeed()
    return frozen


@asynccontextmanager
async def writing(vm: Machine, seed: int) -> AsyncIterator[None]:
    """A guest that writes all the time."""
    stop = asyncio.Event()

    async def write() -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            await vm.write_some(chance, 1)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        stop.set()
        await task


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch, guest: Machine) -> list[tuple[int, int]]:
    """For each transaction: how many writes had begun before it, and when it was over."""
    found: list[tuple[int, int]] = []
    execute = QmpClient.execute

    async def noting(self: QmpClient, command: str, *args: object, **named: object) -> object:
        before = len(guest.writes)
        answer = await execute(self, command, *args, **named)
        if command == "transaction":
            found.append((before, len(guest.writes)))
        return answer

    monkeypatch.setattr(QmpClient, "execute", noting)
    return found


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Machine]:
    async with machine(tmp_path, DRIVES) as running:
        yield running


async def test_a_full_and_five_incrementals_while_the_guest_writes(
    guest: Machine, workers: Workers, window: list[tuple[int, int]]
) -> None:
    vm = vm_of(guest, workers)
    await guest.write_some(random.Random(1), 20)
    before: dict[str, list[str]] = {}
    runs: list[Frozen] = []
    moments: list[int] = []
    async with writing(guest, 2):
        for run in range(6):
            async with vm.freeze(before) as frozen:
                begun = len(guest.writes)
                held = await images(frozen, workers)
                dirty = await told(frozen, workers) if run else {}
                assert await images(frozen, workers) == held
                await frozen.still_frozen()
                assert len(guest.writes) > begun, "nothing was written meanwhile"
                await frozen.succeed()
            # QEMU does one thing after the other: the moment is one of these, for all disks.
            low, high = window[-1]
            fitting = [each for each in range(max(low - 1, 0), high + 1) if guest.at(each) == held]
            assert fitting, f"no moment from {low} to {high} has these contents"
            for disk in frozen.disks:
                assert disk.since == (before[disk.name][0] if run else "")
                assert bool(disk.reason) == (not run)
                if run:
                    exact = [
                        guest.changed(disk.name, since, until)
                        for since in moments
                        for until in fitting
                    ]
                    assert dirty[disk.name] in exact
            runs.append(frozen)
            before, moments = known(*runs), fitting
    assert await guest.left() == []
    assert {len(names) for names in (await guest.checkpoints()).values()} == {2}
    assert sorted(os.listdir(guest.folder)) == [
        "ours.sock",
        "test.sock",
        "vd0.qcow2",
        "vd1.qcow2",
        "vd2.raw",
    ]


async def test_without_success_nothing_has_happened(guest: Machine, workers: Workers) -> None:
    vm = vm_of(guest, workers)
    first = await backed_up(vm, {})
    since = len(guest.writes)
    await guest.write("vd0", 0, 512, 1)
    async with vm.freeze(known(first)) as frozen:
        await guest.write("vd0", BLOCK, 512, 2)
    assert await guest.checkpoints() == {f"{d.name}-node": [d.checkpoint] for d in first.disks}
    await guest.write("vd0", 3 * BLOCK, 512, 3)
    async with vm.freeze(known(first, frozen)) as frozen:
        assert (await told(frozen, workers))["vd0"] == guest.changed("vd0", since, 99) == {0, 1, 3}
        assert await images(frozen, workers) == guest.at(99)


# --- any moment --------------------------------------------------------------------------------


async def test_a_qemu_that_takes_too_long_is_left_and_that_is_told(
    guest: Machine,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def never(_: QemuFrozen) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(qemu_frozen, "RELEASE_S", 0.1)
        patched.setattr(QemuFrozen, "_release", never)
        async with vm_of(guest, workers).freeze({}):
            pass
    assert "reason=QEMU did not answer within 0.1 s; the next backup removes it" in caplog.text
    assert await vm_of(guest, workers).clean()
    assert await guest.left() == []


async def test_cancelled_a_qemu_that_hangs_is_not_waited_for_as_usual(
    guest: Machine,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(qmp, "HURRY_S", 0.3)
    frozen = asyncio.Event()

    async def reading() -> None:
        async with vm_of(guest, workers).freeze({}):
            frozen.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(reading())
    await frozen.wait()
    with hung(guest):
        task.cancel()
        async with asyncio.timeout(20):
            await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
    assert "has not answered for 0.3 s; the next backup removes what there is" in caplog.text
    assert await vm_of(guest, workers).clean()
    assert await guest.left() == []


async def test_a_cancelled_move_of_a_qemu_that_hangs_says_how_to_go_on(
    guest: Machine, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "HURRY_S", 0.3)
    target = MoveTarget(str(tmp_path / "moved.qcow2"), "qcow2")
    await guest.write_some(random.Random(1), 20)
    async with monitor(guest) as client:
        under_way = asyncio.Event()
        move = QemuMove(client, "vd0", rate=65536)
        task = asyncio.create_task(move.to(target, lambda _, __: under_way.set()))
        await under_way.wait()
        with hung(guest):
            task.cancel()
            async with asyncio.timeout(20):
                with pytest.raises(SourceError, match=r"run the command again .* --cancel to end"):
                    await task
    async with monitor(guest) as client:
        move = QemuMove(client, "vd0")
        assert await move.cancel()


@contextmanager
def hung(vm: Machine) -> Iterator[None]:
    """It takes what it is sent, and says nothing."""
    vm.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        vm.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def monitor(vm: Machine) -> AsyncIterator[QmpClient]:
    client = await open_qmp("vm", path=vm.monitor)
    try:
        yield client
    finally:
        await client.close()


async def test_killed_at_any_command_the_next_incremental_is_exact(
    tmp_path: Path, workers: Workers
) -> None:
    drives = (Drive("vd0", MIB), Drive("vd1", MIB))
    chance = random.Random(3)
    async with machine(tmp_path, drives) as guest:
        vm = vm_of(guest, workers)
        location = f"{guest.monitor}?scratch={tmp_path}"
        older = await backed_up(vm, {})
        last = await backed_up(vm, known(older))
        since = len(guest.writes)
        commands = await victim(location, known(older, last), 0, "never")
        assert commands > 50
        full = os.environ.get("NBDSRV_FUZZ") == "full"
        for which in range(1, commands + 1, 1 if full else 3):
            await guest.write_some(chance, 2)
            killed = asyncio.create_task(
                victim(
                    location, known(older, last), which, chance.choice(("before", "sent", "after"))
                )
            )
            while not killed.done():
                await guest.write_some(chance, 1)
                await asyncio.sleep(0.02)
            await guest.write_some(chance, 2)
            async with vm.freeze(known(last)) as frozen:
                until = len(guest.writes)
                await guest.write_some(chance, 2)
                assert {disk.reason for disk in frozen.disks} == {""}
                assert await images(frozen, workers) == guest.at(until)
                for name, blocks in (await told(frozen, workers)).items():
                    assert blocks == guest.changed(name, since, until)
                await frozen.succeed()
            older, last, since = last, frozen, until
            assert await guest.left() == []


async def test_cancelled_at_any_command_nothing_is_left(tmp_path: Path, workers: Workers) -> None:
    async with machine(tmp_path, (Drive("vd0", MIB),)) as guest:
        vm = vm_of(guest, workers)
        last = await backed_up(vm, {})
        since, which, done = len(guest.writes), 0, False
        execute, count = QmpClient.execute, 0

        async def counted(self: QmpClient, command: str, *args: object, **named: object) -> object:
            nonlocal count
            count += self is not guest.test
            if count == which and self is not guest.test:
                task.cancel()
            return await execute(self, command, *args, **named)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(QmpClient, "execute", counted)
            while not done:
                which, count = which + 1, 0
                await guest.write_some(random.Random(which), 1)
                task = asyncio.create_task(backed_up(vm, known(last)))
                await asyncio.wait([task])
                done = not task.cancelled()
                assert await guest.left() == []
        assert which > 30
        async with vm.freeze(known(last)) as frozen:
            assert frozen.disks[0].since == last.disks[0].checkpoint
            assert (await told(frozen, workers))["vd0"] == guest.changed("vd0", since, 999)


# --- trouble -----------------------------------------------------------------------------------


async def test_the_end_of_the_job_ends_the_reading_and_says_so(
    guest: Machine, workers: Workers
) -> None:
    vm = vm_of(guest, workers)

    async def interrupted() -> None:
        async with vm.freeze({}) as frozen:
            await guest.test.execute("block-job-cancel", {"device": "nbdsrv-0", "force": True})
            with pytest.raises(SourceError, match="vd0: QEMU's backup job has ended"):
                await frozen.still_frozen()
            await images(frozen, workers)

    with pytest.raises(SourceError, match="backup job has ended: cancelled"):
        await interrupted()
    assert await guest.left() == []


async def test_a_vm_that_ends_meanwhile_is_named(guest: Machine, workers: Workers) -> None:
    vm = vm_of(guest, workers)

    async def interrupted() -> None:
        async with vm.freeze({}):
            guest.process.kill()
            guest.process.wait()
            await asyncio.sleep(0.1)
            raise DiskError("connection lost")

    with pytest.raises(SourceError, match=r"ours\.sock: QEMU has closed the connection"):
        await interrupted()
    assert not [each for each in os.listdir(guest.folder) if each.startswith("nbdsrv")]
    with pytest.raises(SourceError, match="Connection refused"):
        await backed_up(vm, {})


async def test_of_two_backups_one_is_refused(
    guest: Machine, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with vm_of(guest, workers).freeze({}) as frozen:
        scratch = Scratch(str(guest.folder), guest.monitor)
        with pytest.raises(SourceError, match="another backup of this VM is running"):
            scratch.open(None)
        assert await images(frozen, workers) == guest.at(0)


async def test_a_backup_and_a_move_of_one_disk_refuse_each_other_in_words(
    guest: Machine, workers: Workers, tmp_path: Path
) -> None:
    move = QemuMove(guest.test, DRIVES[0].name, rate=65536)
    target = MoveTarget(str(tmp_path / "moved.qcow2"), "qcow2")
    async with vm_of(guest, workers).freeze({}):
        with pytest.raises(SourceError, match=r"a backup of \w+ is running, or was killed; wait"):
            await move.to(target)
    await guest.write_some(random.Random(1), 20)
    moving = asyncio.create_task(move.to(target))
    async with asyncio.timeout(20):
        while not any(job["type"] == "mirror" for job in await guest.test.execute("query-jobs")):
            await asyncio.sleep(0.02)
    with pytest.raises(SourceError, match=r"busy: .* mirror; wait for its end; .* --cancel"):
        async with vm_of(guest, workers).freeze({}):
            pass
    moving.cancel()
    with suppress(asyncio.CancelledError):
        await moving
    assert not (tmp_path / "moved.qcow2").exists()
    assert await guest.left() == []


async def test_a_backup_by_another_monitor_is_refused(tmp_path: Path, workers: Workers) -> None:
    more = ("-qmp", f"unix:{tmp_path}/third.sock,server=on,wait=off")
    async with machine(tmp_path, (Drive("vd0", MIB),), *more) as guest:
        third = QemuVm(f"{tmp_path}/third.sock?scratch={tmp_path}", workers)
        async with vm_of(guest, workers).freeze({}) as frozen:
            with pytest.raises(SourceError, match="another backup of this VM is running"):
                await third.clean()
            with pytest.raises(SourceError, match="another backup of this VM is running"):
                await backed_up(third, {})
            await frozen.still_frozen()
            assert await images(frozen, workers) == guest.at(0)
        await backed_up(third, {})
        assert await guest.left() == []
    assert not [each for each in os.listdir(tmp_path) if each.startswith("nbdsrv")]


async def test_what_a_run_with_another_directory_left_is_removed(
    guest: Machine, workers: Workers
) -> None:
    before = guest.folder / "before"
    before.mkdir()
    await victim(f"{guest.monitor}?scratch={before}", {}, 0, "block-export-add")
    assert os.listdir(before)
    removed = await vm_of(guest, workers).clean()
    assert any(line.startswith(f"NBD server at {before}") for line in removed)
    assert os.listdir(before) == []
    await backed_up(vm_of(guest, workers), {})
    assert await guest.left() == []


async def test_room_gets_scarce(
    guest: Machine, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = vm_of(guest, workers)

    async def interrupted() -> None:
        async with vm.freeze({}) as frozen:
            monkeypatch.setattr("nbdsrv.source.qemu_scratch.RESERVE", 1 << 62)
            for _ in range(100):
                await asyncio.sleep(0.05)
                await images(frozen, workers)

    with pytest.raises(SourceError, match="no room is left"):
        await interrupted()
    assert await guest.left() == []
    with pytest.raises(SourceError, match="choose another"):
        await backed_up(vm, {})
    assert await guest.left() == []


async def test_a_server_that_runs_already(guest: Machine, workers: Workers) -> None:
    theirs = f"{guest.folder}/theirs.sock"
    address = {"type": "unix", "data": {"path": theirs}}
    await guest.test.execute("nbd-server-start", {"addr": address})
    with pytest.raises(SourceError, match=r"already running; .* say where: \?nbd="):
        await backed_up(vm_of(guest, workers), {})
    assert await guest.left() == []
    async with vm_of(guest, workers, f"&nbd={theirs}").freeze({}) as frozen:
        assert await images(frozen, workers) == guest.at(0)
    assert os.path.exists(theirs)
    assert await guest.left() == []


async def test_a_monitor_at_a_tcp_port(tmp_path: Path, workers: Workers) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    async with machine(tmp_path, (Drive("vd0", MIB),), *more) as guest:
        vm = QemuVm(f"127.0.0.1:{port}?scratch={tmp_path}", workers)
        assert await vm.vm() == "vm1"
        async with vm.freeze({}) as frozen:
            assert await images(frozen, workers) == guest.at(0)


async def test_the_private_directory_disappears(guest: Machine, workers: Workers) -> None:
    async def interrupted() -> None:
        async with vm_of(guest, workers).freeze({}) as frozen:
            (private,) = guest.folder.glob("nbdsrv-qemu-*")
            shutil.rmtree(private)
            await frozen.succeed()

    await interrupted()
    await backed_up(vm_of(guest, workers), {})
    assert not list(guest.folder.glob("nbdsrv-qemu-*"))


# --- which disks, which checkpoint ---------------------------------------------------------------


async def test_one_disk_is_chosen_by_its_name(guest: Machine, workers: Workers) -> None:
    async with vm_of(guest, workers).freeze({}, ["vd1"]) as frozen:
        assert [disk.name for disk in frozen.disks] == ["vd1"]
        (private,) = guest.folder.glob("nbdsrv-qemu-*")
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE((private / "nbd.sock").stat().st_mode) == 0o600
    vm = vm_of(guest, workers)
    with pytest.raises(SourceError, match="no disk 'sda'; there are: vd0, vd1, vd2"):
        await vm.freeze({}, ["sda"]).__aenter__()


async def test_drives_in_all_ways_they_can_be_given(tmp_path: Path, workers: Workers) -> None:
    names = ("virtio0", "disk1", "ide0-hd0", "vdt")
    paths = [tmp_path / name for name in names]
    for path in paths:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(MIB)]
        subprocess.run(create, check=True)
    limits = "throttling.bps-total=1000000000"
    node = "driver=throttle,throttle-group=group,node-name=top,file.driver=qcow2"
    more = [
        *("-drive", f"file={paths[0]},format=qcow2,if=virtio"),
        *("-drive", f"file={paths[1]},format=qcow2,if=none,id=disk1,{limits}"),
        *("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk1", "-hda", str(paths[2])),
        *("-object", "throttle-group,id=group,x-bps-total=1000000000"),
        *("-blockdev", f"{node},file.file.driver=file,file.file.filename={paths[3]}"),
        *("-device", "virtio-blk-pci,drive=top,id=vdt"),
    ]
    async with machine(tmp_path, (), *more) as guest:
        vm = QemuVm(f"{guest.monitor}?scratch={tmp_path}", workers)
        first = await backed_up(vm, {})
        assert tuple(disk.name for disk in first.disks) == names
        kept = [disk.facts["checkpoints"] for disk in first.disks]
        assert kept == [*["in the image"] * 3, "until QEMU ends"]
        async with vm.freeze(known(first)) as frozen:
            assert await images(frozen, workers) == dict.fromkeys(names, bytes(MIB))
            assert await told(frozen, workers) == {name: set() for name in names}
        assert await guest.left() == []


async def test_checkpoints_outlive_qemu_in_qcow2_and_a_crash_is_noticed(
    tmp_path: Path, workers: Workers
) -> None:
    drives = (Drive("vd0", MIB), Drive("vd1", MIB, "raw"), Drive("old", MIB, compat="0.10"))
    async with machine(tmp_path, drives) as guest:
        first = await backed_up(vm_of(guest, workers), {})
        await guest.write("vd0", BLOCK, 512, 1)
    async with machine(tmp_path, drives) as guest:
        vm = vm_of(guest, workers)
        async with vm.freeze(known(first)) as frozen:
            assert (await told_of(frozen, "vd0", workers)) == {1}
            reasons = [disk.reason for disk in frozen.disks]
            assert reasons[0] == ""
            assert reasons[1].endswith("is gone: a raw disk keeps none beyond the end of QEMU")
            await frozen.succeed()
    async with machine(tmp_path, drives) as guest:
        second = await backed_up(vm_of(guest, workers), known(frozen))
        guest.process.kill()
        guest.process.wait()
    async with machine(tmp_path, drives) as guest:
        vm = vm_of(guest, workers)
        async with vm.freeze(known(first, frozen, second)) as third:
            assert "inconsistent: QEMU ended without saving it" in third.disks[0].reason
            await third.succeed()
        left = await guest.checkpoints()
        assert left["vd0-node"] == [third.disks[0].checkpoint]


async def told_of(frozen: Frozen, name: str, workers: Workers) -> set[int]:
    disk = next(each for each in frozen.disks if each.name == name)
    async with open_frozen(disk, workers) as opened:
        extents = await opened.status(disk.context, 0, opened.size)
        return {offset // BLOCK for offset, _, flags in extents.ranges() if flags}


async def test_the_first_known_checkpoint_that_is_left_is_built_upon(
    guest: Machine, workers: Workers
) -> None:
    vm = vm_of(guest, workers)
    first = await backed_up(vm, {})
    second = await backed_up(vm, known(first))
    name = second.disks[0].checkpoint
    await guest.test.execute("block-dirty-bitmap-remove", {"node": "vd0-node", "name": name})
    async with vm.freeze(known(first, second)) as frozen:
        # One point for all disks, though two of them have a newer one.
        assert {disk.since for disk in frozen.disks} == {first.disks[0].checkpoint}
    disabled = {"node": "vd0-node", "name": first.disks[0].checkpoint}
    await guest.test.execute("block-dirty-bitmap-disable", disabled)
    async with vm.freeze(known(first, second)) as frozen:
        assert "has been disabled by somebody else" in frozen.disks[0].reason
        assert frozen.disks[1].since == name
