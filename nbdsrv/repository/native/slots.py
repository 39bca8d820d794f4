"""The map of a disk: pages of slots, and a root of pages (docs/repository-format.md, "Map").

::

    root    |page|page| 0  |page| ...        80 bytes each: a slot, and the hash of the page's ids
              |
    page    |slot|slot| 0  |slot| ... 512    64 bytes each, where chunks have 8 frames
              |
    pack    ..|entry|..                      256 KiB of the disk

    slot    id[32] pack u32 offset u32 clen u32 codec u8 0[3] frames[n]
    pack    an index into the table of names in front of the slots
    frames  lengths of a chunk's frames, u16 each; slots of a root have none

A slot of zeroes is content of zeroes, in pages and roots alike. A slot's place is a hint: content
is known by its id, and the index finds it elsewhere. So pages that name the same content may
differ in bytes; *content*, the hash of their ids alone, tells that they do not differ in what
matters.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

from nbdsrv.repository.native.entry import ENTRY_SIZE, MAX_CONTENT, Place
from nbdsrv.repository.native.frames import lengths_size
from nbdsrv.repository.native.hashing import ID_SIZE, ZERO_ID, Hashing
from nbdsrv.repository.native.pack import HEADER_SIZE, MAX_PACK
from nbdsrv.repository.native.sealing import BrokenPayload, Codec
from nbdsrv.store.store import Data

__all__ = [
    "MAX_PAGE_SLOTS",
    "MAX_SIZE",
    "SLOT",
    "SLOT_SIZE",
    "Page",
    "Root",
    "encode_page",
    "slot_form",
]

SLOT = struct.Struct("<32sIIIBxxx0s")
"""Of a root."""
SLOT_SIZE = SLOT.size
PAGE_MAGIC = b"NBDPAGE1"
ROOT_MAGIC = b"NBDROOT1"
_PAGE = struct.Struct("<8sII")
_ROOT = struct.Struct("<8sQIIII")
_ROOT_SLOT = SLOT_SIZE + ID_SIZE
MAX_PAGE_SLOTS = 1 << 14
MAX_SIZE = 1 << 53
"""Bytes of a disk. Its root must fit ``MAX_CONTENT``: 100 TiB in chunks of 256 KiB, 1.6 PiB in
those of 4 MiB."""


@lru_cache
def slot_form(chunk_size: int) -> struct.Struct:
    """A slot of a page, for chunks of so many bytes."""
    return struct.Struct(f"<32sIIIBxxx{lengths_size(chunk_size)}s")


class Page:
    """Consecutive slots, immutable.

    Attributes:
        names: of the packs the slots lie in.
        slots: the slots, one behind the other.
        form: of a slot: ``SLOT``, or ``slot_form``.
        step: bytes of a slot.
    """

    __slots__ = ("form", "names", "slots", "step")

    def __init__(self, names: Sequence[bytes], slots: bytes, form: struct.Struct) -> None:
        self.names = names
        self.slots = slots
        self.form = form
        self.step = form.size

    def __len__(self) -> int:
        return len(self.slots) // self.step

    def id(self, index: int) -> bytes:
        """Of a slot's content; ``ZERO_ID`` for zeroes."""
        at = index * self.step
        return self.slots[at : at + ID_SIZE]

    def place(self, index: int) -> Place:
        """Where a slot's content lies; not for one that is zeroes."""
        _, pack, offset, clen, codec, frames = self.form.unpack_from(self.slots, index * self.step)
        return Place(self.names[pack], offset, clen, codec, frames.rstrip(b"\0"))

    def ids(self) -> bytes:
        """All ids, one behind the other."""
        slots = self.slots
        return b"".join([slots[at : at + ID_SIZE] for at in range(0, len(slots), self.step)])

    def places(self) -> Iterator[tuple[int, bytes, Place]]:
        """(index, id, place) of the slots that are not zeroes."""
        names, slots = self.names, self.form.iter_unpack(self.slots)
        for index, (id_, pack, offset, clen, codec, frames) in enumerate(slots):
            if id_ != ZERO_ID:
                yield index, id_, Place(names[pack], offset, clen, codec, frames.rstrip(b"\0"))

    def content(self, hashing: Hashing) -> bytes:
        """The hash of its ids; ``ZERO_ID`` where all are zero."""
        ids = self.ids()
        return hashing.id_of(ids) if any(ids) else ZERO_ID

    @classmethod
    def parse(cls, data: Data, count: int, chunk_size: int) -> "Page":
        """A page of ``count`` slots for chunks of ``chunk_size`` bytes.

        Raises:
            BrokenPayload: it is none.
        """
        form = slot_form(chunk_size)
        names, slots, rows = _parse(data, _PAGE, PAGE_MAGIC, form.size)
        if rows != count:
            raise BrokenPayload(f"a page has {rows} slots in place of {count}")
        page = cls(names, slots, form)
        _check(page)
        return page


