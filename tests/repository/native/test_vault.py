"""A repository in its store: made, opened, listed, and read around its damages."""

import pytest

from nbdsrv.errors import ConfigError, CorruptImage, RepositoryError
from nbdsrv.repository.native.entry import Kind
from nbdsrv.repository.native.hashing import HASHES
from nbdsrv.repository.native.index import encode_segment
from nbdsrv.repository.native.layout import index_key, new_ulid, pack_key, point_key
from nbdsrv.repository.native.pack import Pack, PackKind
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import StoreError
from tests.repository.native.made import PASSPHRASE, add_point, config, content, made, restored

DISK = content(1, 0, 2, 1, *([0] * 20), 3, tail=777)


def nobody() -> str:
    raise AssertionError("a passphrase was asked for")


@pytest.mark.parametrize("hash_", HASHES)
@pytest.mark.parametrize("encrypted", [False, True])
def test_what_was_made_is_opened(hash_: str, encrypted: bool) -> None:
    store = MemoryStore()
    record = add_point(made(store, encrypted=encrypted, hash_=hash_), "vm", {"sda": DISK})
    vault = Vault.open(store, (lambda: PASSPHRASE) if encrypted else nobody)
    assert config(encrypted=encrypted, hash_=hash_).hash == vault.config.hash
    assert ([record], []) == vault.points()
    assert DISK == restored(vault, record, "sda")
    assert ["vm"] == vault.groups()


def test_no_passphrase_and_a_wrong_one() -> None:
    store = MemoryStore()
    made(store, encrypted=True)

    def none() -> str:
        raise ConfigError("set NBDSRV_PASSPHRASE")

    with pytest.raises(ConfigError):
        Vault.open(store, none)
    with pytest.raises(RepositoryError, match="opens none"):
        Vault.open(store, lambda: "wrong")


def test_there_is_no_repository_or_there_is_one() -> None:
    store = MemoryStore()
    with pytest.raises(RepositoryError, match="`nbdsrv init` makes one"):
        Vault.open(store, nobody)
    made(store)
    with pytest.raises(RepositoryError, match="there is a repository already"):
        made(store, encrypted=True)
    assert ["nbdrepo.json"] == [stored.key for stored in store.list("")]


def test_who_comes_second_leaves_no_key_behind() -> None:
    store = MemoryStore()

    def meanwhile() -> str:
        made(store)
        return "second"

    with pytest.raises(RepositoryError, match="somebody else"):
        Vault.create(store, config(encrypted=True), meanwhile)
    assert [] == list(store.list("keys/"))
    Vault.open(store, nobody)


def test_a_configuration_that_was_exchanged_for_a_plain_one() -> None:
    store = MemoryStore()
    made(store, encrypted=True)
    store.put("nbdrepo.json", config().encode())
    with pytest.raises(RepositoryError, match="says it is not encrypted"):
        Vault.open(store, nobody)
    store.delete("nbdrepo.json")
    with pytest.raises(RepositoryError, match="left of another repository"):
        made(store)


def test_points_by_group_and_time_and_damaged_ones_apart() -> None:
    store = MemoryStore()
    vault = made(store)
    first = add_point(vault, "b", {"sda": DISK})
    second = add_point(vault, "b", {"sda": DISK})
    other = add_point(vault, "a/b", {"sda": DISK})
    assert ([other, first, second], []) == vault.points()
    assert ([first, second], []) == vault.points("b")
    key = point_key("b", first.id)
    data = store.get(key)
    store.put(f"points/b/{first.id}-copy.pt", data)
    store.put("points/b/README", b"x")
    for damaged in (data[:-1], b"", data[:70] + b"x" + data[71:], b" " * (20 << 20)):
        store.put(key, damaged)
        found, errors = vault.points("b")
        assert [second] == found
        assert [True] == [key in str(error) for error in errors]


def test_a_bad_sector_in_a_point_hides_no_other() -> None:
    store = MemoryStore()
    vault = made(store)
    first, second = (add_point(vault, "vm", {"sda": DISK}) for _ in range(2))
    bad = calls("get", key=point_key("vm", first.id))
    vault = Vault.open(FaultyStore(store, failures=[Failure(bad, 5, None)]), nobody)
    found, errors = vault.points()
    assert ([second], 1) == (found, len(errors))


def test_no_index_is_needed_to_read() -> None:
    store = MemoryStore()
    vault = made(store)
    record = add_point(vault, "vm", {"sda": DISK})
    for stored in list(store.list("index/")):
        store.delete(stored.key)
    assert DISK == restored(Vault.open(store, nobody), record, "sda")


