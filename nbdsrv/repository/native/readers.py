"""The lease of who reads: one for all points that a process has open.

::

    open_disk ── enter("vm1/01HX...") ──> leases/<ulid>.json {"holder": "reader", "points": [..]}
    close     ── leave("vm1/01HX...")

``prune`` spares what it names. It is a courtesy, not a condition: a repository on a read-only
mount, or one whose credentials may only read, is read without. Where the store fails otherwise it
is tried again and again: a server serves for weeks, and an outage is over in minutes.
"""

import errno as os_errno
import logging
import threading
from collections import Counter

from nbdsrv.repository.native.lease import Lease
from nbdsrv.store.store import Store, StoreError

__all__ = ["Readers"]

log = logging.getLogger(__name__)

_REFUSED = frozenset({os_errno.EROFS, os_errno.EACCES, os_errno.EPERM})
"""Who may not write today may not tomorrow."""


class Readers:
    """What one process reads of one repository. Thread-safe, blocking; never fails."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._lease: Lease | None = None
        self._refused = False

    def enter(self, point: str) -> None:
        """``group/ulid`` is being read."""
        with self._lock:
            self._open[point] += 1
            if self._open[point] == 1:
                self._tell()

    def leave(self, point: str) -> None:
        """Once for each ``enter``."""
        with self._lock:
            self._open[point] -= 1
            if not self._open[point]:
                del self._open[point]
                self._tell()

    def _tell(self) -> None:
        points = sorted(self._open)
        if self._lease is None:
            if points and not self._refused:
                self._take(points)
            return
        if not points:
            lease, self._lease = self._lease, None
            lease.release()
            return
        self._lease.record.points = points
        try:
            self._lease.refresh()
        except StoreError as error:
            log.warning("lease.stale reason=%s", error)

    def _take(self, points: list[str]) -> None:
        lease = Lease(self._store, "reader", points)
        try:
            lease.take()
        except StoreError as error:
            if error.errno in _REFUSED:
                self._refused = True
                log.info("lease.none reason=%s", error)
                return
            log.warning("lease.late reason=%s", error)
            lease = Lease(self._store, "reader", points)
            lease.take_later()
        self._lease = lease