def encode_page(names: Sequence[bytes], slots: Data, form: struct.Struct) -> bytes:
    """A page whose slots lie in packs of these names."""
    count = len(slots) // form.size
    return b"".join((_PAGE.pack(PAGE_MAGIC, count, len(names)), *names, slots))


class Root:
    """The pages of one disk, immutable.

    Attributes:
        size: of the disk, bytes.
        chunk_size: bytes a slot of a page stands for; the last one for what is left.
        page_slots: slots of a page; the last page has as many as are left.
        pages: a slot for each page, ``id`` and ``place`` of the page itself.
        contents: the hash of each page's ids, 32 bytes each.
    """

    __slots__ = ("chunk_size", "contents", "page_slots", "pages", "size")

    def __init__(
        self, size: int, chunk_size: int, page_slots: int, pages: Page, contents: bytes
    ) -> None:
        self.size = size
        self.chunk_size = chunk_size
        self.page_slots = page_slots
        self.pages = pages
        self.contents = contents

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def page_span(self) -> int:
        """Bytes of the disk a page stands for."""
        return self.chunk_size * self.page_slots

    @property
    def chunks(self) -> int:
        """Of the disk."""
        return -(-self.size // self.chunk_size)

    def slots_of(self, page: int) -> int:
        """Slots the page of that number has."""
        return min(self.page_slots, self.chunks - page * self.page_slots)

    def content(self, page: int) -> bytes:
        """The hash of a page's ids; ``ZERO_ID`` for zeroes."""
        return self.contents[page * ID_SIZE : (page + 1) * ID_SIZE]

    def image_id(self, hashing: Hashing) -> bytes:
        """Equal for disks of equal size and content, wherever their chunks lie."""
        return hashing.id_of(
            struct.pack("<QII", self.size, self.chunk_size, self.page_slots) + self.contents
        )

    def encode(self) -> bytes:
        """As it is stored."""
        head = _ROOT.pack(
            ROOT_MAGIC,
            self.size,
            self.chunk_size,
            self.page_slots,
            len(self),
            len(self.pages.names),
        )
        slots, contents = self.pages.slots, self.contents
        rows = [
            slots[n * SLOT_SIZE : (n + 1) * SLOT_SIZE] + contents[n * ID_SIZE : (n + 1) * ID_SIZE]
            for n in range(len(self))
        ]
        return b"".join((head, *self.pages.names, *rows))

    @classmethod
    def parse(cls, data: Data) -> "Root":
        """A root as it is stored.

        Raises:
            BrokenPayload: it is none.
        """
        names, rows, count = _parse(data, _ROOT, ROOT_MAGIC, _ROOT_SLOT)
        _, size, chunk_size, page_slots, _, _ = _ROOT.unpack_from(data)
        if (
            not 512 <= chunk_size <= MAX_CONTENT
            or not 0 < page_slots <= MAX_PAGE_SLOTS
            or size > MAX_SIZE
        ):
            raise BrokenPayload("a root of impossible sizes")
        if count != -(-size // (chunk_size * page_slots)):
            raise BrokenPayload(f"a root has {count} pages for a disk of {size} bytes")
        at = range(0, len(rows), _ROOT_SLOT)
        slots = b"".join([rows[n : n + SLOT_SIZE] for n in at])
        contents = b"".join([rows[n + SLOT_SIZE : n + _ROOT_SLOT] for n in at])
        pages = Page(names, slots, SLOT)
        _check(pages)
        return cls(size, chunk_size, page_slots, pages, contents)


def _parse(
    data: Data, head: struct.Struct, magic: bytes, row: int
) -> tuple[list[bytes], bytes, int]:
    """Names, rows and their number."""
    if len(data) < head.size or bytes(data[:8]) != magic:
        raise BrokenPayload("no page or root of a map")
    *_, count, packs = head.unpack_from(data)
    start = head.size + packs * ID_SIZE
    if len(data) != start + count * row:
        raise BrokenPayload("a page or root of another length than it says")
    table = bytes(data[head.size : start])
    names = [table[at : at + ID_SIZE] for at in range(0, len(table), ID_SIZE)]
    return names, bytes(data[start:]), count


def _check(page: Page) -> None:
    """Every place a slot names must be possible."""
    count = len(page.names)
    for id_, pack, offset, clen, codec, _ in page.form.iter_unpack(page.slots):
        if id_ == ZERO_ID:
            continue
        if (
            pack >= count
            or offset < HEADER_SIZE
            or offset + ENTRY_SIZE + clen > MAX_PACK
            or codec not in _CODECS
        ):
            raise BrokenPayload("a slot names an impossible place")


_CODECS = frozenset(int(codec) for codec in Codec)
