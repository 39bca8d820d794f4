"""What verification remembers: how far it came, and which packs it found damaged.

::

    scrub/<ulid>.json   {"v": 1, "rounds": {"packs":  {"cursor": hex, "began", "completed"},
                                            "chunks": {...}},
                         "damaged": {hex: {"key", "found", "text"}}}

    packs by name    00.. ─── 3f.. ─── 7c.. ─── ff..        names are hashes: any order is as good
    a run goes on          cursor ──────> ... and round again

One cursor is enough for *least recently checked first*: what is behind it was checked before what
is before it, however many packs there are. A run puts an object of its own, again and again while
it works, and deletes those it found: there is one, or one for each run at work.

A writer takes no chunk of a damaged pack for stored (``damaged_packs``), so the next backup that
reads such a chunk from its source stores it anew, and the index leads all old points to it.
"""

import time

import msgspec

from nbdsrv.repository.native.damage import damage_in
from nbdsrv.repository.native.hashing import ID_SIZE
from nbdsrv.repository.native.layout import SCRUB, new_ulid
from nbdsrv.store.store import ObjectMissing, Store, StoreError

__all__ = ["DamagedPack", "Round", "ScrubState", "Scrubbing", "damaged_packs"]

MAX_STATE = 32 << 20
MAX_STATES = 64
"""Objects that are read at most, the newest: runs that were killed leave one each."""
MAX_DAMAGED = 100_000
"""Damaged packs that are remembered; with more, nobody mends a repository."""
MAX_TEXT = 300


class Round(msgspec.Struct, kw_only=True):
    """How far the checking of all packs has come.

    Attributes:
        cursor: name of the pack checked last, hex; "" where a round begins.
        began: when this round did, seconds since 1970 by the clock of who checks.
        completed: when the one before it was, 0: never.
    """

    cursor: str = ""
    began: float = 0
    completed: float = 0


class DamagedPack(msgspec.Struct, frozen=True, kw_only=True):
    """A pack that is not what it was.

    Attributes:
        key: of the object.
        found: when, seconds since 1970.
        text: what is wrong with it; for people.
    """

    key: str
    found: float = 0
    text: str = ""


class ScrubState(msgspec.Struct, kw_only=True):
    """As it is stored; ``rounds`` by level, ``damaged`` by the pack's name in hex."""

    v: int = 1
    rounds: dict[str, Round] = {}
    damaged: dict[str, DamagedPack] = {}


def damaged_packs(store: Store) -> set[bytes]:
    """Names of the packs and meta packs that verification has found damaged. Blocking.

    One listing, and as a rule one small object. For writers: nothing new may lead into these.

    Raises:
        StoreError: the store does not answer.
    """
    found: set[bytes] = set()
    for state in _states(store, _keys(store)):
        found.update(bytes.fromhex(name) for name in state.damaged)
    return found


class Scrubbing:
    """The state of one run of verification. Blocking, not thread-safe.

    Attributes:
        state: to be changed by the run, then saved.
    """

    def __init__(self, store: Store) -> None:
        """Read what earlier runs left.

        Raises:
            StoreError: the store does not answer.
        """
        self._store = store
        self._key = f"{SCRUB}{new_ulid()}.json"
        self._earlier = _keys(store)
        self.state = ScrubState()
        for state in _states(store, self._earlier):  # the newest last, so that its word counts
            self.state.rounds.update(state.rounds)
            self.state.damaged.update(state.damaged)

    def round(self, level: str) -> Round:
        """How far the checking of that level has come."""
        return self.state.rounds.setdefault(level, Round(began=time.time()))

    def damaged(self, name: bytes, key: str, text: str) -> None:
        """A pack is damaged."""
        if len(self.state.damaged) < MAX_DAMAGED:
            row = DamagedPack(key=key, found=time.time(), text=text[:MAX_TEXT])
            self.state.damaged.setdefault(name.hex(), row)

    def sound(self, name: bytes) -> None:
        """A pack is as it should be, or is no more."""
        self.state.damaged.pop(name.hex(), None)

    def save(self) -> None:
        """Put the state, and delete what it replaces.

        Raises:
            StoreError: it cannot be put.
        """
        self._store.put(self._key, msgspec.json.encode(self.state))
        while self._earlier:
            self._store.delete(self._earlier[-1])
            self._earlier.pop()


def _keys(store: Store) -> list[str]:
    return [stored.key for stored in store.list(SCRUB) if stored.key.endswith(".json")]


def _states(store: Store, keys: list[str]) -> list[ScrubState]:
    """Those that can be read, the oldest first."""
    found = []
    for key in keys[-MAX_STATES:]:
        try:
            state = msgspec.json.decode(store.get(key, MAX_STATE), type=ScrubState)
        except (ObjectMissing, msgspec.MsgspecError, UnicodeError, RecursionError):
            continue  # advice, which the next run gives anew
        except StoreError as error:
            damage_in(store, error)  # a bad sector is no more than that
            continue
        state.damaged = {name: row for name, row in state.damaged.items() if _is_name(name)}
        found.append(state)
    return found


def _is_name(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == ID_SIZE and len(text) == ID_SIZE * 2
    except ValueError:
        return False
