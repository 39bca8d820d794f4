"""Verification: every broken bit is found, and whom it hurts is told."""

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.damage import Finding
from nbdsrv.repository.native.layout import INDEX, METAS, PACKS, POINTS, SCRUB, pack_of, point_key
from nbdsrv.repository.native.pack import parse_directory, parse_trailer
from nbdsrv.repository.native.prune import prune
from nbdsrv.repository.native.scrub import damaged_packs
from nbdsrv.repository.native.slots import Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.verify import Budget, Verified, verify
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.faulty import Crash, Crashed, Failure, FaultyStore, Moment, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store
from tests.repository.native.building import CHUNK, Building
from tests.repository.native.read_back import read_back
from tests.repository.native.test_collect import (
    PASSPHRASE,
    Kept,
    Time,
    changed,
    content,
    copied,
    history,
    keys,
    reopened,
)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(Time())


def flip(store: Store, key: str, at: int, bit: int = 0) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 1 << bit
    store.put(key, data)


def told(done: Verified) -> list[tuple[str, int | None]]:
    return [(finding.key, finding.offset) for finding in done.findings]


@pytest.mark.parametrize("level", ["structure", "packs", "chunks"])
@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_sound_repository_has_no_findings(
    store: MemoryStore, level: str, passphrase: str | None
) -> None:
    kept = history(store, passphrase)
    done = verify(reopened(store), level)
    assert done.findings == []
    assert done.notes == []
    assert (done.points, done.disks, done.completed) == (4, 4, True)
    packs = keys(store, PACKS, METAS)
    assert done.packs == len(packs)
    assert done.checked == (0 if level == "structure" else len(packs))
    assert (done.entries > 0) == (level == "chunks")
    assert len(keys(store, SCRUB)) == (level != "structure")
    collect(reopened(store), grace_s=0)
    kept.drop(0)
    collect(reopened(store), grace_s=0)
    assert verify(reopened(store), level).findings == []


def entries_of(store: Store, key: str) -> list[tuple[int, int]]:
    """(offset, end) of the entries of a pack."""
    data = store.get(key)
    offset, _ = parse_trailer(data[-24:], len(data))
    return [
        (row.offset, row.offset + 52 + row.clen) for row in parse_directory(data[offset:], offset)
    ]


def places_in(store: Store, key: str) -> Iterator[tuple[int, int | None]]:
    """(byte, offset of its entry) for every kind of byte of a pack."""
    size = len(store.get(key))
    entries = sorted(entries_of(store, key))
    for at in (0, 8, 9, 12, 20, 40):
        yield at, None
    for start, end in (entries[0], entries[-1]):
        for at in (0, 4, 5, 6, 8, 12, 16, 48, 52):
            yield start + at, start
        yield end - 1, start
    directory = entries[-1][1]
    for at in (0, 32, 36, 40, 44, 45, 46):
        yield directory + at, None
    for at in (24, 20, 16, 12, 8, 1):
        yield size - at, None


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
@pytest.mark.parametrize("level", ["packs", "chunks"])
def test_a_bit_that_flips_anywhere_in_any_pack_is_found(
    store: MemoryStore, passphrase: str | None, level: str
) -> None:
    kept = Kept(Building.fresh(store, passphrase=passphrase, pack_target=1 << 20))
    kept.build.pack_bytes = 300 << 10
    disk = content(1, 20)
    kept.add(disk)
    kept.add(changed(disk, 2))
    reopened(store)
    for key in keys(store, PACKS, METAS):
        for at, entry in places_in(store, key):
            broken = copied(store, Time())
            flip(broken, key, at, at % 8)
            done = verify(reopened(broken), level)
            assert key in {finding.key for finding in done.findings}, (key, at)
            if entry is not None:
                (finding,) = [each for each in done.findings if each.offset == entry]
                reads_tell_the_same(broken, kept, finding)
            name = pack_of(key)
            assert name in damaged_packs(broken)
            reads_are_right_or_refused(broken, kept)


def reads_are_right_or_refused(store: Store, kept: Kept) -> None:
    vault = reopened(store)
    for record, disk in kept.disks:
        try:
            assert read_back(vault, record) == disk
        except CorruptImage:
            continue


