"""Tombstones: packs that nobody referred to, and that will be deleted unless somebody comes to.

::

    condemned/<ulid>.json   {"v": 1, "packs": [hex, ...], "metas": [hex, ...]}

    condemn ── grace ── leases older than this are gone ── mark again ── delete packs, then this

A tombstone is put once and deleted once. While it stands nothing new may lead into its packs: a
writer lists ``condemned/`` when it starts. What is older than that writer's lease waits for it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from nbdsrv.repository.native.hashing import ID_SIZE
from nbdsrv.repository.native.layout import CONDEMNED, new_ulid
from nbdsrv.store.store import ObjectMissing, Store

__all__ = ["Standing", "Tombstone", "condemn", "condemned_packs", "standing"]

MAX_TOMBSTONE = 64 << 20
MAX_NAMES = 100_000
"""Packs of one tombstone that is written: 7 MB, three TiB of packs."""


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """A tombstone as it is stored; names of packs and of meta packs, in hex."""

    v: int = 1
    packs: list[str] = []
    metas: list[str] = []


class Standing(NamedTuple):
    """A tombstone in the store.

    Attributes:
        key: of the object.
        modified: when it was put, by the store's clock.
        packs: names of its packs of chunks.
        metas: names of its packs of pages and roots.
        readable: if not, it condemns nothing.
    """

    key: str
    modified: float
    packs: frozenset[bytes]
    metas: frozenset[bytes]
    readable: bool = True


def standing(store: Store) -> list[Standing]:
    """All tombstones, the oldest first. Blocking.

    Raises:
        StoreError: they cannot be listed or read.
    """
    found = []
    for stored in store.list(CONDEMNED):
        if not stored.key.endswith(".json"):
            continue
        try:
            data = store.get(stored.key, MAX_TOMBSTONE)
            tombstone = msgspec.json.decode(data, type=Tombstone)
            packs, metas = _names(tombstone.packs), _names(tombstone.metas)
        except ObjectMissing:
            continue
        except (msgspec.MsgspecError, ValueError, RecursionError):
            nothing: frozenset[bytes] = frozenset()
            found.append(Standing(stored.key, stored.modified, nothing, nothing, readable=False))
            continue
        found.append(Standing(stored.key, stored.modified, packs, metas))
    return found


def condemned_packs(store: Store) -> set[bytes]:
    """Names of all packs and meta packs that are condemned now. Blocking.

    Raises:
        StoreError: the tombstones cannot be listed or read.
    """
    found: set[bytes] = set()
    for tombstone in standing(store):
        found |= tombstone.packs
        found |= tombstone.metas
    return found


def condemn(store: Store, packs: Iterable[bytes], metas: Iterable[bytes]) -> list[str]:
    """Put tombstones for these; their keys. Nothing is put for nothing. Blocking.

    Raises:
        StoreError: not all could be put. Those that were stand.
    """
    rows = [(name, False) for name in sorted(packs)] + [(name, True) for name in sorted(metas)]
    keys = []
    for at in range(0, len(rows), MAX_NAMES):
        part = rows[at : at + MAX_NAMES]
        tombstone = Tombstone(
            packs=[name.hex() for name, meta in part if not meta],
            metas=[name.hex() for name, meta in part if meta],
        )
        key = f"{CONDEMNED}{new_ulid()}.json"
        store.put_new(key, msgspec.json.encode(tombstone))
        keys.append(key)
    return keys


def _names(texts: list[str]) -> frozenset[bytes]:
    names = frozenset(bytes.fromhex(text) for text in texts)
    if any(len(name) != ID_SIZE for name in names):
        raise ValueError("no name of a pack")
    return names
