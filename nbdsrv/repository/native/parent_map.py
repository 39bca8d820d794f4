"""The map of a disk in the parent point, as a writer looks at it.

::

    parent   |chunk|chunk|chunk|chunk|ch|                 covered: the chunks that have the
    disk     |chunk|chunk|chunk|chunk|chunk|chunk|        same length in both
             |<----- covered ------>|

    slot     in a usable pack          kept as it is
             in another one            found elsewhere, or given by the source once more
    page     damaged                   its slots are given by the source once more
"""

import threading
from collections import OrderedDict

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.damage import damage_in
from nbdsrv.repository.native.hashing import ID_SIZE, ZERO_ID
from nbdsrv.repository.native.known import Known
from nbdsrv.repository.native.slots import SLOT, Page, Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import StoreError

__all__ = ["ParentMap", "ParentPage"]

MAX_PAGES = 64
"""Pages kept: 8 GiB of the disk, 2 MiB of memory."""


class ParentPage:
    """A page of the parent.

    Attributes:
        page: as stored; None if it is damaged.
        bad: numbers of packs in ``page.names`` that must not be used.
    """

    __slots__ = ("_slots", "_step", "bad", "page")

    def __init__(self, page: Page | None, bad: frozenset[int]) -> None:
        self.page = page
        self.bad = bad
        self._slots = page.slots if page is not None else b""
        self._step = page.step if page is not None else 0

    def same(self, index: int, id_: bytes) -> bool:
        """Does the slot hold that content, in a pack that may be used?"""
        if not self.holds(index, id_):
            return False
        return not self.bad or SLOT.unpack_from(self._slots, index * self._step)[1] not in self.bad

    def holds(self, index: int, id_: bytes) -> bool:
        """Does the slot hold that content?"""
        at = index * self._step
        return self._slots[at : at + ID_SIZE] == id_

    def data(self) -> list[int]:
        """The slots that hold data."""
        if self.page is None:
            return []
        return [index for index, _, _ in self.page.places()]


class ParentMap:
    """The parent's map of one disk. Thread-safe; blocking.

    Attributes:
        root: of the map.
        covered: chunks that have the same length in the disk that is written.
    """

    def __init__(self, vault: Vault, known: Known, root: Root, size: int) -> None:
        """``size``: bytes of the disk that is written."""
        self._vault = vault
        self._known = known
        self.root = root
        same = size == root.size
        self.covered = root.chunks if same else min(size, root.size) // root.chunk_size
        self._pages: OrderedDict[int, ParentPage] = OrderedDict()
        self._lock = threading.Lock()

    def same(self, chunk: int, id_: bytes) -> bool:
        """Is that the content the parent has there, and may its place be used?"""
        if chunk >= self.covered:
            return False
        page, index = divmod(chunk, self.root.page_slots)
        return self.page(page).same(index, id_)

    def holds(self, chunk: int, id_: bytes) -> bool:
        """Is that the content the parent has there, whatever becomes of its place?"""
        page, index = divmod(chunk, self.root.page_slots)
        return chunk < self.covered and self.page(page).holds(index, id_)

    def page(self, number: int) -> ParentPage:
        """A page.

        Raises:
            StoreError: the store does not answer.
        """
        with self._lock:
            found = self._pages.get(number)
            if found is not None:
                self._pages.move_to_end(number)
                return found
        found = self._load(number)
        with self._lock:
            self._pages[number] = found
            while len(self._pages) > MAX_PAGES:
                self._pages.popitem(last=False)
        return found

    def is_zero(self, number: int) -> bool:
        """Does nothing but zeroes stand in that page?"""
        return self.root.pages.id(number) == ZERO_ID

    def _load(self, number: int) -> ParentPage:
        try:
            page = self._vault.page(self.root, number)
        except CorruptImage:
            return ParentPage(None, frozenset())
        except StoreError as error:
            # A bad sector, or an object that was cut off, costs what stands in it, not the backup.
            damage_in(self._vault.store, error)
            return ParentPage(None, frozenset())
        usable = self._known.usable
        bad = frozenset(n for n, name in enumerate(page.names) if not usable(name))
        return ParentPage(page, bad)
