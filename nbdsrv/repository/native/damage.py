"""Damage: what was found broken, where, and whom it hurts.

::

    Finding   packs/0f/0fa9...pk at 81920: it was changed      broken content, one or many bytes
        Hurt      vm1/01HX... sda: 3 ranges, 786432 bytes      read as an error until it is mended
        copies    packs/77/77c1...pk                           the same content, intact elsewhere

    Note      not damage: garbage, a point that is missed, an index that must be made anew
"""

import errno as os_errno
from dataclasses import dataclass, field

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.store.store import ObjectMissing, Store, StoreError

__all__ = ["MAX_RANGES", "Finding", "Hurt", "Note", "damage_of", "is_outage"]

MAX_RANGES = 64
"""Of one disk that are told; the bytes of all are counted."""


@dataclass(slots=True)
class Hurt:
    """What damage does to one disk of one point.

    Attributes:
        point: ``group/ulid``.
        disk: its name; "" for the whole point.
        ranges: (offset, length) of the disk that cannot be read, ascending, merged; the first of
            them.
        length: bytes of all.
    """

    point: str
    disk: str
    ranges: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def add(self, offset: int, length: int) -> None:
        """One more range; they come in ascending order."""
        self.length += length
        if self.ranges:
            last, size = self.ranges[-1]
            if last + size == offset:
                self.ranges[-1] = last, size + length
                return
        if len(self.ranges) < MAX_RANGES:
            self.ranges.append((offset, length))


@dataclass(slots=True)
class Finding:
    """Something is broken.

    Attributes:
        key: of the object.
        offset: in it; None: all of it, or where is not known.
        text: what is wrong.
        hurts: which disks cannot be read because of it.
        copies: keys of other packs that hold the same content.
        advice: what to do.
    """

    key: str
    offset: int | None
    text: str
    hurts: list[Hurt] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that is no damage."""

    key: str
    text: str


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
