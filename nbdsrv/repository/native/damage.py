"""Is an object broken, or could it just not be read?"""

import errno as os_errno

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.damage import MAX_RANGES, Finding, Hurt, Note
from nbdsrv.store.store import ObjectMissing, Store, StoreError

__all__ = [
    "MAX_RANGES",
    "Finding",
    "Hurt",
    "Note",
    "damage_in",
    "damage_of",
    "is_denied",
    "is_outage",
]


def damage_of(error: DiskError) -> CorruptImage:
    """The error, if it says that an object is broken; a bad sector is as good as a wrong bit.

    Raises:
        DiskError: it says that the store could not be asked.
    """
    if isinstance(error, CorruptImage):
        return error
    if error.errno in {os_errno.EIO, os_errno.EFBIG}:
        return CorruptImage(f"corrupt repository: {error}")
    raise error


def is_outage(error: DiskError, store: Store) -> bool:
    """May it be the service that failed, and not the object that is broken?

    A service that answers 503 must not have its objects taken for damaged, and deleted.
    """
    cause = error.__cause__ if isinstance(error, CorruptImage) else error
    return (
        store.distant
        and isinstance(cause, StoreError)
        and not isinstance(cause, ObjectMissing)
        and cause.errno != os_errno.EFBIG
    )


def is_denied(error: DiskError) -> bool:
    """Is it only that we may not read this object? Others may be read, and it may be sound."""
    return isinstance(error, StoreError) and error.errno in {os_errno.EACCES, os_errno.EPERM}


def damage_in(store: Store, error: DiskError) -> CorruptImage:
    """``damage_of`` for what was read from ``store``: an outage is none.

    Raises:
        DiskError: it says that the store could not be asked, or may say so.
    """
    if is_outage(error, store):
        raise error
    return damage_of(error)
