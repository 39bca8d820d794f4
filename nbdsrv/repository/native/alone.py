"""One collector at a time: told by leases, which also say when one has died. Blocking.

::

    put our lease ── list leases/ ── another collector's, alive? ── give up
                                  └─ anybody's, stale for long?  ── tidy up

Two that begin at the same moment see each other and both give up; that neither sees the other
cannot be, for each lists after it has put.
"""

import os
import socket

import msgspec

from nbdsrv.errors import RepositoryError
from nbdsrv.repository.native.layout import LEASES
from nbdsrv.repository.native.lease import LAPSE_S, MAX_LEASE, STALE_S, LeaseRecord
from nbdsrv.store.store import ObjectMissing, Store

__all__ = ["be_alone"]

DEAD_S = 2 * LAPSE_S
"""Seconds without a refresh after which another collector is dead: it stops itself at half."""
FORGOTTEN_S = STALE_S + LAPSE_S
"""Seconds after which a lease is deleted; its holder could commit nothing any more."""


def be_alone(store: Store, own: str, now: float) -> None:
    """Make sure that no other collector is at work.

    Args:
        store: of the repository.
        own: key of our lease, which is there.
        now: by the store's clock.

    Raises:
        RepositoryError: there is one.
    """
    for stored in store.list(LEASES):
        age = now - stored.modified
        if stored.key == own:
            continue
        if age > FORGOTTEN_S:
            store.delete(stored.key)
            continue
        record = _lease_at(store, stored.key)
        if record is None or record.holder != "collector" or age > DEAD_S or _is_dead(record):
            continue
        raise RepositoryError(
            f"{store.name}: another collector is at work on {record.host or 'some host'}"
            f" (process {record.pid}); if it is not, delete {stored.key}"
        )


def _lease_at(store: Store, key: str) -> LeaseRecord | None:
    try:
        return msgspec.json.decode(store.get(key, MAX_LEASE), type=LeaseRecord)
    except (ObjectMissing, msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def _is_dead(lease: LeaseRecord) -> bool:
    """A process of this host that is no more."""
    if lease.host != socket.gethostname() or lease.pid <= 0:
        return False
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
