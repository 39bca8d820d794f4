"""What verification remembers, and whom it tells."""

import errno
import os

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.native.layout import PACKS, SCRUB, new_ulid, pack_of
from nbdsrv.repository.native.scrub import MAX_STATES, Scrubbing, damaged_packs
from nbdsrv.repository.native.tombstones import condemn, condemned_packs, standing
from nbdsrv.repository.native.verify import verify
from nbdsrv.repository.native.writer import begin
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import StoreError
from tests.repository.native.building import CHUNK
from tests.repository.native.read_back import fresh_vault, read_back
from tests.repository.native.test_collect import keys, reopened

ONE, TWO = os.urandom(32), os.urandom(32)


def test_what_is_damaged_is_told_until_it_is_sound() -> None:
    store = MemoryStore()
    assert damaged_packs(store) == set()
    first = Scrubbing(store)
    first.damaged(ONE, "packs/1", "a bit")
    first.damaged(TWO, "packs/2", "a bit")
    first.round("packs").cursor = "7f"
    first.save()
    first.save()
    second = Scrubbing(store)
    assert second.round("packs").cursor == "7f"
    second.sound(ONE)
    second.save()
    assert damaged_packs(store) == {TWO}
    assert len(keys(store, SCRUB)) == 1


def test_two_runs_at_a_time_keep_each_other_s_word() -> None:
    store = MemoryStore()
    one, two = Scrubbing(store), Scrubbing(store)
    one.damaged(ONE, "packs/1", "a bit")
    two.damaged(TWO, "packs/2", "a bit")
    one.save()
    two.save()
    assert damaged_packs(store) == {ONE, TWO}
    assert len(keys(store, SCRUB)) == 2
    Scrubbing(store).save()
    assert damaged_packs(store) == {ONE, TWO}
    assert len(keys(store, SCRUB)) == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"damaged": 7}', b'{"damaged": {"zz": {"key": ""}}}', b"\xff" * 9],
)
def test_what_cannot_be_read_says_nothing_and_goes(data: bytes) -> None:
    store = MemoryStore()
    for _ in range(MAX_STATES + 5):
        store.put(f"{SCRUB}{new_ulid()}.json", data)
    assert damaged_packs(store) == set()
    Scrubbing(store).save()
    assert len(keys(store, SCRUB)) == 1


def test_a_bad_sector_says_nothing_and_goes_but_an_outage_is_told() -> None:
    """Or no backup could be made until somebody deleted the file."""
    store = MemoryStore()
    made = Scrubbing(store)
    made.damaged(ONE, "packs/1", "a bit")
    made.save()
    failing = FaultyStore(store, failures=[Failure(calls("get"), errno.EIO)])
    assert damaged_packs(failing) == set()
    failing.distant = True
    with pytest.raises(StoreError):
        damaged_packs(failing)
    failing.distant = False
    Scrubbing(failing).save()
    assert len(keys(store, SCRUB)) == 1
    assert damaged_packs(store) == set()


def test_tombstones_are_read_as_they_were_put() -> None:
    store = MemoryStore()
    assert condemn(store, [], []) == []
    condemn(store, [ONE], [TWO])
    (found,) = standing(store)
    assert (found.packs, found.metas, found.readable) == ({ONE}, {TWO}, True)
    assert condemned_packs(store) == {ONE, TWO}


@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "missing"])
async def test_the_next_backup_heals_what_its_source_still_has(
    workers: Workers, *, lost: bool
) -> None:
    vault = fresh_vault()
    store = vault.store
    content = bytearray(os.urandom(6 * CHUNK))
    writer = await begin(vault, workers, "vm")
    await (await writer.disk("disk", len(content))).data(0, content, len(content))
    first = await writer.commit_record()
    (key,) = keys(store, PACKS)
    if lost:
        store.delete(key)
    else:
        data = bytearray(store.get(key))
        data[70_000] ^= 1
        store.put(key, data)
    done = verify(reopened(store), "packs")
    assert [finding.key for finding in done.findings] == [key]
    assert damaged_packs(store) == {pack_of(key)}
    writer = await begin(vault, workers, "vm", first)
    disk = await writer.disk("disk", len(content))
    for offset, length in await disk.wanted():
        await disk.data(offset, content[offset : offset + length], length)
    second = await writer.commit_record()
    healed = reopened(store)
    assert read_back(healed, second) == content
    assert read_back(healed, first) == content
    done = verify(reopened(store), "packs")
    assert [finding.hurts for finding in done.findings] == ([] if lost else [[]])
