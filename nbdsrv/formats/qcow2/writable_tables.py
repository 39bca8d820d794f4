"""The L1 and L2 tables of an image that is written to: changed in memory, written when flushed.

::

    L1   | 0 | position, COPIED | position | ...      all of it in memory
               |                  '--> shared with a snapshot: copied before it is changed
               '--> Table   words | pending [low, high) | syncing [low, high)
                                    changed, not written  being written now

A Table that something has changed in stays in memory until that is durable; of the others the ones
used last do.

Rule: everything here but ``read_table`` belongs to the event loop.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.entries import words_of
from nbdsrv.formats.qcow2.header import Header
from nbdsrv.formats.qcow2.structs import COPIED, L1_RESERVED, OFFSET_MASK
from nbdsrv.formats.qcow2.writer_space import big_endian

__all__ = ["Snapshot", "Table", "Tables"]

MAX_TABLE_BYTES = 32 << 20
"""L2 tables kept in memory: 512 of 64 KiB, which is 256 GiB of the disk."""
_NOTHING = (0, 0)


@dataclass(slots=True, eq=False)
class Table:
    """One L2 table.

    Attributes:
        number: its index in the L1 table.
        words: its entries.
        position: in the file; 0 while it has no place yet.
        own: may it be changed where it is? Not if a snapshot refers to it, nor without a place.
        new: does nothing in the file refer to it yet?
        pending: entries changed and not yet written.
        syncing: entries being written at this moment.
        pins: who must find it in memory again.
    """

    number: int
    words: "array[int]"
    position: int
    own: bool
    new: bool = False
    pending: tuple[int, int] = _NOTHING
    syncing: tuple[int, int] = _NOTHING
    pins: int = 0


@dataclass(slots=True)
class Snapshot:
    """The changes at one moment.

    Attributes:
        new: (position, bytes) of tables that nothing refers to yet; any time.
        entries: (position, bytes) of entries, to be written when all they refer to is durable.
    """

    new: list[tuple[int, bytes]] = field(default_factory=list)
    entries: list[tuple[int, bytes]] = field(default_factory=list)
    tables: list[tuple[Table, bool]] = field(default_factory=list)
    l1: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.new or self.entries)


class Tables:
    """See the module.

    Attributes:
        l1: the L1 table.
    """

    def __init__(self, file: ImageFile, header: Header) -> None:
        """Reads the L1 table, blocking."""
        self._file = file
        self._header = header
        self._position = header.l1_table_offset
        self.l1 = words_of(file.read(self._position, header.l1_size * 8, "the L1 table"))
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._by_position: dict[int, Table] = {}
        self._changed_l1: set[int] = set()
        self._changed: dict[int, Table] = {}

    # --- in any thread -------------------------------------------------------------------------

    def read_table(self, number: int) -> "array[int]":
        """An L2 table from the file; all zero where there is none. Blocking.

        Raises:
            CorruptImage: the L1 entry makes no sense.
        """
        word = self.l1[number]
        size = self._header.cluster_size
        if not word:
            return array("Q", bytes(size))
        position, at = word & OFFSET_MASK, self._position + number * 8
        if word & L1_RESERVED or not self._header.is_aligned(position) or position < size:
            raise self._file.corrupt(at, f"an L1 entry {word:#x}")
        return words_of(self._file.read(position, size, "an L2 table"))

    def in_memory(self, position: int, length: int) -> bytes | None:
        """Bytes of a table as they are by now, if it is in memory. In any thread."""
        l1_end = self._position + len(self.l1) * 8
        if self._position <= position < l1_end:
            first = (position - self._position) // 8
            return big_endian(self.l1[first : first + length // 8])
        table = self._by_position.get(position & -self._header.cluster_size)
        if table is None:
            return None
        first = (position & self._header.cluster_size - 1) // 8
        return big_endian(table.words[first : first + length // 8])

    # --- on the loop ---------------------------------------------------------------------------

    def get(self, number: int) -> Table | None:
        """A table that is in memory."""
        table = self._tables.get(number)
        if table is not None:
            self._tables.move_to_end(number)
        return table

    def keep(self, number: int, words: "array[int]") -> Table:
        """Remember what ``read_table`` has read."""
        known = self.get(number)
        if known is not None:
            return known
        word = self.l1[number]
        table = Table(number, words, word & OFFSET_MASK, own=bool(word & COPIED))
        self._tables[number] = table
        if table.position:
            self._by_position[table.position] = table
        limit = max(MAX_TABLE_BYTES >> self._header.cluster_bits, 4)
        if len(self._tables) > limit:
            self._evict(len(self._tables) - limit)
        return table

    def _evict(self, count: int) -> None:
        for number, table in list(self._tables.items())[:-1]:
            if number not in self._changed and not table.pins and table.syncing == _NOTHING:
                del self._tables[number]
                self._by_position.pop(table.position, None)
                count -= 1
                if not count:
                    return

    def crowded(self) -> bool:
        """Have so many tables changed that they had better be written?"""
        return len(self._changed) * 2 > max(MAX_TABLE_BYTES >> self._header.cluster_bits, 4)

    def move(self, table: Table, position: int) -> None:
        """The table gets a place of its own, a cluster just allocated."""
        self._by_position.pop(table.position, None)
        table.position, table.own, table.new = position, True, True
        self._by_position[position] = table
        self.l1[table.number] = position | COPIED
        self._changed_l1.add(table.number)
        self._mark(table, 0, len(table.words))

    def enter(self, table: Table, index: int, words: "array[int]") -> None:
        """Set entries from ``index`` on; the table must be its ``own``."""
        table.words[index : index + len(words)] = words
        self._mark(table, index, index + len(words))

    def _mark(self, table: Table, low: int, high: int) -> None:
        begin, end = table.pending
        table.pending = (min(low, begin), max(high, end)) if end else (low, high)
        self._changed[table.number] = table

    # --- to be written -------------------------------------------------------------------------

    def take_changes(self) -> Snapshot:
        """Everything not yet written. Follow with ``written`` or ``put_back``."""
        taken = Snapshot(l1=self._changed_l1)
        for table in self._changed.values():
            low, high = table.pending
            where = (table.position + low * 8, big_endian(table.words[low:high]))
            (taken.new if table.new else taken.entries).append(where)
            taken.tables.append((table, table.new))
            table.syncing, table.pending = table.pending, _NOTHING
            table.new = False
        for number in self._changed_l1:
            word = self.l1[number].to_bytes(8, "big")
            taken.entries.append((self._position + number * 8, word))
        self._changed, self._changed_l1 = {}, set()
        return taken

    def written(self, taken: Snapshot) -> None:
        """All of it is durable."""
        for table, _ in taken.tables:
            table.syncing = _NOTHING

    def put_back(self, taken: Snapshot) -> None:
        """Writing has failed: it has to be written still."""
        self._changed_l1 |= taken.l1
        for table, new in taken.tables:
            self._mark(table, *table.syncing)
            table.syncing = _NOTHING
            table.new = table.new or new