@pytest.mark.parametrize("encrypted", [False, True])
def test_packs_list_what_the_index_knows(encrypted: bool) -> None:
    vault = made(encrypted=encrypted)
    add_point(vault, "vm", {"sda": DISK})
    index = sorted(vault.index())
    listed = [
        (row.id, row.place(bytes.fromhex(stored.key[-67:-3])), row.kind)
        for stored in vault.pack_objects()
        for row in vault.directory(stored)
    ]
    assert index == sorted(listed)


def test_a_pack_without_its_end() -> None:
    vault = made()
    add_point(vault, "vm", {"sda": DISK})
    stored = next(vault.pack_objects())
    for data in (b"", vault.store.get(stored.key)[:-1], bytes(100)):
        vault.store.put(stored.key, data)
        short = next(vault.pack_objects())
        assert len(data) == short.size
        with pytest.raises(CorruptImage, match=r"packs/.*\.pk"):
            vault.directory(short)
    with pytest.raises(CorruptImage):
        vault.directory(stored)  # it has become shorter than it was listed


def test_a_damaged_segment_is_left_out() -> None:
    store = MemoryStore()
    vault = made(store)
    add_point(vault, "vm", {"sda": DISK})
    whole = sorted(vault.index())
    store.put("index/README", b"x")
    store.put(index_key(new_ulid()), b"x")
    assert whole == sorted(vault.index())
    for stored in list(store.list("index/")):
        store.put(stored.key, b"NBDINDX1" + bytes(3000))
    assert [] == list(vault.index())


def repacked(vault: Vault) -> None:
    """All chunks in a new pack, and the old ones gone."""
    pack = Pack(PackKind.CHUNKS, vault.repository, vault.sealing, vault.hashing)
    old = set()
    for id_, place, kind in list(vault.index()):
        if kind == Kind.CHUNK:
            data = bytes(vault.entries.read(Kind.CHUNK, id_, place))
            pack.add(Kind.CHUNK, 0, len(data), id_, data)  # type: ignore[arg-type]
            old.add(place.pack)
    data = pack.finish()
    vault.store.put_new(pack_key(pack.name), data)
    rows = [(row.id, row.place(pack.name), row.kind) for row in pack.listed]
    segment = encode_segment(rows, vault.repository, vault.hashing)
    vault.store.put_new(index_key(new_ulid()), segment)
    for name in old:
        vault.store.delete(pack_key(name))


def test_an_open_vault_follows_packs_that_move_and_move_again() -> None:
    """At once, each time: `gc --grace 0s` moves things twice in a second."""
    store = MemoryStore()
    record = add_point(made(store), "vm", {"sda": DISK})
    vault = Vault.open(store, nobody)
    for _ in range(3):
        repacked(Vault.open(store, nobody))
        assert DISK == restored(vault, record, "sda")
    for stored in list(store.list("packs/")):
        store.delete(stored.key)
    with pytest.raises(CorruptImage, match="is missing"):
        restored(vault, record, "sda")


@pytest.mark.parametrize("prefix", ["packs/", "metas/"])
def test_any_damage_is_an_error_and_never_other_bytes(prefix: str) -> None:
    store = MemoryStore()
    record = add_point(made(store), "vm", {"sda": DISK})
    for stored in list(store.list(prefix)):
        whole, damaged_at = store.get(stored.key), 0
        for at in range(0, len(whole), max(1, len(whole) // 150)):
            damaged = bytearray(whole)
            damaged[at] ^= 0x10
            store.put(stored.key, damaged)
            try:
                assert DISK == restored(Vault.open(store, nobody), record, "sda")
            except CorruptImage:
                damaged_at += 1
        assert damaged_at
        store.put(stored.key, whole)


@pytest.mark.parametrize("gone", [True, False])
def test_what_may_lie_elsewhere_is_not_called_lost_while_the_index_cannot_be_listed(
    gone: bool,
) -> None:
    store = MemoryStore()
    record = add_point(made(store), "vm", {"sda": DISK})
    repacked(Vault.open(store, nobody))
    if not gone:
        for stored in list(store.list("metas/")):
            store.put(stored.key, store.get(stored.key)[:100])
    faulty = FaultyStore(store, failures=[Failure(calls("list", key="index/"), 110, None)])
    with pytest.raises(StoreError) as caught:
        restored(Vault.open(faulty, nobody), record, "sda")
    assert 110 == caught.value.errno


def test_a_segment_that_an_outage_hid_is_read_again() -> None:
    """A service that answers 503 for a moment must not cost a server content until its restart."""
    store = MemoryStore()
    record = add_point(made(store), "vm", {"sda": DISK})
    repacked(Vault.open(store, nobody))
    newest = list(store.list("index/"))[-1].key
    faulty = FaultyStore(store, failures=[Failure(calls("get", key=newest), 5, times=1)])
    faulty.distant = True
    vault = Vault.open(faulty, nobody)
    with pytest.raises(StoreError, match="index/"):
        restored(vault, record, "sda")
    assert DISK == restored(vault, record, "sda")
