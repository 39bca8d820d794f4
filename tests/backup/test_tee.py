"""One read for everybody: clients and repositories of any speed and fate."""

import asyncio
import errno
import random
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.backup.engine import Backup, Order, SourceDisk
from nbdsrv.backup.tee import Tee
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import RemoteRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Data
from tests.backup.tracked import BITMAP, Guest, TrackedDisk, back_up, destinations
from tests.disk.threads import running_workers
from tests.repository.native.read_back import KIB, MIB, fresh_vault, listed, noise, read_back

CHUNK = 64 * KIB


class Reading:
    """Clients that read a disk through the Tee, and what they got."""

    def __init__(self, guest: Guest, reads: Sequence[tuple[int, int]], at_a_time: int = 4) -> None:
        self.guest = guest
        self.reads = list(reads)
        self.at_a_time = at_a_time
        self.over = threading.Event()
        self.most_held = 0

    async def __call__(self, tees: Mapping[str, Tee]) -> None:
        tee = tees["disk"]
        left = iter(self.reads)

        async def client() -> None:
            for offset, length in left:
                buffer = memoryview(bytearray(length))
                await tee.read_into(offset, buffer)
                assert buffer == self.guest.content[offset : offset + length]
                self.most_held = max(self.most_held, *(each.backlog for each in tee.branches))
                await asyncio.sleep(0)

        await asyncio.gather(*(client() for _ in range(self.at_a_time)))
        self.over.set()


async def run(
    workers: Workers,
    vaults: Sequence[Vault],
    source: Disk,
    reading: Reading | None,
    order: Order | None = None,
) -> object:
    @asynccontextmanager
    async def opened(_: Sequence[str]) -> AsyncIterator[Disk]:
        yield source

    work = Backup(destinations(vaults), workers, order or Order("vm"))
    return await work.run([SourceDisk("disk", opened)], reading)


def slowed(seconds: float, **shape: int) -> tuple[Vault, Vault]:
    """A repository every call of which takes so long, and the same for looking into it."""
    inside = MemoryStore()
    fresh_vault(inside, chunk=CHUNK, **shape)
    slow = FaultyStore(inside, delay_s=seconds)
    return Vault.open(slow, lambda: ""), Vault.open(inside, lambda: "")


