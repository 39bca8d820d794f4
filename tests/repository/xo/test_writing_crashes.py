"""A kill before any change to the file system: what is listed is whole, the next run mends it."""

import asyncio
import os
import random
import shutil
from pathlib import Path

import pytest

from nbdsrv.backup.engine import Order
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import RepositoryError
from nbdsrv.repository.xo.sealing import CHACHA
from nbdsrv.repository.xo.writer_destination import XoDestination
from nbdsrv.repository.xo.writer_lock import VmLock
from nbdsrv.repository.xo.writer_place import Place
from nbdsrv.store.store import StoreError
from tests.backup.tracked import BITMAP, Guest, back_up
from tests.repository.native.read_back import noise
from tests.repository.xo.independent import all_points
from tests.repository.xo.written import KEY, MIB, changes_since, files, make_remote, opened


class Stopped(StoreError):
    """The process is gone: nothing it still tries has any effect."""


class Steps:
    """Records what is done, and stops before the nth thing."""

    def __init__(self, stop_at: int = 1 << 30) -> None:
        self.seen: list[tuple[str, str]] = []
        self._stop_at = stop_at

    def __call__(self, what: str, path: str) -> None:
        if len(self.seen) >= self._stop_at:
            raise Stopped(f"stopped before {what} {path}")
        self.seen.append((what, path))


def with_steps(root: Path, steps: Steps, layout: str = "") -> XoDestination:
    target = opened(root, layout)
    target.writing = Place(str(root), steps)
    return target


def kill_lock(root: Path) -> None:
    """What a kill leaves is a lock nobody renews; ten seconds are too long for a test."""
    for lock in root.glob("xo-vm-backups/*.lock"):
        lock.rmdir()


@pytest.mark.parametrize("layout", ["vhd-directory", "vhd"])
async def test_every_step(tmp_path: Path, workers: Workers, layout: str) -> None:
    start = make_remote(tmp_path / "start")
    guest = Guest(bytearray(noise(5 * MIB)))
    target = opened(start, layout)
    await back_up(workers, target, guest)
    target.close()
    before = bytes(guest.content)
    first = all_points(start)
    guest.backed_up()
    guest.write(MIB, noise(100))
    number, stopped = 0, True
    while stopped:
        root = tmp_path / "r"
        shutil.copytree(start, root)
        steps = Steps(number)
        target = with_steps(root, steps, layout)
        try:
            await back_up(workers, target, guest, changes_since(root, BITMAP))
        except StoreError:
            pass
        stopped = len(steps.seen) == number
        target.close()
        kill_lock(root)
        found = all_points(root)
        assert {stamp: found[stamp] for stamp in first} == first
        assert [each["disk"] for each in found.values()][1:] in ([], [guest.content])
        # And then as if nothing had been: the same changes, upon the latest point that is there.
        target = opened(root)
        (disk,) = (await back_up(workers, target, guest, changes_since(root, BITMAP))).disks
        target.close()
        assert disk.mode == "incremental"
        found = all_points(root)  # strict: no block without a bit, no second child
        assert next(iter(found.values()))["disk"] == before
        assert [each["disk"] for each in found.values()][-1] == guest.content
        disks = len(found)
        left = files(root)
        assert len([name for name in left if name.endswith(".nbdsrv")]) == disks
        assert len([name for name in left if name.endswith(".vhd")]) == disks
        assert not [name for name in left if ".nbdsrv-" in name]
        if layout == "vhd-directory":
            assert len([name for name in left if name.endswith("/bat")]) == disks
        shutil.rmtree(root)
        number += 1
    assert number > 15


