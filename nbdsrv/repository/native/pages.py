"""The map of one disk in memory: pages as they are needed, within a bound.

::

    root    |zero|page|page|lost| ...       known from the beginning: which pages are zero
                   |    |    |
            peek   MapPage  None  MapPage   the loop: what is there, now; never waits
            get    Page     reads  reads    threads: one reader, the others wait for it
            load   ...                      threads: the same, and failing is no error

A page that cannot be read is noted as *lost*: all its slots count as data, so that whoever asks for
one of them tries again, and learns what is wrong with exactly these bytes.

Eviction is CLOCK: a hit only sets a flag, so that ``peek`` needs no lock.
"""

import threading
from collections import deque
from concurrent.futures import Future

from nbdsrv.errors import DiskError
from nbdsrv.repository.native.hashing import ID_SIZE, ZERO_ID
from nbdsrv.repository.native.slots import Page, Root
from nbdsrv.repository.native.vault import Vault

__all__ = ["MAX_BYTES", "MapPage", "Pages"]

MAX_BYTES = 16 << 20
"""Bytes of pages kept for a disk: the map of 80 GiB in chunks of 256 KiB."""


class MapPage:
    """A page as the loop looks at it.

    Attributes:
        zeroes: for each slot 1 if it is zeroes, 0 if it is data.
        page: the slots; None where all are zeroes, or nobody knows them.
        used: since the clock's hand was here.
    """

    __slots__ = ("page", "used", "zeroes")

    def __init__(self, zeroes: bytes, page: Page | None = None) -> None:
        self.zeroes = zeroes
        self.page = page
        self.used = False

    @property
    def bytes(self) -> int:
        """What it takes, about."""
        assert self.page is not None
        return len(self.zeroes) + len(self.page.slots) + (ID_SIZE + 40) * len(self.page.names)


class Pages:
    """The pages of one map. Thread-safe.

    Attributes:
        root: whose pages these are.
    """

    def __init__(self, vault: Vault, root: Root, limit: int = MAX_BYTES) -> None:
        self.root = root
        self._vault = vault
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()
        self._held: dict[int, MapPage] = {}
        self._clock: deque[int] = deque()
        self._lost: dict[int, MapPage] = {}
        self._reading: dict[int, Future[Page]] = {}
        self._zero = _zero_slots(root.pages)
        self._zero_page = MapPage(b"\1" * root.page_slots)
        last = root.slots_of(len(root) - 1) if len(root) else 0
        self._zero_last = MapPage(b"\1" * last)

    def peek(self, number: int) -> MapPage | None:
        """A page that is in memory, or lost. Never waits; for the loop."""
        held = self._held.get(number)
        if held is not None:
            held.used = True
            return held
        if self._zero[number]:
            return self._zero_page if number < len(self.root) - 1 else self._zero_last
        return self._lost.get(number)

    def first_not_zero(self, number: int) -> int:
        """The first page from ``number`` on that is not zeroes; the count of pages if none is."""
        found = self._zero.find(0, number)
        return found if found >= 0 else len(self.root)

    def get(self, number: int) -> Page:
        """A page, read if need be. For threads.

        Raises:
            CorruptImage: it is damaged.
            StoreError: the store does not answer.
        """
        held = self._held.get(number)
        if held is not None and held.page is not None:
            held.used = True
            return held.page
        with self._lock:
            flight = self._reading.get(number)
            mine = flight is None
            if flight is None:
                flight = self._reading[number] = Future()
        if not mine:
            return flight.result()
        try:
            page = self._vault.page(self.root, number)
        except BaseException as error:
            with self._lock:
                del self._reading[number]
                self._lost.setdefault(number, MapPage(bytes(self.root.slots_of(number))))
            flight.set_exception(error)
            raise
        held = MapPage(_zero_slots(page), page)
        with self._lock:
            del self._reading[number]
            self._lost.pop(number, None)
            self._keep(number, held)
        flight.set_result(page)
        return page

    def load(self, number: int, ahead: int = 0) -> None:
        """Bring a page into memory, and up to ``ahead`` that follow. For threads.

        Never fails: a page that cannot be read is lost, and ``peek`` shows it.
        """
        room = self._limit // 2  # what is read ahead must not push out what is wanted
        for each in range(number, min(number + 1 + ahead, len(self.root))):
            if self.peek(each) is None:
                try:
                    room -= len(self.get(each).slots)
                except DiskError:
                    return  # whoever wants its bytes is told
            if room < 0:
                return

    def load_small(self, most: int) -> None:
        """Bring the whole map into memory if it has at most so many pages. For threads.

        Never fails, as ``load``.
        """
        there = [n for n in range(len(self.root)) if not self._zero[n]]
        if len(there) <= most:
            for each in there:
                self.load(each)

    def packs(self) -> set[bytes]:
        """Names of the packs that slots of pages in memory lie in."""
        with self._lock:
            held = [each.page for each in self._held.values()]
        return {name for page in held if page is not None for name in page.names}

    def clear(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._held.clear()
            self._clock.clear()
            self._lost.clear()
            self._size = 0

    def _keep(self, number: int, page: MapPage) -> None:
        if number in self._held:  # evicted, and read by two
            return
        self._held[number] = page
        self._clock.append(number)
        self._size += page.bytes
        while self._size > self._limit and len(self._clock) > 1:
            oldest = self._clock.popleft()
            held = self._held[oldest]
            if held.used or oldest == number:
                held.used = False
                self._clock.append(oldest)
                continue
            self._size -= held.bytes
            del self._held[oldest]


def _zero_slots(page: Page) -> bytes:
    """For each slot 1 if it is zeroes."""
    slots = page.slots
    step = page.step
    firsts = slots[::step]
    if 0 not in firsts:  # ids are hashes: usually the first byte tells
        return bytes(len(firsts))
    return bytes(
        [
            not first and slots[at : at + ID_SIZE] == ZERO_ID
            for first, at in zip(firsts, range(0, len(slots), step), strict=True)
        ]
    )
