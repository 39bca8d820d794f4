"""Key slots: which passphrase opens what, and slots that somebody else made."""

import base64
import errno
import json
import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.repository.native import keys
from nbdsrv.repository.native.keys import add_slot, open_slot, remove_slot, slots, unlock
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import StoreError

CONFIG = b'{"format":"nbdrepo"}\n'
MASTER = bytes(range(32))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def slot_of(store: MemoryStore, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(store.get(f"keys/{name}.json"))
    return found


def test_every_passphrase_opens_its_own_slot(store: MemoryStore) -> None:
    one = add_slot(store, CONFIG, MASTER, "one", "the first")
    two = add_slot(store, CONFIG, MASTER, "zwö")
    assert (one, MASTER) == open_slot(store, CONFIG, "one")
    assert (two, MASTER) == open_slot(store, CONFIG, "zwö")
    assert MASTER == unlock(store, CONFIG, "one")
    found = slots(store)
    assert {one: "the first", two: ""} == {n: s.label for n, s in found.items() if s is not None}
    with pytest.raises(RepositoryError, match="opens none of its 2 key slots"):
        unlock(store, CONFIG, "three")
    with pytest.raises(RepositoryError, match=r"nbdrepo\.json was changed"):
        unlock(store, CONFIG + b" ", "one")


def test_a_slot_is_what_the_document_says(store: MemoryStore) -> None:
    name = add_slot(store, CONFIG, MASTER, "pass")
    slot = slot_of(store, name)
    salt, nonce, wrapped = (base64.b64decode(str(slot[n])) for n in ("salt", "nonce", "wrapped"))
    assert (16, 12, 48) == (len(salt), len(nonce), len(wrapped))
    assert (1, "argon2id", 3, 65536, 4) == (
        slot["v"],
        slot["kdf"],
        slot["passes"],
        slot["memory_kib"],
        slot["lanes"],
    )
    key = Argon2id(salt=salt, length=32, iterations=3, lanes=4, memory_cost=65536).derive(b"pass")
    assert MASTER == AESGCM(key).decrypt(nonce, wrapped, CONFIG)


def test_a_passphrase_that_is_not_utf8_is_its_bytes(store: MemoryStore) -> None:
    odd = os.fsdecode(b"caf\xe9")
    add_slot(store, CONFIG, MASTER, odd)
    assert MASTER == unlock(store, CONFIG, odd)


def test_an_empty_passphrase(store: MemoryStore) -> None:
    with pytest.raises(ConfigError, match="protects nothing"):
        add_slot(store, CONFIG, MASTER, "")
    assert {} == slots(store)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"x":' + b"[" * 60_000,
        b" " * (1 << 17),
        json.dumps({"v": 2, "salt": "", "nonce": "", "wrapped": ""}).encode(),
        *(
            json.dumps({"salt": "AAAA", "nonce": "AAAA", "wrapped": "AAAA", **more}).encode()
            for more in (
                {"kdf": "md5"},
                {"memory_kib": 1 << 40},
                {"memory_kib": 8},
                {"passes": 1 << 30},
                {"passes": 0},
                {"lanes": 1 << 20},
                {"lanes": -1},
                {"salt": 7},
            )
        ),
    ],
)
def test_a_slot_that_is_not_ours_hides_no_other(store: MemoryStore, data: bytes) -> None:
    store.put("keys/00000000000000000000000000.json", data)
    assert [None] == list(slots(store).values())
    with pytest.raises(RepositoryError, match="opens none of its 1 key slots"):
        unlock(store, CONFIG, "x")


@pytest.mark.parametrize("field", ["salt", "nonce", "wrapped"])
@pytest.mark.parametrize("value", ["", "AA==", "not base64!", "A" * 60_000])
def test_a_slot_with_odd_bytes_opens_nothing(store: MemoryStore, field: str, value: str) -> None:
    fields = {"salt": "A" * 24, "nonce": "A" * 16, "wrapped": "A" * 64, field: value}
    store.put("keys/x.json", json.dumps({**fields, "passes": 1, "memory_kib": 64}).encode())
    with pytest.raises(RepositoryError, match="opens none"):
        unlock(store, CONFIG, "x")


def test_without_any_slot(store: MemoryStore) -> None:
    with pytest.raises(RepositoryError, match="its keys are missing"):
        unlock(store, CONFIG, "x")


def test_the_last_slot_stays(store: MemoryStore) -> None:
    only = add_slot(store, CONFIG, MASTER, "one")
    store.put("keys/odd.json", b"{}")
    with pytest.raises(RepositoryError, match="is the only key; add another"):
        remove_slot(store, only)
    with pytest.raises(RepositoryError, match=r"no key slot \.\./nbdrepo"):
        remove_slot(store, "../nbdrepo")
    remove_slot(store, "odd")
    other = add_slot(store, CONFIG, MASTER, "two")
    remove_slot(store, only)
    assert [other] == list(slots(store))


def test_there_are_not_more_slots_than_are_tried(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_SLOTS", 2)
    for name in ("a", "b", "c"):
        store.put(f"keys/{name}.json", b"{}")
    assert ["a", "b"] == list(slots(store))
    with pytest.raises(ConfigError, match="has 2 key slots"):
        add_slot(store, CONFIG, MASTER, "x")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_slot_that_cannot_be_read_locks_out_nobody_else(store: MemoryStore, number: int) -> None:
    one = add_slot(store, CONFIG, MASTER, "one")
    two = add_slot(store, CONFIG, MASTER, "two")
    bad = calls("get", key=f"keys/{one}.json")
    failing = FaultyStore(store, failures=[Failure(bad, number)])
    assert (two, MASTER) == open_slot(failing, CONFIG, "two")
    assert slots(failing)[one] is None
    with pytest.raises(StoreError, match=one):  # not a word of a wrong passphrase
        open_slot(failing, CONFIG, "one")
