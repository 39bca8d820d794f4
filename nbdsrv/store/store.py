"""The object store: six calls, and nothing a directory or any S3-compatible service lacks.

::

    put_new(key, data)      create, durable when it returns; False if the key is there already
    put(key, data)          create or replace, atomically; only for what is meant to change
    get(key) get_range(key, offset, length)
    list(prefix)            keys with size and the store's own modification time
    delete(key)

No rename, no append, no compare-and-swap, no ordering by time, no lock. Who needs an order makes
it: an object that refers to others is put after them.

Keys are relative paths of ``[A-Za-z0-9._%-]`` in components divided by ``/``; no component begins
with a dot. A store may hold other things of its own; ``list`` does not show them.
"""

import errno as os_errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from nbdsrv.errors import DiskError

__all__ = ["MAX_OBJECT", "Data", "ObjectMissing", "Store", "StoreError", "Stored", "naming"]

MAX_OBJECT = 1 << 30
"""Bytes of an object that is read as a whole, at most, unless the caller says less."""

Data = bytes | bytearray | memoryview


class StoreError(DiskError):
    """A call failed. Its text names the store, the key and what to do; ``errno`` says why.

    ENOSPC, EROFS, EACCES, ETIMEDOUT, EIO ...; what may help to repeat has been repeated.
    """


class ObjectMissing(StoreError):
    """There is no object of that key. ``errno`` is ENOENT."""


class Stored(NamedTuple):
    """One row of a listing.

    Attributes:
        key: of the object.
        size: bytes.
        modified: seconds since 1970 by the store's clock, not this host's.
    """

    key: str
    size: int
    modified: float


@contextmanager
def naming(path: str) -> Iterator[None]:
    """What the operating system refuses, as our own error with the path in it."""
    try:
        yield
    except OSError as error:
        number = error.errno or os_errno.EIO
        raise StoreError(f"{path}: {os.strerror(number)}", number) from error


class Store(ABC):
    """Objects by key.

    Concurrency: thread-safe; all methods block, so the event loop calls them in threads.

    Errors: ``StoreError``. After one, a ``put`` may or may not have happened; it has never
    happened in part: an object is whole or not there.

    Attributes:
        name: for messages: a directory, or ``s3://bucket/prefix``.
        distant: does a call cost a network round trip? Then few large ones are better.
    """

    name: str
    distant: bool = False

    @abstractmethod
    def put_new(self, key: str, data: Data) -> bool:
        """Create an object; durable and visible at once when this returns.

        Returns:
            False if there is one of that name already: nothing is changed then. After a retried
            request the one that is there may be this very one.
        """

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Create or replace an object; readers see the old one or the new one."""

    @abstractmethod
    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        """The whole object.

        Raises:
            ObjectMissing: there is none.
            StoreError: EFBIG if it is longer than ``limit``; before it is read.
        """

    @abstractmethod
    def get_range(self, key: str, offset: int, length: int) -> Data:
        """Exactly these bytes of the object; ``length`` is at least 1.

        Raises:
            ObjectMissing: there is none.
            StoreError: EIO if the object ends before that.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Stored]:
        """The objects whose keys begin with ``prefix``, which is "" or ends with ``/``; by key.

        What is put or deleted meanwhile may be among them or not.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """The object is gone when this returns; it need not have been there."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Data]:
        """Several (offset, length) of one object; a distant store asks for neighbours at once."""
        return [self.get_range(key, offset, length) for offset, length in ranges]

    def doubt(self, key: str) -> None:
        """What was read of the object was not what it must be: who keeps some of it forgets it,
        so that whoever reads it again is given what lies there. Never fails.
        """
        del key

    def open_file(self, key: str) -> int | None:
        """A descriptor of the object, if it is a file here that is never changed; to be closed.

        Raises:
            ObjectMissing: there is none.
        """
        del key
        return None

    def close(self) -> None:
        """Give descriptors and connections back; idempotent."""
