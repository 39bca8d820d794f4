"""What the points of a repository refer to: every entry of every pack that must stay. Blocking.

::

    points ── roots ── pages ── slots ──> place                  marked: (pack, offset, length)
                                            │ the pack is gone, condemned or damaged
                                            └── index ──> the same content in a good pack

An id lives where its slot says if that pack is *good*: there, and neither condemned nor known to be
damaged. Otherwise it lives where the index has it in a good pack, and only if there is none it
keeps the pack that is not good.

A page is read once, however many roots share it. What is marked takes 8 bytes an entry: 32 MiB for
a TiB of chunks.
"""

from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.census import THREADS, Census
from nbdsrv.repository.native.damage import damage_of, is_outage
from nbdsrv.repository.native.entries import key_of
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place
from nbdsrv.repository.native.hashing import ZERO_ID
from nbdsrv.repository.native.pack import HEADER_SIZE, RECORD_SIZE, TRAILER_SIZE
from nbdsrv.repository.native.point import Ref
from nbdsrv.repository.native.slots import Page, Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, StoreError

__all__ = ["Live", "Mark", "Marker", "Missing", "mark"]

AT_ONCE = 64
"""Pages that are read ahead, 24 KiB each."""
FRAME = HEADER_SIZE + TRAILER_SIZE
MAX_TOLD = 100
"""Of what is missing, how much is remembered; all is counted."""


class Live:
    """The entries of one pack that are referred to.

    Attributes:
        row_size: bytes of a row of its directory: as large as slots that lead there.
    """

    __slots__ = ("_limit", "_rows", "row_size")

    def __init__(self, row_size: int = RECORD_SIZE) -> None:
        self.row_size = row_size
        self._rows = array("Q")
        self._limit = 1024

    def add(self, rows: Iterable[int]) -> None:
        """Entries, ``offset << 32 | clen`` each; the same ones may come again."""
        self._rows.extend(rows)
        if len(self._rows) > self._limit:
            self.rows()

    def rows(self) -> "array[int]":
        """Each once, ascending."""
        self._rows = array("Q", sorted(set(self._rows)))
        self._limit = max(1024, 2 * len(self._rows))
        return self._rows

    @property
    def bytes(self) -> int:
        """What a pack of these entries alone would take, or a few bytes more."""
        rows = self.rows()
        per_entry = ENTRY_SIZE + self.row_size
        return FRAME + len(rows) * per_entry + sum(row & 0xFFFFFFFF for row in rows)


class Missing(NamedTuple):
    """Content that is referred to and lies nowhere."""

    point: str
    disk: str
    key: str


class Mark:
    """What was found.

    Attributes:
        live: by name of the pack; one that is not in it is not referred to.
        damage: points, roots and pages that cannot be read: what they refer to is not known.
        missing: the first of what is referred to and lies nowhere.
        missing_count: of all of that.
        points: that were read.
    """

    def __init__(self) -> None:
        self.live: dict[bytes, Live] = {}
        self.damage: list[CorruptImage] = []
        self.missing: list[Missing] = []
        self.missing_count = 0
        self.points = 0


def mark(vault: Vault, census: Census, shunned: AbstractSet[bytes]) -> Mark:
    """Mark all that the points refer to that are there now; counts the packs once more.

    Args:
        vault: the repository. Its entries are looked up in ``census`` meanwhile.
        census: taken before.
        shunned: packs that are not good.

    Raises:
        StoreError: the store does not answer. Damage is no error but told in the outcome.
    """
    objects = vault.point_objects()
    census.recount()
    with ThreadPoolExecutor(THREADS, "nbdsrv-mark") as threads:
        marker = Marker(vault, census, shunned, threads)
        marker.walk([stored.key for stored in objects])
    return marker.found


