"""A backup that dies at any call of the store leaves every point whole, and the next succeeds."""

import pytest

from nbdsrv.backup.engine import Order
from nbdsrv.disk.workers import Workers
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.faulty import Crash, Crashed, FaultyStore, Moment, crashes
from nbdsrv.store.memory import MemoryStore
from tests.backup.tracked import BITMAP, Guest, back_up
from tests.disk.threads import running_workers
from tests.repository.native.read_back import KIB, MIB, fresh_vault, listed, noise, read_back

CHUNK = 64 * KIB
SIZE = 5 * MIB


def opened(store: FaultyStore | MemoryStore) -> Vault:
    return Vault.open(store, lambda: "correct horse")


def copied(store: MemoryStore) -> MemoryStore:
    twin = MemoryStore()
    for row in store.list(""):
        twin.put_new(row.key, store.get(row.key))
    return twin


async def changed(workers: Workers, vault: Vault, guest: Guest) -> None:
    order = Order("vm", since=listed(vault)[-1].id, changed=BITMAP)
    await back_up(workers, vault, guest, order)


@pytest.mark.parametrize("cipher", [None, "aes-256-gcm"])
async def test_a_crash_at_any_call(cipher: str | None) -> None:
    before = MemoryStore()
    guest = Guest(bytearray(noise(SIZE)))
    past: dict[str, bytes] = {}
    async with running_workers() as workers:
        vault = fresh_vault(before, cipher=cipher)
        report = await back_up(workers, vault, guest)
        past[report.disks[0].point] = bytes(guest.content)
        guest.backed_up()
        guest.write(CHUNK, noise(2 * MIB))
        guest.discard(4 * MIB, MIB // 2)

        whole = FaultyStore(copied(before))
        await changed(workers, opened(whole), guest)
        stored = sum(row.size for row in whole.inside.list("packs/"))

        tried = 0
        for number, moment in crashes(whole.log):
            inside = copied(before)
            store = FaultyStore(inside, crash=Crash(number, moment))
            done = False
            try:
                await changed(workers, opened(store), guest)
                done = True
            except Crashed:
                pass
            assert store.crashed or done
            tried += 1
            vault = opened(inside)
            await check(vault, past, guest)
            left = sum(row.size for row in inside.list("packs/"))
            await changed(workers, vault, guest)
            await check(vault, past, guest)
            now = sum(row.size for row in inside.list("packs/"))
            # What the dead one has put is not put again, but for its open pack.
            assert now <= max(stored, left) + MIB + 8 * CHUNK
            assert read_back(vault, listed(vault)[-1]) == guest.content
        assert tried > 10


async def check(vault: Vault, past: dict[str, bytes], guest: Guest) -> None:
    """What is listed is the past, or the disk as it is now."""
    for record in listed(vault):
        assert read_back(vault, record) == past.get(record.id, guest.content)


async def test_torn_objects_are_no_points() -> None:
    """A store that leaves half an object: a point is then damaged, a pack is not adopted."""
    guest = Guest(bytearray(noise(MIB)))
    async with running_workers() as workers:
        inside = MemoryStore()
        fresh_vault(inside)
        whole = FaultyStore(copied(inside))
        await back_up(workers, opened(whole), guest)
        for number, moment in crashes(whole.log, torn=True):
            if moment is not Moment.TORN:
                continue
            torn = copied(inside)
            with pytest.raises(Crashed):
                await back_up(
                    workers, opened(FaultyStore(torn, crash=Crash(number, moment))), guest
                )
            vault = opened(torn)
            report = await back_up(workers, vault, guest)
            points, _ = vault.points("vm")
            assert points[-1].id == report.disks[0].point
            assert read_back(vault, points[-1]) == guest.content
