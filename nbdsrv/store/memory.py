"""A store in memory, for tests that need thousands of fresh ones.

The same contract as a directory, without durability. Its clock is the caller's, so that what
depends on the age of objects (leases, condemned packs) can be tested without waiting.
"""

import errno as os_errno
import threading
import time
from collections.abc import Callable, Iterator

from nbdsrv.store.keys import check_key, check_prefix
from nbdsrv.store.store import MAX_OBJECT, Data, ObjectMissing, Store, Stored, StoreError

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Objects in a dict.

    Attributes:
        clock: seconds since 1970, asked at every put; may be replaced at any time.
    """

    def __init__(self, clock: Callable[[], float] = time.time, *, name: str = "memory") -> None:
        self.name = name
        self.clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, float]] = {}

    def put_new(self, key: str, data: Data) -> bool:
        check_key(self.name, key)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = (bytes(data), self.clock())
            return True

    def put(self, key: str, data: Data) -> None:
        check_key(self.name, key)
        with self._lock:
            self._objects[key] = (bytes(data), self.clock())

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        data = self._find(key)
        if len(data) > limit:
            raise StoreError(
                f"{self.name}/{key}: {len(data)} bytes, more than {limit}", os_errno.EFBIG
            )
        return data

    def get_range(self, key: str, offset: int, length: int) -> Data:
        data = self._find(key)
        if offset < 0 or length < 1 or offset + length > len(data):
            raise StoreError(
                f"{self.name}/{key}: {length} bytes at {offset}, but it has {len(data)}"
            )
        return data[offset : offset + length]

    def list(self, prefix: str) -> Iterator[Stored]:
        check_prefix(self.name, prefix)
        with self._lock:
            found = [
                Stored(key, len(data), modified)
                for key, (data, modified) in self._objects.items()
                if key.startswith(prefix)
            ]
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        check_key(self.name, key)
        with self._lock:
            self._objects.pop(key, None)

    def _find(self, key: str) -> bytes:
        check_key(self.name, key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectMissing(f"{self.name}/{key}: no such object", os_errno.ENOENT)
        return found[0]
