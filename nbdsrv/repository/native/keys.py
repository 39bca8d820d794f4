"""The master key, wrapped by passphrases (docs/repository-format.md, "Keys").

::

    keys/<slot>.json   {"kdf": "argon2id", ..., "salt", "nonce", "wrapped"}

        passphrase ── Argon2id(salt) ──> key ── AES-256-GCM ──> master, 32 bytes
                                                data: nbdrepo.json as it is stored

Many passphrases open the same repository; each has a slot of its own, and changing one encrypts
nothing anew.
"""

import base64
import errno as os_errno
import os
import time

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.repository.native.layout import KEYS, new_ulid
from nbdsrv.repository.native.sealing import KEY_SIZE
from nbdsrv.store.store import ObjectMissing, Store, StoreError

__all__ = ["MAX_SLOTS", "KeySlot", "add_slot", "open_slot", "remove_slot", "slots", "unlock"]

PASSES, MEMORY_KIB, LANES = 3, 64 << 10, 4
"""A fifth of a second: what a guess costs."""
MOST_PASSES, MOST_MEMORY_KIB, MOST_LANES = 64, 1 << 20, 64
"""A slot that asks for more is not ours: whoever keeps the objects could ask for all our memory."""
MAX_SLOT = 1 << 16
MAX_SLOTS = 64


class KeySlot(msgspec.Struct, frozen=True, kw_only=True):
    """A slot as it is stored; bytes in base64.

    Attributes:
        label: whose passphrase it is; for people.
        created: seconds since 1970.
    """

    v: int = 1
    kdf: str = "argon2id"
    passes: int = PASSES
    memory_kib: int = MEMORY_KIB
    lanes: int = LANES
    salt: str
    nonce: str
    wrapped: str
    label: str = ""
    created: float = 0


def add_slot(store: Store, config: bytes, master: bytes, passphrase: str, label: str = "") -> str:
    """Let another passphrase open the repository.

    Returns:
        The slot's name.

    Raises:
        ConfigError: an empty passphrase, or there are ``MAX_SLOTS`` already.
        StoreError: it cannot be written.
    """
    if not passphrase:
        raise ConfigError("an empty passphrase protects nothing; set NBDSRV_PASSPHRASE")
    if len(slots(store)) >= MAX_SLOTS:
        raise ConfigError(f"{store.name}: has {MAX_SLOTS} key slots; remove one first")
    salt, nonce = os.urandom(16), os.urandom(12)
    slot = KeySlot(
        salt=_text(salt), nonce=_text(nonce), wrapped="", label=label, created=time.time()
    )
    wrapped = AESGCM(_derive(slot, passphrase)).encrypt(nonce, master, config)
    name = new_ulid()
    slot = msgspec.structs.replace(slot, wrapped=_text(wrapped))
    store.put_new(f"{KEYS}{name}.json", msgspec.json.encode(slot))
    return name


def unlock(store: Store, config: bytes, passphrase: str) -> bytes:
    """The master key.

    Raises:
        RepositoryError: no slot opens with this passphrase.
    """
    return open_slot(store, config, passphrase)[1]


def open_slot(store: Store, config: bytes, passphrase: str) -> tuple[str, bytes]:
    """The name of the slot that opens with this passphrase, and the master key.

    Raises:
        RepositoryError: none does.
        StoreError: none of those that could be read does.
    """
    names = []
    unread: list[StoreError] = []
    for name, slot in slots(store, unread).items():
        names.append(name)
        if slot is None:
            continue
        try:
            key = _derive(slot, passphrase)
            return name, AESGCM(key).decrypt(_bytes(slot.nonce), _bytes(slot.wrapped), config)
        except MemoryError as error:
            text = f"{store.name}: key slot {name} takes {slot.memory_kib} KiB of memory"
            raise RepositoryError(f"{text}, which there is not") from error
        except (InvalidTag, ValueError):
            continue
    if unread:
        raise unread[0]  # it may be the one
    if not names:
        raise RepositoryError(f"{store.name}: its keys are missing; restore {KEYS} from a copy")
    text = f"{store.name}: the passphrase opens none of its {len(names)} key slots"
    raise RepositoryError(f"{text}, or nbdrepo.json was changed")


def slots(store: Store, unread: list[StoreError] | None = None) -> dict[str, KeySlot | None]:
    """All slots by name; None for one that cannot be read or is none we know.

    A bad sector in one passphrase's slot locks out nobody else. What the store did not give is
    added to ``unread``.
    """
    found: dict[str, KeySlot | None] = {}
    for stored in store.list(KEYS):
        if not stored.key.endswith(".json") or len(found) == MAX_SLOTS:
            continue
        name = stored.key[len(KEYS) : -len(".json")]
        try:
            slot = msgspec.json.decode(store.get(stored.key, MAX_SLOT), type=KeySlot)
        except ObjectMissing:
            continue
        except StoreError as error:
            if error.errno != os_errno.EFBIG and unread is not None:
                unread.append(error)
            found[name] = None
            continue
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            found[name] = None
            continue
        found[name] = slot if _is_sane(slot) else None
    return found


def remove_slot(store: Store, name: str) -> None:
    """Its passphrase no longer opens the repository.

    Raises:
        RepositoryError: there is no such slot, or it is the last one.
    """
    there = slots(store)
    if name not in there:
        raise RepositoryError(f"{store.name}: no key slot {name}; `nbdsrv key ls` shows them")
    if sum(slot is not None for slot in there.values()) == 1 and there[name] is not None:
        raise RepositoryError(f"{store.name}: {name} is the only key; add another one first")
    store.delete(f"{KEYS}{name}.json")


def _is_sane(slot: KeySlot) -> bool:
    return (
        slot.v == 1
        and slot.kdf == "argon2id"
        and 0 < slot.passes <= MOST_PASSES
        and 0 < slot.lanes <= MOST_LANES
        and 8 * slot.lanes <= slot.memory_kib <= MOST_MEMORY_KIB
    )


def _derive(slot: KeySlot, passphrase: str) -> bytes:
    kdf = Argon2id(
        salt=_bytes(slot.salt),
        length=KEY_SIZE,
        iterations=slot.passes,
        lanes=slot.lanes,
        memory_cost=slot.memory_kib,
    )
    return kdf.derive(passphrase.encode("utf-8", "surrogateescape"))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