def reads_tell_the_same(store: Store, kept: Kept, finding: Finding) -> None:
    """What verification says is hurt is just what cannot be read."""
    vault = reopened(store)
    for record, disk in kept.disks:
        lost = bytearray(len(disk))
        try:
            root = vault.root(record.disks[0].root)
        except CorruptImage:
            lost = bytearray(b"\1" * len(disk))
        else:
            mark_unreadable(vault, root, lost, disk)
        hurt = bytearray(len(disk))
        for each in finding.hurts:
            if each.point.endswith(record.id):
                assert each.disk == "disk"
                assert each.length == sum(length for _, length in each.ranges)
                for offset, length in each.ranges:
                    hurt[offset : offset + length] = b"\1" * length
        assert hurt == lost


def mark_unreadable(vault: Vault, root: Root, lost: bytearray, disk: bytes) -> None:
    for number in range(len(root)):
        start = number * root.page_span
        try:
            page = vault.page(root, number)
        except CorruptImage:
            length = min(root.page_span, root.size - start)
            lost[start : start + length] = b"\1" * length
            continue
        for index, id_, place in page.places():
            offset = start + index * CHUNK
            length = min(CHUNK, root.size - offset)
            try:
                assert vault.chunk(id_, place, length) == disk[offset : offset + length]
            except CorruptImage:
                lost[offset : offset + length] = b"\1" * length


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_bit_that_flips_in_a_point_is_found(store: MemoryStore, passphrase: str | None) -> None:
    history(store, passphrase)
    reopened(store)
    key = keys(store, POINTS)[0]
    size = len(store.get(key))
    # Nobody's, where nothing is encrypted: the salt, and a few bits that zstd does not look at.
    idle = set(range(32, 64)) if passphrase is None else set()
    intact, unseen = reopened(store).point(key), 0
    for at in range(size):
        if at in idle:
            continue
        broken = copied(store, Time())
        flip(broken, key, at, at % 8)
        done = verify(reopened(broken))
        if key not in {finding.key for finding in done.findings}:
            assert passphrase is None
            assert intact == reopened(broken).point(key), at
            unseen += 1
    assert unseen <= 3
    flip(store, key, 100)
    (finding,) = verify(reopened(store)).findings
    assert [(hurt.point, hurt.disk) for hurt in finding.hurts] == [
        (key.removeprefix(POINTS).removesuffix(".pt"), "")
    ]


def test_a_bit_that_flips_in_the_index_is_found_and_hurts_nobody(store: MemoryStore) -> None:
    kept = history(store)
    key = keys(store, INDEX)[0]
    for at in range(0, len(store.get(key)), 97):
        broken = copied(store, Time())
        flip(broken, key, at)
        done = verify(reopened(broken))
        assert told(done) == [(key, None)]
        assert done.findings[0].hurts == []
        collect(reopened(broken))
        assert verify(reopened(broken)).findings == []
        kept.check(broken)


@pytest.mark.parametrize("level", ["structure", "packs"])
def test_a_missing_pack_names_the_ranges_it_hurts(store: MemoryStore, level: str) -> None:
    kept = history(store)
    key = keys(store, PACKS)[0]
    store.delete(key)
    done = verify(reopened(store), level)
    (finding,) = [each for each in done.findings if each.hurts]
    assert (finding.key, finding.text) == (key, "it is missing")
    reads_tell_the_same(store, kept, finding)


def test_structure_finds_damaged_maps_but_reads_no_chunk(store: MemoryStore) -> None:
    history(store)
    for prefix, found in ((PACKS, False), (METAS, True)):
        broken = copied(store, Time())
        key = keys(broken, prefix)[0]
        flip(broken, key, min(entries_of(broken, key))[0] + 60)
        faulty = FaultyStore(broken)
        done = verify(reopened(faulty))
        assert bool(done.findings) == found
        read = {call.key for call in faulty.log if call.method == "get"}
        assert not any(key.startswith(PACKS) for key in read)


