"""Blocks that are stored encoded: decoded in threads, once, and kept for a while.

::

    Disk A ── Blocks ──┐                     ┌ peek(key)        the loop: what is there, now
    Disk B ── Blocks ──┼── BlockCache        │ decode_now(key)  the loop: what needs no disk
    Disk C ── Blocks ──┘   one budget        │ get(key)         threads: decode what is not there
                                             ├ stored(key)      where its packed bytes lie
                                             └ forget(key)      its content has changed

Whoever asks first decodes; who asks for the same block meanwhile waits for that (*single flight*).
A block that is read as a whole is not kept: whoever reads so reads on and does not come back.

Eviction is CLOCK: a hit only sets a flag, so that ``peek`` needs no lock and never waits.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import overload

from nbdsrv.disk.residency import Stored

__all__ = ["DEFAULT_CACHE", "BlockCache", "Blocks"]

DEFAULT_CACHE = 192 << 20
"""Decoded bytes kept for all Disks of a process together: three thousand clusters of 64 KiB."""


class _Entry:
    __slots__ = ("data", "key", "owner", "used")

    def __init__(self, owner: "Blocks", key: int, data: bytes) -> None:
        self.owner = owner
        self.key = key
        self.data = data
        self.used = False


class _Flight:
    """A block that is being decoded. A concurrent.futures.Future makes a lock and a condition for
    those who wait, and hardly ever does anybody.
    """

    __slots__ = ("_data", "_error", "_landed")

    def __init__(self) -> None:
        self._data = b""
        self._error: BaseException | None = None
        self._landed: threading.Event | None = None

    def await_with(self) -> threading.Event:
        """What to wait for. Call with the cache's lock, while the block is being decoded."""
        if self._landed is None:
            self._landed = threading.Event()
        return self._landed

    def land(self, data: bytes, error: BaseException | None = None) -> None:
        """It has been decoded, or cannot be. Call when nobody can find it any more."""
        self._data, self._error = data, error
        if self._landed is not None:
            self._landed.set()

    def result(self) -> bytes:
        """The block, after the wait; raises what decoding it raised."""
        if self._error is not None:
            raise self._error
        return self._data


class BlockCache:
    """The budget, and the hand of the clock. Thread-safe.

    Attributes:
        hits: blocks asked for and found. Not locked: one in a million may be missed.
        misses: blocks decoded.
    """

    def __init__(self, limit: int = DEFAULT_CACHE) -> None:
        self.limit = limit
        self.hits = 0
        self.misses = 0
        self.lock = threading.Lock()
        self._clock: deque[_Entry] = deque()
        self._size = 0

    @property
    def size(self) -> int:
        """Decoded bytes held now."""
        return self._size

    def keep(self, entry: _Entry) -> None:
        """Remember; older blocks nobody has asked for again make room. Call with the lock."""
        self._clock.append(entry)
        self._size += len(entry.data)
        while self._size > self.limit:
            oldest = self._clock.popleft()
            if oldest.used and oldest is not entry:
                oldest.used = False
                self._clock.append(oldest)
                continue
            self._size -= len(oldest.data)
            if oldest.owner.held.get(oldest.key) is oldest:
                del oldest.owner.held[oldest.key]

    def drop(self, entry: _Entry) -> None:
        """Its memory is free at once; its place in the clock is found empty later."""
        self._size -= len(entry.data)
        entry.data = b""
        entry.used = False