async def test_nothing_is_named_before_it_is_durable(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    steps = Steps()
    target = with_steps(root, steps)
    await back_up(workers, target, Guest(bytearray(noise(5 * MIB))))
    target.close()
    seen = steps.seen
    point = next(n for n, step in enumerate(seen) if step[0] == "rename" and ".json" in step[1])
    made = [path for what, path in seen[:point] if what == "create"]
    synced = {path for what, path in seen[:point] if what == "sync"}
    assert set(made) <= synced
    assert len([path for path in made if "/blocks/" in path]) == 3
    settled = {path for what, path in seen[:point] if what == "settle"}
    for what, path in seen[:point]:
        if what in {"create", "mkdir", "rename"} and not path.endswith(".tmp"):
            assert path.rpartition("/")[0] in settled
    assert seen[point + 1] == ("settle", seen[point][1].rpartition("/")[0])


@pytest.mark.parametrize("seed", range(6))
async def test_histories(tmp_path: Path, workers: Workers, seed: int) -> None:
    """Writes, trims, growth, kills at any moment, both layouts, encrypted or not."""
    dice = random.Random(seed)
    root = make_remote(tmp_path / "r", CHACHA if seed % 3 == 0 else "none")
    layout = "vhd" if seed % 3 == 1 else ""
    guest = Guest(bytearray(6 * MIB + 512 * dice.randrange(5000)))
    past: dict[str, bytes] = {}
    for _ in range(9):
        for _ in range(dice.randrange(4)):
            at, span = dice.randrange(len(guest.content)), dice.randrange(1, 3 * MIB)
            change = dice.randrange(4)
            if change == 0:
                guest.discard(at, span)
            elif change == 1 and len(guest.content) < 20 * MIB:
                guest.resize(len(guest.content) + 512 * dice.randrange(4000))
            else:
                guest.write(at, noise(dice.choice([10, 5000, span])))
        steps = Steps(dice.randrange(120) if dice.random() < 0.4 else 1 << 30)
        target = with_steps(root, steps, layout)
        order = changes_since(root, BITMAP) if past and dice.random() < 0.7 else Order("vm")
        try:
            await back_up(workers, target, guest, order)
        except StoreError:
            pass
        target.close()
        kill_lock(root)
        found = {stamp: each["disk"] for stamp, each in all_points(root, KEY).items()}
        for stamp, content in found.items():
            assert content == past.setdefault(stamp, bytes(guest.content))
        assert set(past) == set(found)
        if found and found[max(found)] == guest.content:
            guest.backed_up()
    target = opened(root, layout)
    await back_up(workers, target, guest)
    target.close()
    assert [each["disk"] for each in all_points(root, KEY).values()][-1] == guest.content


async def test_the_lock_of_xen_orchestra(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target, guest = opened(root), Guest(bytearray(noise(MIB)))
    await back_up(workers, target, guest)
    (vm,) = (root / "xo-vm-backups").iterdir()
    lock = root / "xo-vm-backups" / f"{vm.name}.lock"
    lock.mkdir()
    was = files(root)
    with pytest.raises(RepositoryError, match="a job of Xen Orchestra"):
        await back_up(workers, target, guest)
    assert files(root) == was
    assert lock.exists()
    os.utime(lock, (0, 0))  # whoever had it has died
    await back_up(workers, target, guest)
    assert not lock.exists()
    held = VmLock(target.writing, vm.name)
    held.take()
    held.check()
    os.utime(lock, (0, 0))
    with pytest.raises(RepositoryError, match="taken this lock over"):
        held.check()
    held.release()
    assert lock.exists()  # it is the other's now
    target.close()


async def test_what_others_have_is_not_touched(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target, guest = opened(root), Guest(bytearray(noise(MIB)))
    await back_up(workers, target, guest)
    (vdi,) = root.glob("xo-vm-backups/*/vdis/*/*")
    vm = vdi.parent.parent.parent
    theirs = vm / "vdis" / "aaaaaaaa-0000-4000-8000-000000000001" / vdi.name
    (theirs / "data" / "20200101T000000Z.vhd" / "blocks").mkdir(parents=True)
    (theirs / ".nbdsrv-0.tmp").write_bytes(b"x")
    (vm / "notes.txt").write_bytes(b"x")
    alias = vdi / "20200101T000000Z.alias.vhd"  # in our directory, but leading to theirs
    alias.write_text("../aaaaaaaa-0000-4000-8000-000000000001/data")
    merging = vdi / ".20200101T000000Z.alias.vhd.merge.json"
    merging.write_text("{}")
    was = files(root)
    guest.write(0, noise(10))
    await back_up(workers, target, guest)
    assert set(was) - {"xo"} <= set(files(root))
    target.close()


async def test_cancellation_leaves_nothing(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target, guest = opened(root), Guest(bytearray(noise(9 * MIB)))
    await back_up(workers, target, guest)
    was = files(root)
    guest.write(0, noise(9 * MIB))
    for number in (0, 3, 6, 9, 14):
        steps = Steps()
        target.writing = Place(str(root), steps)
        task = asyncio.create_task(back_up(workers, target, guest))
        while len(steps.seen) <= number:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert files(root) == was
        assert not list(root.glob("xo-vm-backups/*.lock"))
    target.close()


def test_a_link_that_leads_out_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    root = make_remote(tmp_path / "r")
    (root / "xo-vm-backups").symlink_to(tmp_path / "out")
    with pytest.raises(Exception, match="symbolic link leads out"):
        Place(str(root)).make_directory("xo-vm-backups/vm")
    assert list((tmp_path / "out").iterdir()) == []
