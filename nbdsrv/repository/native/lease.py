"""Leases: who is at work in a repository (docs/repository-format.md, "Leases").

::

    writer     put lease ── list condemned/ ─────── ... refresh ... ─── commit ── delete lease
    collector       put condemned/ ── [grace] ── list leases/ ── list points/ ── delete packs

Either the writer sees the tombstone and uses nothing in it, or the collector sees the lease and
waits. All ages are told by the store's clock: of two objects' modification times the difference is
taken, never this host's time. So it is with whether a lease has lapsed: a host that was suspended,
or a VM that was paused, does not notice that its own clock stood still.
"""

import errno as os_errno
import os
import socket
import threading
from typing import Self

import msgspec

from nbdsrv.errors import RepositoryError
from nbdsrv.repository.native.layout import LEASES, new_ulid
from nbdsrv.store.store import ObjectMissing, Store, StoreError

__all__ = [
    "LAPSE_S",
    "REFRESH_S",
    "STALE_S",
    "Lease",
    "LeaseRecord",
    "forget_stale",
    "live_leases",
    "store_time",
]

REFRESH_S = 300.0
"""Seconds between two refreshes."""
LAPSE_S = 3600.0
"""Seconds without one after which its holder must not commit."""
STALE_S = 24 * 3600.0
"""Seconds without one after which a collector takes its holder for dead; between the two lies the
longest time a commit may hang."""
MAX_LEASE = 1 << 20
"""Bytes: some thousand points that a server has open."""


class LeaseRecord(msgspec.Struct, kw_only=True):
    """A lease as it is stored.

    Attributes:
        holder: ``writer`` or ``reader``.
        host: where; for people.
        pid: of the process.
        opened: when it was taken, seconds by the store's clock; 0: not known.
        points: ``group/ulid`` of what a reader has open.
    """

    holder: str
    host: str = ""
    pid: int = 0
    opened: float = 0
    points: list[str] = []


class Lease:
    """One lease, kept fresh by a thread. A context manager; blocking.

    Attributes:
        name: its ULID.
        record: as stored.
    """

    def __init__(self, store: Store, holder: str, points: list[str] | None = None) -> None:
        self.name = new_ulid()
        self.record = LeaseRecord(
            holder=holder, host=socket.gethostname(), pid=os.getpid(), points=points or []
        )
        self._store = store
        self._key = f"{LEASES}{self.name}.json"
        self._lock = threading.Lock()
        self._seen = 0.0
        self._lapsed = False
        self._stop = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._refresh_on, name="nbdsrv-lease", daemon=True)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Put it, and keep it fresh until ``release``.

        Raises:
            StoreError: it cannot be put.
        """
        try:
            self._store.put(self._key, msgspec.json.encode(self.record))
            self._seen = self.record.opened = store_time(self._store, self._key)
            self._store.put(self._key, msgspec.json.encode(self.record))
        except StoreError:
            self.release()  # or it would hold up collectors for a day
            raise
        self._thread.start()

    def take_later(self) -> None:
        """Put it as soon as the store lets it be put, and keep it fresh until ``release``.

        For readers: ``opened`` stays unknown, and whoever writes must know that he has a lease.
        """
        self._thread.start()

    def refresh(self) -> None:
        """Put it again, and note whether it has lapsed before that.

        Raises:
            StoreError: it cannot be put, or seen.
        """
        with self._lock:
            self._store.put(self._key, msgspec.json.encode(self.record))
            now = store_time(self._store, self._key)
            self._lapsed = self._lapsed or now - self._seen > LAPSE_S
            self._seen = now

    def check(self) -> None:
        """Refresh it a last time before a commit.

        Raises:
            RepositoryError: it has lapsed: a collector may have taken us for dead.
            StoreError: it cannot be refreshed.
        """
        self.refresh()
        if self._lapsed:
            whose, end = "backup", "nothing is committed, retry"
            if self.record.holder == "collector":
                whose, end = "gc", "another may be at work by now, so it ends; run it again"
            text = f"{self._store.name}: the lease of this {whose} could not be refreshed for"
            raise RepositoryError(f"{text} {LAPSE_S / 60:.0f} minutes; {end}")

    def release(self) -> None:
        """Delete it. If that fails it goes stale in a day."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._store.delete(self._key)
        except StoreError:
            pass

    def _refresh_on(self) -> None:
        while not self._stop.wait(REFRESH_S):
            try:
                self.refresh()
            except StoreError:
                continue  # the next one that works tells whether it has been too long


def store_time(store: Store, key: str) -> float:
    """When the object was put, by the store's clock.

    Raises:
        ObjectMissing: a listing does not show it.
    """
    prefix = key[: key.rindex("/") + 1]
    for stored in store.list(prefix):
        if stored.key == key:
            return stored.modified
    raise ObjectMissing(f"{store.name}: {key} was put and is not listed", 2)


def live_leases(store: Store, now: float) -> list[LeaseRecord]:
    """Those that are not stale; ``now`` by the store's clock.

    One that cannot be read counts as an old writer's: it holds everything up until it is stale.
    """
    found = []
    for stored in store.list(LEASES):
        if now - stored.modified > STALE_S:
            continue
        try:
            data = store.get(stored.key, MAX_LEASE)
            found.append(msgspec.json.decode(data, type=LeaseRecord))
        except ObjectMissing:
            continue
        except StoreError as error:
            if error.errno != os_errno.EFBIG:
                raise
            found.append(LeaseRecord(holder="writer"))
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            found.append(LeaseRecord(holder="writer"))
    return found


def forget_stale(store: Store, now: float) -> None:
    """Delete those that are stale, which nobody looks at; ``now`` by the store's clock."""
    for stored in store.list(LEASES):
        if now - stored.modified > STALE_S:
            store.delete(stored.key)
