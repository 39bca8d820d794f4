"""The map of a disk that is being written: pages of slots, then the root.

::

    page     as in the parent ── first change ──> open ── lies behind ──> encoded, in a meta pack
                                                    ^── changed again ──────┘
    slot     id, number of a pack (``pack_writer``), offset ...

Few pages are open at a time, whatever the size of the disk: those that were changed last, and those
with slots in packs that are not put yet. A page that never opens keeps its place; if none does, the
root is the parent's own.

Rule: no slot, page or root leads into a pack that must not be used. A chunk of which no usable pack
has the content is *wanted*: without it nothing is committed.
"""

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from nbdsrv.errors import DiskError, RepositoryError
from nbdsrv.repository.native.config import MAX_CHUNK
from nbdsrv.repository.native.damage import damage_in
from nbdsrv.repository.native.entry import MAX_CONTENT, Kind, Place
from nbdsrv.repository.native.hashing import ID_SIZE, ZERO_ID
from nbdsrv.repository.native.known import Known
from nbdsrv.repository.native.pack_writer import PackWriter
from nbdsrv.repository.native.parent_map import ParentMap, ParentPage
from nbdsrv.repository.native.sealing import Codec, compress, expand
from nbdsrv.repository.native.slots import (
    MAX_SIZE,
    SLOT,
    SLOT_SIZE,
    Page,
    Root,
    encode_page,
    slot_form,
)
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.wanted import Wanted
from nbdsrv.store.store import Data, ObjectMissing

__all__ = ["ZERO_SLOT", "MapWriter"]

ZERO_SLOT = bytes(SLOT_SIZE)
MAX_OPEN = 64
"""Pages that stay open though they could be encoded: 8 GiB of the disk, 2 MiB of memory."""
MAX_WAITING = 512
"""Pages with slots in packs that have no name, 12 MiB: then the open pack is closed as it is. Only
small chunks far apart, a few in each page, ever are so many."""
AHEAD = 16
"""Pages read at a time where all must be looked at: of a distant store each takes 20 ms."""
ROOT_ROW = SLOT_SIZE + ID_SIZE


