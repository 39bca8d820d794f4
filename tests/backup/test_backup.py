"""What the engine reads, whom it trusts, and who fails with whom."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from nbdsrv.backup.engine import Backup, Order, SourceDisk
from nbdsrv.backup.plan import Mode
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, PointMissing, RepositoryError
from nbdsrv.export.grammar import parse_source
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from tests.backup.tracked import BITMAP, Guest, TrackedDisk, back_up, destinations
from tests.repository.native.read_back import KIB, MIB, fresh_vault, listed, noise, read_back

CHUNK = 64 * KIB


async def test_holes_are_never_read_and_the_rest_once(workers: Workers) -> None:
    guest = Guest(bytearray(noise(2 * MIB)) + bytes(20 * MIB) + noise(MIB))
    guest.holes = [(2 * MIB, 20 * MIB)]
    source = TrackedDisk(workers, guest)

    @asynccontextmanager
    async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
        yield source

    vaults = [fresh_vault(chunk=CHUNK), fresh_vault(chunk=4 * MIB), fresh_vault(chunk=256 * KIB)]
    seen: list[tuple[int, int]] = []
    work = Backup(destinations(vaults), workers, Order("vm"), advance=lambda *a: seen.append(a))
    report = await work.run([SourceDisk("disk", opened)])
    assert sum(length for _, length in source.reads) == 8 * MIB - MIB  # rounded to 4 MiB
    for vault in vaults:
        (record,) = listed(vault)
        assert read_back(vault, record) == guest.content
    assert [disk.read_bytes for disk in report.disks] == [7 * MIB] * 3
    assert len({disk.repository for disk in report.disks}) == 1  # stores in memory share a name
    assert seen[-1] == (7 * MIB, 7 * MIB)


async def test_several_disks_are_one_point(workers: Workers) -> None:
    vault = fresh_vault()
    shared = noise(MIB)
    guests = {"sda": Guest(bytearray(shared)), "sdb": Guest(bytearray(shared + noise(5)))}
    report = await back_up(workers, vault, guests, Order("vm", labels={"why": "test"}))
    (record,) = listed(vault)
    assert record.labels == {"why": "test"}
    assert [disk.name for disk in record.disks] == ["sda", "sdb"]
    for name, guest in guests.items():
        assert read_back(vault, record, name) == guest.content
    assert sum(disk.duplicate_bytes for disk in report.disks) == MIB  # whoever came second


async def test_two_disks_are_read_at_a_time(workers: Workers) -> None:
    vault = fresh_vault()
    guests = [Guest(bytearray(noise(MIB + n))) for n in range(4)]
    both = asyncio.Barrier(2)
    running = most = 0

    class Paired(TrackedDisk):
        """Gives nothing before another disk is being read too."""

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            async with asyncio.timeout(20):
                await both.wait()
            await super().read_into(offset, buffer)
            running -= 1

    def opener(guest: Guest) -> Callable[[Sequence[str]], AbstractAsyncContextManager[Disk]]:
        @asynccontextmanager
        async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
            yield Paired(workers, guest)

        return opened

    seen: list[tuple[int, int]] = []
    order = Order("vm")
    work = Backup(destinations([vault]), workers, order, advance=lambda *a: seen.append(a))
    report = await work.run([SourceDisk(f"sd{n}", opener(guest)) for n, guest in enumerate(guests)])
    assert most == 2
    (record,) = listed(vault)
    for disk, guest in zip(record.disks, guests, strict=True):
        assert read_back(vault, record, disk.name) == guest.content
    assert [disk.disk for disk in report.disks] == ["sd0", "sd1", "sd2", "sd3"]
    assert seen[-1] == (4 * MIB + 6, 4 * MIB + 6)
    assert seen == sorted(seen)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("key", ["packs/.*", "metas/.*", "points/.*", "leases/.*"])
async def test_a_repository_fails_alone(workers: Workers, key: str, number: int) -> None:
    good, inside = fresh_vault(), MemoryStore()
    fresh_vault(inside)
    failure = Failure(calls("put", "put_new", key=key), number)
    bad = Vault.open(FaultyStore(inside, failures=[failure]), lambda: "")
    guest = Guest(bytearray(noise(4 * MIB)))
    report = await back_up(workers, [bad, good], guest)
    (record,) = listed(good)
    assert read_back(good, record) == guest.content
    assert listed(bad) == []
    (failed,) = report.failed
    assert isinstance(failed.error, DiskError)
    assert failed.error.errno == number
    assert len(report.disks) == 1
    with pytest.raises(DiskError) as caught:
        await back_up(workers, bad, guest)
    assert caught.value.errno == number
    with pytest.raises(DiskError, match="no repository is left"):
        await back_up(workers, [bad, Vault.open(bad.store, lambda: "")], guest)


async def test_what_a_source_cannot_give_is_no_backup(workers: Workers) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(6 * MIB)), bad=5 * MIB + 17)
    with pytest.raises(DiskError, match=f"at byte {5 * MIB + 17} of the disk"):
        await back_up(workers, vault, guest)
    assert listed(vault) == []
    assert list(vault.store.list("leases/")) == []


async def test_a_change_that_nobody_told_of_is_found(workers: Workers) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(4 * MIB)))
    await back_up(workers, vault, guest)
    guest.write(MIB, b"changed")
    guest.lies = True
    order = Order("vm", since=listed(vault)[-1].id, changed=BITMAP, recheck=100)
    (disk,) = (await back_up(workers, vault, guest, order)).disks
    assert disk.mode == Mode.SCAN
    assert disk.reason.startswith(f"{BITMAP} did not tell of 1 changed chunks")
    assert (disk.rechecked_bytes, disk.recheck_mismatches) == (4 * MIB, 1)
    record = listed(vault)[-1]
    assert read_back(vault, record) == guest.content
    assert record.disks[0].rechecked_bytes == 4 * MIB


@pytest.mark.parametrize("at", [MIB // 2 + CHUNK, 3 * MIB + CHUNK], ids=["chunk", "page"])
async def test_data_in_a_hole_of_the_parent_that_nobody_told_of_is_found(
    workers: Workers, at: int
) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(MIB // 2)))
    guest.resize(4 * MIB)
    guest.discard(MIB // 2, 4 * MIB)
    await back_up(workers, vault, guest)
    guest.holes = [(MIB, 2 * MIB)]
    guest.content[at : at + 7] = b"changed"
    guest.lies = True
    order = Order("vm", since=listed(vault)[-1].id, changed=BITMAP, recheck=100)
    (disk,) = (await back_up(workers, vault, guest, order)).disks
    assert (disk.mode, disk.recheck_mismatches) == (Mode.SCAN, 1)
    assert disk.rechecked_bytes == 2 * MIB
    assert read_back(vault, listed(vault)[-1]) == guest.content


async def test_holes_of_the_parent_are_not_read_where_the_source_says_all_is_data(
    workers: Workers,
) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(MIB) + bytes(3 * MIB)))
    await back_up(workers, vault, guest)
    guest.backed_up()
    order = Order("vm", since=listed(vault)[-1].id, changed=BITMAP, recheck=100)
    (disk,) = (await back_up(workers, vault, guest, order)).disks
    assert (disk.mode, disk.rechecked_bytes) == (Mode.INCREMENTAL, MIB)


async def test_a_sample_is_read_of_what_is_said_to_be_unchanged(workers: Workers) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(8 * MIB)))
    await back_up(workers, vault, guest)
    guest.backed_up()
    guest.write(0, noise(CHUNK))
    order = Order("vm", since=listed(vault)[-1].id, changed=BITMAP, recheck=10)
    (disk,) = (await back_up(workers, vault, guest, order)).disks
    assert disk.mode == Mode.INCREMENTAL
    assert disk.read_bytes == CHUNK
    assert 0 < disk.rechecked_bytes < 2 * MIB
    assert disk.unchanged_bytes == 8 * MIB - CHUNK


async def test_modes_and_their_reasons(workers: Workers) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(MIB)))

    async def mode(order: Order) -> tuple[str, str]:
        (disk,) = (await back_up(workers, vault, guest, order)).disks
        return disk.mode, disk.reason

    assert await mode(Order("vm")) == ("full", "no point of 'vm' has this disk")
    first = listed(vault)[0].id
    assert await mode(Order("vm")) == ("scan", "nothing tells what changed")
    assert await mode(Order("vm", since="full")) == ("full", "--since full")
    assert await mode(Order("vm", changed=BITMAP)) == (
        "scan",
        f"nothing proves that {BITMAP} begins at {listed(vault)[-2].id}; say so by --since",
    )
    assert await mode(Order("vm", since=first, changed=BITMAP)) == (
        "incremental",
        f"{BITMAP} tells what changed since {first}",
    )
    assert await mode(Order("vm", since=first, changed="x:y")) == (
        "scan",
        "the source has no context x:y",
    )
    other = await back_up(workers, vault, {"other": guest}, Order("vm", since=first))
    assert other.disks[0].reason == f"point {first} has no disk 'other'"
    with pytest.raises(PointMissing, match="no point of 'vm' match --since 0123"):
        await mode(Order("vm", since="0123"))
    with pytest.raises(PointMissing, match="points of 'vm' match --since 2"):
        await mode(Order("vm", since="2"))
    with pytest.raises(RepositoryError, match="200 bytes"):
        await back_up(workers, vault, guest, Order("v" * 201, since="full"))


async def test_a_damaged_point_is_not_built_upon(workers: Workers) -> None:
    store = MemoryStore()
    vault = fresh_vault(store)
    guest = Guest(bytearray(noise(MIB)))
    await back_up(workers, vault, guest)
    await back_up(workers, vault, guest)
    first, second = (row.key for row in store.list("points/"))
    store.put(second, store.get(second)[:-30] + bytes(30))
    (disk,) = (await back_up(workers, vault, guest)).disks
    assert disk.mode == "scan"
    assert disk.reason == f"nothing tells what changed; {second} is damaged"
    assert vault.points("vm")[0][-1].parent == first[-29:-3]
    for row in list(store.list("points/")):
        store.put(row.key, b"gone")
    (disk,) = (await back_up(workers, vault, guest)).disks
    assert disk.mode == "full"
    assert "no point of 'vm' can be built upon: points/vm/" in disk.reason


async def test_a_point_that_cannot_be_read_is_not_called_damaged(workers: Workers) -> None:
    store = MemoryStore()
    guest = Guest(bytearray(noise(MIB)))
    await back_up(workers, fresh_vault(store), guest)
    (row,) = store.list("points/")
    failing = FaultyStore(store, failures=[Failure(calls("get", key=row.key), errno.EIO)])
    failing.distant = True
    (disk,) = (await back_up(workers, Vault.open(failing, str), guest)).disks
    assert disk.reason == f"no point of 'vm' can be built upon: {row.key} cannot be read"


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kept", [0, 100, -30, None])
async def test_a_map_that_was_cut_off_costs_a_scan_and_not_the_backup(
    workers: Workers, which: int, kept: int | None
) -> None:
    """As a power cut leaves it, or (None) a flipped bit; a bad sector is told the same way. What
    is damaged is not used again, though nothing has been verified.
    """
    store = MemoryStore()
    guest = Guest(bytearray(noise(MIB)))
    await back_up(workers, fresh_vault(store), guest)
    metas = [row.key for row in store.list("metas/")]
    assert len(metas) == 2  # a page's and a root's
    data = bytearray(store.get(metas[which]))
    data[130] ^= 1
    store.put(metas[which], data if kept is None else data[:kept])
    vault = Vault.open(store, str)
    await back_up(workers, vault, guest)
    assert read_back(vault, listed(vault)[-1]) == guest.content


async def test_points_of_another_repository_tell_what_changed(workers: Workers) -> None:
    """Its points have identities: the chain is proven without --since."""
    there, here = fresh_vault(chunk=CHUNK), fresh_vault(chunk=256 * KIB)
    guest = Guest(bytearray(noise(8 * MIB)))
    repository = NativeRepository(there, workers)
    points = []
    for part in (b"one", b"two", b"three"):
        guest.write(MIB, part)
        points.append((await back_up(workers, there, guest)).disks[0].point)

    async def copy(point: str, changed: str = "") -> tuple[str, str, int]:
        text = f"repo:/elsewhere#vm/disk@{point}"

        @asynccontextmanager
        async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
            (which,) = [each for each in await repository.points("vm") if each.id == point]
            disk = await repository.open_disk(which, "disk")
            try:
                yield disk
            finally:
                await disk.close()

        source = SourceDisk("disk", opened, parse_source(text))
        work = Backup(destinations([here]), workers, Order("vm", changed=changed, recheck=0))
        (disk,) = (await work.run([source])).disks
        return disk.mode, disk.reason, disk.read_bytes

    assert (await copy(points[0]))[0] == "full"
    record = listed(here)[-1]
    assert record.disks[0].cbt == {"kind": "nbdsrv:changed-since:", "id": points[0]}
    mode, reason, read = await copy(points[1])
    assert (mode, read) == ("incremental", 256 * KIB)
    assert reason == f"nbdsrv:changed-since:{points[0]} tells what changed since {record.id}"
    mode, reason, _ = await copy(points[2], f"nbdsrv:changed-since:{points[0]}")
    assert mode == "scan"
    assert reason.endswith(f"which was made of {points[1]}")
    assert read_back(here, listed(here)[-1]) == guest.content
    await repository.close()


async def test_a_rate_is_kept(workers: Workers) -> None:
    vault = fresh_vault()
    guest = Guest(bytearray(noise(4 * MIB)))

    @asynccontextmanager
    async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
        yield TrackedDisk(workers, guest)

    work = Backup(destinations([vault]), workers, Order("vm"), rate=Rate(10 * MIB))
    (disk,) = (await work.run([SourceDisk("disk", opened)])).disks
    assert 0.2 < disk.duration_s < 5


async def test_cancelling_leaves_nothing_behind(workers: Workers) -> None:
    import asyncio

    store = FaultyStore(MemoryStore(), delay_s=0.01)
    vault = fresh_vault(store)
    guest = Guest(bytearray(noise(8 * MIB)))
    for wait in (0.0, 0.03, 0.08, 0.15):
        task = asyncio.create_task(back_up(workers, vault, guest))
        await asyncio.sleep(wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert listed(vault) == []
        assert list(store.list("leases/")) == []
    await back_up(workers, vault, guest)
    assert read_back(vault, listed(vault)[0]) == guest.content