class Marker:
    """The walk through all maps. Who verifies them looks closer: see ``verify_maps``.

    Attributes:
        found: so far.
        where: ``group/ulid`` and the disk whose map is being walked.
    """

    def __init__(
        self, vault: Vault, census: Census, shunned: AbstractSet[bytes], threads: Executor
    ) -> None:
        self._vault = vault
        self._census = census
        self._shunned = shunned
        self._good: frozenset[bytes] = frozenset()
        self._threads = threads
        self._roots: set[str] = set()
        self._pages: set[bytes] = set()
        self._doubtful: set[bytes] = set()
        self._moved: set[bytes] = set()
        self.where = "", ""
        self.found = Mark()

    def walk(self, keys: Iterable[str]) -> None:
        """All that these points refer to. Count the packs again after listing the points."""
        self._good = frozenset(self._census.packs.keys() - self._shunned)
        with self._looking_everywhere():
            for key in keys:
                self.point(key)
        self.settle_doubtful()

    @contextmanager
    def _looking_everywhere(self) -> Iterator[None]:
        """A page that is not in its place is looked for in all that is known."""
        entries = self._vault.entries
        before, entries.elsewhere = entries.elsewhere, self.elsewhere
        try:
            yield
        finally:
            entries.elsewhere = before

    def elsewhere(self, id_: bytes) -> Iterator[Place]:
        """Where a root or page may lie that is not where it should; asked by many threads."""
        self._doubtful.add(id_)
        return self._census.index.find_all(id_)

    def settle_doubtful(self) -> None:
        """Of what was not where it should be, every copy stays: one of them was good."""
        for id_ in self._doubtful - self._moved:
            for place in self._census.index.find_all(id_):
                if place.pack in self._census.packs:
                    self._mark(id_, place)

    def point(self, key: str) -> None:
        """All that one point refers to."""
        try:
            record = self._vault.point(key)
        except ObjectMissing:
            return  # pruned meanwhile
        except CorruptImage as error:
            if isinstance(error.__cause__, StoreError) and is_outage(error, self._vault.store):
                raise error.__cause__ from error
            self.found.damage.append(error)
            return
        self.found.points += 1
        for disk in record.disks:
            self.where = f"{record.group}/{record.id}", disk.name
            self.disk(disk.root)

    def disk(self, ref: Ref) -> None:
        """All that one disk refers to."""
        self._settle_map(Kind.ROOT, bytes.fromhex(ref.id), ref.place)
        if ref.id in self._roots:
            return
        self._roots.add(ref.id)
        root = self.root(ref)
        if isinstance(root, CorruptImage):
            self.found.damage.append(root)
            return
        fresh: list[int] = []
        for number, id_, place in root.pages.places():
            self._settle_map(Kind.PAGE, id_, place)
            if id_ not in self._pages:
                self._pages.add(id_)
                fresh.append(number)
                if len(fresh) == AT_ONCE:
                    self._read(root, fresh)
                    fresh = []
        self._read(root, fresh)

    def _read(self, root: Root, numbers: list[int]) -> None:
        for page in self._threads.map(lambda number: self.page(root, number), numbers):
            if isinstance(page, CorruptImage):
                self.found.damage.append(page)
            else:
                self._slots(page)

    def root(self, ref: Ref) -> Root | CorruptImage:
        """The map of a disk, or why it cannot be read."""
        try:
            return self._vault.root(ref)
        except DiskError as error:
            return self._damage(error, ref.place)

    def page(self, root: Root, number: int) -> Page | CorruptImage:
        """A page of it, likewise; called by many threads."""
        try:
            return self._vault.page(root, number)
        except DiskError as error:
            return self._damage(error, root.pages.place(number))

    def _damage(self, error: DiskError, place: Place) -> CorruptImage:
        """What a map that cannot be read suffers from.

        Raises:
            DiskError: nothing: the service failed. It does too where a pack ends too early.
        """
        pack = self._census.packs.get(place.pack)
        ends = pack is not None and place.offset + ENTRY_SIZE + place.length > pack.size
        if not ends and is_outage(error, self._vault.store):
            raise error
        return damage_of(error)

    @staticmethod
    def row(_id: bytes, offset: int, clen: int, _codec: int, _frames: bytes, /) -> int:
        """What is remembered of an entry that is referred to, as ``Live`` has it."""
        return offset << 32 | clen

    def _slots(self, page: Page) -> None:
        if not self._good.issuperset(page.names):
            for _, id_, place in page.places():
                self._settle(Kind.CHUNK, id_, place, page.step)
            return
        rows: list[list[int]] = [[] for _ in page.names]
        row = self.row
        for id_, pack, offset, clen, codec, frames in page.form.iter_unpack(page.slots):
            if id_ != ZERO_ID:
                rows[pack].append(row(id_, offset, clen, codec, frames))
        for name, found in zip(page.names, rows, strict=True):
            if found:
                self._live(name, page.step).add(found)

    def _settle_map(self, kind: Kind, id_: bytes, place: Place) -> None:
        if place.pack not in self._census.packs:
            self._moved.add(id_)
        self._settle(kind, id_, place)

    def _settle(self, kind: Kind, id_: bytes, place: Place, row_size: int = RECORD_SIZE) -> None:
        """Mark where an id lives."""
        if place.pack in self._good:
            self._mark(id_, place, row_size)
            return
        packs = self._census.packs
        places = [
            other
            for other in self._census.index.find_all(id_)
            if other.pack in packs and packs[other.pack].key == key_of(kind, other.pack)
        ]
        for other in places:
            if other.pack in self._good:
                self._mark(id_, other, row_size)
                return
        if place.pack in packs:
            places.append(place)
        for other in places:  # none is good: the more, the better
            self._mark(id_, other, row_size)
        if not places:
            self.found.missing_count += 1
            if len(self.found.missing) < MAX_TOLD:
                self.found.missing.append(Missing(*self.where, key_of(kind, place.pack)))

    def _mark(self, id_: bytes, place: Place, row_size: int = RECORD_SIZE) -> None:
        self._live(place.pack, row_size).add((self.row(id_, *place[1:]),))

    def _live(self, name: bytes, row_size: int) -> Live:
        found = self.found.live.get(name)
        if found is None:
            found = self.found.live[name] = Live(row_size)
        return found