class MapWriter:
    """The map of one disk. Not thread-safe: the caller holds its point's lock. Blocking.

    Attributes:
        size: of the disk, bytes.
        chunks: of the disk.
        parent: what is there where nothing is told; None for zeroes.
    """

    def __init__(
        self,
        vault: Vault,
        known: Known,
        chunks: PackWriter,
        metas: PackWriter,
        size: int,
        parent: ParentMap | None,
    ) -> None:
        """A map that is as the parent's.

        Raises:
            RepositoryError: no map can be that large.
        """
        config = vault.config
        self._vault = vault
        self._known = known
        self._packs = chunks
        self._metas = metas
        self.size = size
        self.parent = parent
        self._chunk_size = config.chunk_size
        self._form = slot_form(config.chunk_size)
        self._page_slots = config.page_slots
        self.chunks = -(-size // config.chunk_size)
        self._count = -(-self.chunks // config.page_slots)
        if size > MAX_SIZE or self._count * ROOT_ROW > MAX_CONTENT - (1 << 20):
            hint = "the largest there are"
            if config.chunk_size < MAX_CHUNK:
                hint = "use a repository with a larger --chunk-size"
            raise RepositoryError(
                f"{vault.name}: a disk of {size} bytes is too large for chunks of"
                f" {config.chunk_size >> 10} KiB; {hint}"
            )
        self._open: OrderedDict[int, bytearray] = OrderedDict()
        self._ready: OrderedDict[int, None] = OrderedDict()
        """Of the open pages those that may be encoded, the one changed last at the end."""
        self._waiting: dict[int, int] = {}
        """The others: to the number of a pack they need that has no name yet."""
        self._named = 0
        self._recent: dict[int, dict[int, tuple[Codec, Data, int]]] = {}
        """By number of the meta pack that is not put yet: its pages, to read them again."""
        self._wanted = Wanted(config.chunk_size, config.page_slots, size)
        self._written = bytearray(self._count)
        self._slots = bytearray()
        self._contents = bytearray()
        if parent is not None:
            self._begin(parent)

    def _begin(self, parent: ParentMap) -> None:
        for page in range(parent.covered // self._page_slots, self._count):
            first = page * self._page_slots
            end = first + self._slots_of(page)
            self._wanted.add(page, max(parent.covered - first, 0), end - first)
        if not self._known.shunned:
            return
        there = [n for n in range(min(self._count, len(parent.root))) if not parent.is_zero(n)]
        with ThreadPoolExecutor(AHEAD, "nbdsrv-pages") as crew:
            for at in range(0, len(there), AHEAD):
                some = there[at : at + AHEAD]
                for page, found in zip(some, crew.map(parent.page, some), strict=True):
                    usable = self._known.usable(parent.root.pages.place(page).pack)
                    if found.page is None or found.bad or not usable:
                        self.open(page)
                        self.relieve()

    # --- changes -------------------------------------------------------------------------------

    def set(self, chunk: int, slot: bytes) -> None:
        """Content there."""
        page, index = divmod(chunk, self._page_slots)
        slots = self.open(page)
        step = self._form.size
        slots[index * step : (index + 1) * step] = slot
        self._wanted.discard(page, index, index + 1)
        _, number, offset, *_ = self._form.unpack(slot)
        if offset and not self._packs.names[number]:
            self._wait(page, number)

    def zero(self, first: int, end: int) -> None:
        """Zeroes in these chunks."""
        while first < end:
            page, index = divmod(first, self._page_slots)
            count = min(end - first, self._slots_of(page) - index)
            self._zero(page, index, index + count)
            self._wanted.discard(page, index, index + count)
            first += count

    def _zero(self, page: int, start: int, stop: int) -> None:
        if page not in self._open:
            if self._is_zero(page):
                return
            if stop - start == self._slots_of(page):
                self._refer(page, ZERO_SLOT, ZERO_ID)
                return
        slots = self.open(page)
        step = self._form.size
        slots[start * step : stop * step] = bytes((stop - start) * step)

    def _is_zero(self, page: int) -> bool:
        if self._written[page]:
            at = page * SLOT_SIZE
            return self._slots[at : at + ID_SIZE] == ZERO_ID
        parent = self.parent
        return parent is None or page >= len(parent.root) or parent.is_zero(page)

    def wanted(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what the source must give, ascending, neighbours merged."""
        return self._wanted.ranges()

    # --- pages ---------------------------------------------------------------------------------

    def open(self, page: int) -> bytearray:
        """The slots of a page, to be changed."""
        slots = self._open.get(page)
        if slots is not None:
            if page in self._ready:
                self._ready.move_to_end(page)
            return slots
        if self._written[page]:
            slots = self._reopened(page)
        elif self.parent is not None and page < len(self.parent.root):
            slots = self._inherited(page, self.parent.page(page), self.parent)
        else:
            slots = bytearray(self._slots_of(page) * self._form.size)
        self._open[page] = slots
        self._ready[page] = None
        return slots

    def _wait(self, page: int, number: int) -> None:
        self._ready.pop(page, None)
        self._waiting[page] = number

    def _inherited(self, page: int, found: ParentPage, parent: ParentMap) -> bytearray:
        """The parent's slots with our numbers of packs, and no place that must not be used."""
        slots = bytearray(self._slots_of(page) * self._form.size)
        first = page * self._page_slots
        covered = min(parent.covered - first, self._slots_of(page))
        if found.page is None:
            self._wanted.add(page, 0, covered)
            return slots
        for index, id_, place in found.page.places():
            if index >= covered:
                break
            kept: Place | None = place
            if found.bad and not self._known.usable(place.pack):
                kept = self._known.find(id_)
                if kept is None:
                    self._wanted.add(page, index, index + 1)
                    continue
            assert kept is not None
            self._place(slots, index, id_, kept)
        return slots

    def _reopened(self, page: int) -> bytearray:
        """A page that was encoded already."""
        slots = bytearray(self._slots_of(page) * self._form.size)
        id_, number, offset, length, codec, _ = SLOT.unpack_from(self._slots, page * SLOT_SIZE)
        if id_ == ZERO_ID:
            return slots
        name = self._metas.names[number]
        if name:
            place = Place(name, offset, length, codec)
            data = self._vault.entries.read(Kind.PAGE, id_, place)
        else:
            data = expand(*self._recent[number][page])
        for index, chunk, place in self._parsed(data, page).places():
            self._place(slots, index, chunk, place)
        return slots

    def _place(self, slots: bytearray, index: int, id_: bytes, place: Place) -> None:
        number = self._packs.number(place.pack)
        self._form.pack_into(slots, index * self._form.size, id_, number, *place[1:])

    def _parsed(self, data: Data, page: int) -> Page:
        return Page.parse(data, self._slots_of(page), self._chunk_size)

    def relieve(self) -> None:
        """Encode pages that lie behind, if there are many."""
        if len(self._open) <= MAX_OPEN:
            return
        if self._named != self._packs.put_packs:
            self._named = self._packs.put_packs
            for page, number in list(self._waiting.items()):
                if self._packs.names[number]:
                    del self._waiting[page]
                    self._ready[page] = None
        while self._ready and len(self._open) > MAX_OPEN:
            page, _ = self._ready.popitem(last=False)
            self._encode(page, self._open[page])
        if len(self._waiting) > MAX_WAITING:
            self._packs.hurry()

    def _encode(self, page: int, slots: bytearray) -> bool:
        """Put an open page into a meta pack; False while packs it needs have no name."""
        names: dict[int, int] = {}
        local = bytearray(slots)
        ids = []
        at = 0
        form = self._form
        for id_, number, offset, *rest in form.iter_unpack(slots):
            ids.append(id_)
            if offset:  # where zeroes have none
                if not self._packs.names[number]:
                    self._wait(page, number)
                    return False
                ours = names.setdefault(number, len(names))
                if ours != number:
                    form.pack_into(local, at, id_, ours, offset, *rest)
            at += form.size
        self._close(page)
        if not names:
            self._refer(page, ZERO_SLOT, ZERO_ID)
            return True
        data = encode_page([self._packs.names[number] for number in names], local, form)
        hashing = self._vault.hashing
        row = self._meta(Kind.PAGE, hashing.id_of(data), data, page)
        self._refer(page, SLOT.pack(*row), hashing.id_of(b"".join(ids)))
        return True

    def _close(self, page: int) -> None:
        del self._open[page]
        self._ready.pop(page, None)
        self._waiting.pop(page, None)

    def _is_there(self, kind: Kind, id_: bytes, place: Place) -> bool:
        """Can it be read? It is encoded anew because the parent's may have been damaged, and an
        index does not know that. That is seldom, and one small read.
        """
        try:
            self._vault.entries.read_there(kind, id_, place)
        except ObjectMissing:
            return False
        except DiskError as error:
            damage_in(self._vault.store, error)
            return False
        return True

    def _meta(
        self, kind: Kind, id_: bytes, data: bytes, page: int
    ) -> tuple[bytes, int, int, int, int, bytes]:
        """A slot for a page or root, which is stored unless there is the same already."""
        place = self._known.find(id_, kind)
        if place is not None and self._is_there(kind, id_, place):
            return id_, self._metas.number(place.pack), *place[1:]
        codec, body = compress(data)
        number, row = self._metas.add(kind, codec, len(data), id_, body)
        if number not in self._recent:
            for done in [each for each in self._recent if self._metas.names[each]]:
                del self._recent[done]
            self._recent[number] = {}
        # A copy: what zstd returns keeps the memory of the worst case.
        self._recent[number][page] = (codec, bytes(memoryview(body)), len(data))
        return id_, number, row.offset, row.clen, row.codec, b""

    def _refer(self, page: int, slot: bytes, content: bytes) -> None:
        if not self._slots:
            self._slots = bytearray(self._count * SLOT_SIZE)
            self._contents = bytearray(self._count * ID_SIZE)
        self._slots[page * SLOT_SIZE : (page + 1) * SLOT_SIZE] = slot
        self._contents[page * ID_SIZE : (page + 1) * ID_SIZE] = content
        self._written[page] = 1

    def _slots_of(self, page: int) -> int:
        return min(self._page_slots, self.chunks - page * self._page_slots)

    # --- the end -------------------------------------------------------------------------------

    def finish_pages(self) -> bool:
        """Encode the pages that are open. All packs of chunks have been put.

        Returns:
            False if the meta pack is full: put it and go on.

        Raises:
            RepositoryError: something is wanted still.
        """
        if self._wanted:
            offset, length = next(self.wanted())
            raise RepositoryError(
                f"{self._vault.name}: {length} bytes at {offset} of the disk are not to be had from"
                " the parent point any more, and were not given; back up with --since full"
            )
        parent = self.parent
        if parent is not None and len(parent.root):
            last = len(parent.root) - 1
            for page in {min(last, self._count - 1), self._count - 1} - {-1}:
                inherited = page <= last and not self._written[page]
                if inherited and parent.root.slots_of(page) != self._slots_of(page):
                    self.open(page)
        for page in list(self._open):
            encoded = self._encode(page, self._open[page])
            assert encoded, "packs of chunks go first"
            if self._metas.is_full:
                return False
        return True

    def is_parents(self) -> bool:
        """Is nothing different from the parent? Then its root is ours."""
        parent = self.parent
        return parent is not None and self.size == parent.root.size and not any(self._written)

    def finish_root(self) -> Root:
        """The root. All meta packs with pages have been put."""
        parent, names = self.parent, self._metas.names
        numbers: dict[bytes, int] = {}
        slots = bytearray(self._count * SLOT_SIZE)
        contents = bytearray(self._count * ID_SIZE)
        for page in range(self._count):
            at, here = page * SLOT_SIZE, slice(page * ID_SIZE, (page + 1) * ID_SIZE)
            if self._written[page]:
                id_, number, *place = SLOT.unpack_from(self._slots, at)
                contents[here] = self._contents[here]
                name = names[number] if id_ != ZERO_ID else b""
            elif parent is not None and page < len(parent.root) and not parent.is_zero(page):
                id_ = parent.root.pages.id(page)
                name, *place = parent.root.pages.place(page)
                contents[here] = parent.root.content(page)
            else:
                continue
            if id_ != ZERO_ID:
                SLOT.pack_into(slots, at, id_, numbers.setdefault(name, len(numbers)), *place)
        pages = Page(list(numbers), bytes(slots), SLOT)
        return Root(self.size, self._chunk_size, self._page_slots, pages, bytes(contents))

    def add_root(self, root: Root) -> tuple[bytes, int, int, int, int, bytes]:
        """Put it into the open meta pack: a slot's id, number of the pack, and place."""
        data = root.encode()
        if len(data) > MAX_CONTENT:
            raise RepositoryError(
                f"{self._vault.name}: the map of a disk of {self.size} bytes is too large; use a"
                " repository with a larger --chunk-size"
            )
        return self._meta(Kind.ROOT, self._vault.hashing.id_of(data), data, self._count)