def test_content_that_is_intact_elsewhere_hurts_nobody(store: MemoryStore) -> None:
    kept = Kept(Building.fresh(store))
    disk = content(1, 10)
    kept.add(disk)
    (key,) = keys(store, PACKS)
    at = sorted(entries_of(store, key))[2][0]
    flip(store, key, at + 60)
    first = verify(reopened(store), "chunks")
    assert [hurt.length for hurt in first.findings[0].hurts] == [CHUNK]
    assert damaged_packs(store) == {pack_of(key)}
    kept.build.places.clear()  # a writer that uses no damaged pack
    kept.add(disk)
    second = verify(reopened(store), "chunks")
    (finding,) = second.findings
    assert (finding.key, finding.offset, finding.hurts) == (key, at, [])
    assert finding.copies == [other for other in keys(store, PACKS) if other != key]
    kept.check(store)
    collect(reopened(store), grace_s=0)
    third = verify(reopened(store), "chunks")
    assert third.findings == []
    assert damaged_packs(store) == set()
    kept.check(store)


def test_budgets_go_on_where_the_last_run_stopped(store: MemoryStore) -> None:
    kept = Kept(Building.fresh(store))
    kept.build.pack_bytes = 200 << 10
    kept.add(content(1, 60))
    every = set(keys(store, PACKS, METAS))
    read: list[str] = []
    for _ in range(100):
        faulty = FaultyStore(store)
        done = verify(reopened(faulty), "packs", budget=Budget(bytes=500_000))
        assert len(keys(store, SCRUB)) == 1
        read += [
            call.key
            for call in faulty.log
            if call.method == "get" and call.key.startswith((PACKS, METAS))
        ]
        if done.completed:
            break
    assert set(read) == every
    assert len(read) <= len(every) + 8  # the last run has begun another round
    done = verify(reopened(store), "packs", budget=Budget(sample=10))
    assert done.checked == -(-len(every) // 10)
    assert done.last_round > 0
    assert verify(reopened(store), "packs", budget=Budget(seconds=0)).checked == 0


def test_a_run_that_is_killed_leaves_the_repository_as_it_was(store: MemoryStore) -> None:
    history(store)
    before = keys(store, "")
    with pytest.raises(Crashed):
        verify(reopened(FaultyStore(store, crash=Crash(40, Moment.BEFORE))), "chunks")
    assert [key for key in keys(store, "") if not key.startswith(SCRUB)] == before
    assert verify(reopened(store), "chunks").findings == []


def test_what_only_some_points_refer_to_is_verified_alone(store: MemoryStore) -> None:
    kept = history(store)
    other = kept.disks[3][0]
    (mine,) = [disk.root.place.pack for disk in other.disks]
    done = verify(
        reopened(store),
        "chunks",
        chosen=lambda record: ["disk"] if record.group == "other" else [],
    )
    assert (done.points, done.disks, done.findings) == (1, 1, [])
    assert 0 < done.checked < len(keys(store, PACKS, METAS))
    assert mine in {pack_of(key) for key in keys(store, METAS)}


def test_garbage_and_missed_points_are_noted_and_are_no_damage(store: MemoryStore) -> None:
    kept = Kept(Building.fresh(store))
    first = kept.build.point("vm", {"disk": content(1, 5)})
    kept.build.point("vm", {"disk": content(2, 5)}, previous=first.id)
    store.delete(point_key("vm", first.id))
    done = verify(reopened(store))
    assert done.findings == []
    texts = " ".join(note.text for note in done.notes)
    assert first.id in texts
    assert "nbdsrv gc" in texts


def test_without_a_key_packs_are_hashed_all_the_same(store: MemoryStore) -> None:
    kept = history(store, PASSPHRASE)
    locked = Vault(store, kept.build.vault.config, None)
    assert verify(locked, "packs", keyless=True).findings == []
    key = keys(store, PACKS)[0]
    flip(store, key, 1000)
    done = verify(locked, "packs", keyless=True)
    assert told(done) == [(key, None)]


def test_a_repository_that_cannot_be_written_is_verified(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "repository"))
    history(store)

    class Locked(FaultyStore):
        def put(self, key: str, data: object) -> None:
            raise DiskErrorOf(key)

    DiskErrorOf = _refused
    done = verify(reopened(Locked(store)), "packs")
    assert done.findings == []
    assert [note.key for note in done.notes] == ["scrub/"]