class Blocks:
    """The encoded blocks of one Disk.

    Attributes:
        held: key to decoded block; only ``BlockCache`` and this class change it.
    """

    __slots__ = ("_cache", "_decode", "_decoding", "_stored", "held")

    def __init__(
        self,
        cache: BlockCache,
        decode: Callable[[int], bytes],
        stored: Callable[[int], Stored | None] | None = None,
    ) -> None:
        """Blocks that ``decode`` makes.

        Args:
            cache: shared with other Disks.
            decode: returns the block of a key, blocking, in any thread; raises DiskError.
            stored: where the packed block lies, if that is known and in a file, and unpacking it
                takes a fraction of a millisecond. Never blocks.
        """
        self._cache = cache
        self._decode = decode
        self._stored = stored
        self._decoding: dict[int, _Flight] = {}
        self.held: dict[int, _Entry] = {}

    def peek(self, key: int) -> bytes | None:
        """The decoded block if it is in memory. Never waits; for the loop."""
        entry = self.held.get(key)
        if entry is None:
            return None
        entry.used = True
        self._cache.hits += 1
        return entry.data or None

    def at_hand(self, key: int) -> bool:
        """Does ``get`` take a fraction of a millisecond now, and no disk? Never blocks."""
        if key in self.held:
            return True
        try:
            return self._is_resident(key)
        except Exception:  # noqa: BLE001 - a bug in there must not cost the connection
            return False

    def stored(self, key: int) -> Stored | None:
        """Where the packed block lies, or None: not known now, or in no file. Never blocks."""
        try:
            return self._stored(key) if self._stored is not None else None
        except Exception:  # noqa: BLE001 - a bug in there must not cost the connection
            return None

    def _is_resident(self, key: int) -> bool:
        if self._stored is None or (stored := self._stored(key)) is None:
            return False
        fd, position, length, residency = stored
        return residency.resident(fd, position, length)

    def is_coming(self, key: int) -> bool:
        """Is a thread decoding it?"""
        return key in self._decoding

    def decode_now(self, key: int, wanted: int) -> bytes | None:
        """As ``get``, on the loop: None if that would wait for the disk or a thread, or fails."""
        try:
            if key in self._decoding or not self._is_resident(key):
                return None
            return self.get(key, wanted, wait=False)
        except Exception:  # noqa: BLE001 - also a bug of a decoder must not cost the connection
            return None  # whoever asks again in a thread is told why

    @overload
    def get(self, key: int, wanted: int) -> bytes: ...

    @overload
    def get(self, key: int, wanted: int, *, wait: bool) -> bytes | None: ...

    def get(self, key: int, wanted: int, *, wait: bool = True) -> bytes | None:
        """The decoded block; decodes it if need be, or waits for who is doing so. For threads.

        ``wanted``: bytes of it that are used now; a block of which more is left is kept. Without
        ``wait`` None if a thread is decoding it.

        Raises:
            DiskError: it cannot be read or decoded.
        """
        found = self.peek(key)
        if found is not None:
            return found
        with self._cache.lock:
            flight = self._decoding.get(key)
            if flight is not None and not wait:
                return None
            landed = flight.await_with() if flight is not None else None
            if flight is None:
                flight = self._decoding[key] = _Flight()
                self._cache.misses += 1
        if landed is not None:
            landed.wait()
            return flight.result()
        try:
            data = self._decode(key)
        except BaseException as error:
            with self._cache.lock:
                self._withdraw(key, flight)
            flight.land(b"", error)
            raise
        with self._cache.lock:
            # Forgotten meanwhile: what was decoded is what the block was, not what it is.
            if self._withdraw(key, flight) and wanted < len(data) and key not in self.held:
                entry = self.held[key] = _Entry(self, key, data)
                self._cache.keep(entry)
        flight.land(data)
        return data

    def _withdraw(self, key: int, flight: _Flight) -> bool:
        """Nobody can find it any more; False if it had been forgotten. Call with the lock."""
        if self._decoding.get(key) is not flight:
            return False
        del self._decoding[key]
        return True

    def forget(self, key: int) -> None:
        """The block has changed or is gone."""
        with self._cache.lock:
            self._decoding.pop(key, None)
            entry = self.held.pop(key, None)
            if entry is not None:
                self._cache.drop(entry)

    def close(self) -> None:
        """Give all memory back; for a Disk that is closed."""
        with self._cache.lock:
            self._decoding.clear()
            for entry in self.held.values():
                self._cache.drop(entry)
            self.held.clear()