class HeldUpStore(MemoryStore):
    """That stores no pack before something has happened."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def put_new(self, key: str, data: Data) -> bool:
        if key.startswith("packs/"):
            assert self._event.wait(30), "somebody waits for this pack"
        return super().put_new(key, data)


def held_up(event: threading.Event) -> tuple[Vault, Vault]:
    """A repository that stores nothing before that, twice as ``slowed``."""
    inside = HeldUpStore(event)
    fresh_vault(inside, chunk=CHUNK)
    return Vault.open(inside, lambda: ""), Vault.open(inside, lambda: "")


READS = st.lists(
    st.tuples(st.integers(0, 30 * CHUNK - 1), st.integers(1, 9 * CHUNK))
    | st.tuples(st.integers(0, 29).map(lambda n: n * CHUNK), st.just(CHUNK))
    | st.tuples(st.integers(0, 470).map(lambda n: n * 4 * KIB), st.just(4 * KIB)),
    max_size=40,
)


@given(
    reads=READS,
    hole=st.tuples(st.integers(0, 29 * CHUNK), st.integers(1, 9 * CHUNK)),
    incremental=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_any_reads_end_exact_in_repositories_of_any_chunk_size(
    reads: list[tuple[int, int]], hole: tuple[int, int], incremental: bool, seed: int
) -> None:
    dice = random.Random(seed)
    guest = Guest(bytearray(dice.randbytes(30 * CHUNK - 100)))
    guest.discard(*hole)
    size = len(guest.content)
    reads = [(at, min(span, size - at)) for at, span in reads if at < size]
    vaults = [fresh_vault(chunk=CHUNK), fresh_vault(chunk=256 * KIB)]
    async with running_workers() as workers:
        order = Order("vm")
        if incremental:
            await back_up(workers, vaults[0], guest)
            first = listed(vaults[0])[0]
            vaults = vaults[:1]
            guest.backed_up()
            guest.write(dice.randrange(size), dice.randbytes(3 * CHUNK))
            guest.discard(dice.randrange(size), 2 * CHUNK)
            order = Order("vm", since=first.id, changed=BITMAP)
        await run(workers, vaults, TrackedDisk(workers, guest), Reading(guest, reads), order)
    for vault in vaults:
        assert read_back(vault, listed(vault)[-1]) == guest.content


async def test_what_a_client_has_read_is_not_read_again(workers: Workers) -> None:
    guest = Guest(bytearray(noise(8 * MIB + 5)))
    source = TrackedDisk(workers, guest)
    reads = [(at, min(MIB, len(guest.content) - at)) for at in range(0, len(guest.content), MIB)]
    random.Random(7).shuffle(reads)
    vaults = [fresh_vault(chunk=CHUNK), fresh_vault(chunk=256 * KIB)]
    await run(workers, vaults, source, Reading(guest, reads))
    assert sorted(source.reads) == sorted(reads)
    for vault in vaults:
        assert read_back(vault, listed(vault)[0]) == guest.content


async def test_a_tee_hides_where_bytes_are(workers: Workers) -> None:
    tee = Tee(workers, TrackedDisk(workers, Guest(bytearray(MIB))))
    assert tee.locate(0, 100) == (RemoteRun(100),)
    await tee.close()
    assert bytes(tee.source.content) == bytes(MIB)  # type: ignore[attr-defined]


async def test_a_repository_that_is_slow_changes_nothing_for_anybody(workers: Workers) -> None:
    guest = Guest(bytearray(noise(48 * MIB)))
    reads = [(at, MIB) for at in range(0, len(guest.content), MIB)]
    reading = Reading(guest, reads)
    vaults = [slowed(0), held_up(reading.over)]
    source = TrackedDisk(workers, guest)
    report = await run(workers, [vault for vault, _ in vaults], source, reading)
    assert reading.most_held <= (32 << 20) + 2 * MIB
    for _, vault in vaults:
        assert read_back(vault, listed(vault)[0]) == guest.content
    quick, slow = report.disks  # type: ignore[attr-defined]
    assert quick.reread_bytes == 0
    assert slow.read_bytes == 48 * MIB


async def test_without_clients_the_fastest_sets_the_pace(workers: Workers) -> None:
    guest = Guest(bytearray(noise(64 * MIB)))
    vaults = [slowed(0.2, pack=4 * MIB), slowed(0, pack=4 * MIB)]
    source = TrackedDisk(workers, guest)
    report = await run(workers, [vault for vault, _ in vaults], source, None)
    for _, vault in vaults:
        assert read_back(vault, listed(vault)[0]) == guest.content
    slow, quick = report.disks  # type: ignore[attr-defined]
    assert quick.duration_s < slow.duration_s
    assert quick.reread_bytes == 0
    assert sum(span for _, span in source.reads) == 64 * MIB + slow.reread_bytes


async def test_a_repository_that_fails_at_any_call_changes_nothing(workers: Workers) -> None:
    guest = Guest(bytearray(noise(3 * MIB)))
    reads = [(at, 100 * KIB) for at in range(0, 3 * MIB - 100 * KIB, 100 * KIB)]
    inside = MemoryStore()
    fresh_vault(inside)
    whole = FaultyStore(inside)
    await run(
        workers,
        [Vault.open(whole, lambda: "")],
        TrackedDisk(workers, guest),
        Reading(guest, reads),
    )
    tried = 0
    for number in range(2, len(whole.log)):  # the first two open it
        inside = MemoryStore()
        fresh_vault(inside)
        failure = Failure(calls(numbers=[number]), errno.ENOSPC)
        bad = Vault.open(FaultyStore(inside, failures=[failure]), lambda: "")
        good = fresh_vault(chunk=256 * KIB)
        source = TrackedDisk(workers, guest)
        report = await run(workers, [bad, good], source, Reading(guest, reads))
        assert read_back(good, listed(good)[0]) == guest.content
        assert not any(d.reread_bytes for d in report.disks)  # type: ignore[attr-defined]
        for record in listed(bad):
            assert read_back(bad, record) == guest.content
        tried += 1
    assert tried > 8


async def test_all_repositories_may_fail_while_a_client_reads(workers: Workers) -> None:
    guest = Guest(bytearray(noise(4 * MIB)))
    inside = MemoryStore()
    fresh_vault(inside)
    failure = Failure(calls("put_new", key="packs/.*"), errno.ENOSPC)
    bad = Vault.open(FaultyStore(inside, failures=[failure]), lambda: "")
    reading = Reading(guest, [(at, MIB) for at in range(0, 4 * MIB, MIB)] * 5)
    with pytest.raises(DiskError) as caught:
        await run(workers, [bad], TrackedDisk(workers, guest), reading)
    assert caught.value.errno == errno.ENOSPC
    assert reading.over.is_set()
    assert listed(bad) == []


async def test_a_place_that_cannot_be_read_is_the_clients_error_then_the_backups(
    workers: Workers,
) -> None:
    guest = Guest(bytearray(noise(4 * MIB)), bad=3 * MIB + 5)
    vault = fresh_vault()

    async def reading(tees: Mapping[str, Tee]) -> None:
        buffer = memoryview(bytearray(2 * MIB))
        await tees["disk"].read_into(0, buffer)
        with pytest.raises(DiskError):
            await tees["disk"].read_into(2 * MIB, buffer)

    with pytest.raises(DiskError, match=f"at byte {3 * MIB + 5} of the disk"):
        await run(workers, [vault], TrackedDisk(workers, guest), reading)  # type: ignore[arg-type]
    assert listed(vault) == []