def _refused(key: str) -> DiskError:
    from nbdsrv.store.store import StoreError

    return StoreError(f"{key}: read-only", 30)


@pytest.mark.parametrize("seed", range(3))
def test_much_damage_at_once_is_told_in_full(store: MemoryStore, seed: int) -> None:
    kept = history(store)
    rng = random.Random(seed)
    for key in rng.sample(keys(store, PACKS, METAS), 5):
        size = len(store.get(key))
        flip(store, key, rng.randrange(size), rng.randrange(8))
    done = verify(reopened(store), "chunks")
    assert len({finding.key for finding in done.findings}) >= 5
    reads_are_right_or_refused(store, kept)


def test_a_bad_sector_is_damage_like_any_other(store: MemoryStore) -> None:
    kept = history(store)
    for prefix in (PACKS, METAS, POINTS):
        key = keys(store, prefix)[0]
        failing = FaultyStore(store, failures=[Failure(calls(key=key), errno.EIO)])
        done = verify(reopened(failing), "packs")
        (finding,) = [each for each in done.findings if each.hurts]
        assert finding.key == key
        assert done.unread == []
    kept.check(store)


def test_a_service_that_fails_is_no_damage(store: MemoryStore) -> None:
    history(store)
    for prefix in (METAS, POINTS):
        key = keys(store, prefix)[0]
        failing = FaultyStore(store, failures=[Failure(calls(key=key), errno.EIO)])
        failing.distant = True
        with pytest.raises(DiskError):
            verify(reopened(failing))
        if prefix == POINTS:
            with pytest.raises(DiskError):
                prune(reopened(failing), None, None, damaged=True)
            assert key in keys(store, POINTS)
    key = keys(store, PACKS)[0]
    failing = FaultyStore(store, failures=[Failure(calls("get", key=key), errno.EIO)])
    failing.distant = True
    done = verify(reopened(failing), "packs")
    assert (done.findings, len(done.unread)) == ([], 1)
    assert damaged_packs(store) == set()


def test_a_pack_that_is_cut_short_is_damage_whatever_the_store(store: MemoryStore) -> None:
    history(store)
    key = keys(store, METAS)[0]
    store.put(key, store.get(key)[:100])
    failing = FaultyStore(store)
    failing.distant = True
    done = verify(reopened(failing), "packs")
    assert {finding.key for finding in done.findings} == {key}


@pytest.mark.parametrize("distant", [False, True])
@pytest.mark.parametrize("level", ["structure", "packs"])
@pytest.mark.parametrize("which", [METAS, PACKS, INDEX, POINTS])
def test_what_may_not_be_read_is_told_and_the_rest_is_verified(
    store: MemoryStore, which: str, level: str, *, distant: bool
) -> None:
    """A file that belongs to somebody else is not damaged, and the others may be."""
    history(store)
    refused = keys(store, which)[0]
    broken = keys(store, PACKS)[-1]
    assert broken != refused
    flip(store, broken, len(store.get(broken)) - 1)
    failing = FaultyStore(store, failures=[Failure(calls(key=refused), errno.EACCES)])
    failing.distant = distant
    done = verify(reopened(failing), level)
    assert {refused in text for text in done.unread} == {True}
    assert {finding.key for finding in done.findings} == {broken}
    assert not any("gc`" in note.text for note in done.notes)
    assert damaged_packs(store) <= {pack_of(broken)}
    if which in {METAS, PACKS}:
        assert pack_of(refused) not in damaged_packs(store)


def test_what_may_not_be_read_is_not_called_garbage_nor_pruned(store: MemoryStore) -> None:
    history(store)
    first, _, third, _ = keys(store, POINTS)
    failing = FaultyStore(store, failures=[Failure(calls(key=third), errno.EACCES)])
    done = verify(reopened(failing))
    assert (done.points, done.notes, len(done.unread)) == (3, [], 1)
    store.delete(first)
    store.delete(third)
    assert [note.key for note in verify(reopened(store)).notes] == ["packs/"]
