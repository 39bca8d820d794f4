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
from nbdsrv.repository.native.abreast import abreast, threads_for
from nbdsrv.repository.native.census import THREADS, Census
from nbdsrv.repository.native.damage import damage_of, is_outage
from nbdsrv.repository.native.entries import key_of
from nbdsrv.repository.native.entry import ENTRY_SIZE, Kind, Place
from nbdsrv.repository.native.hashing import ZERO_ID
from nbdsrv.repository.native.pack import HEADER_SIZE, RECORD_SIZE, TRAILER_SIZE
from nbdsrv.repository.native.point import DiskRecord, PointRecord, Ref
from nbdsrv.repository.native.slots import SLOT, Page, Root
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, Stored, StoreError

__all__ = ["Live", "Mapped", "Mark", "Marker", "Missing", "mark"]

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
    with ThreadPoolExecutor(threads_for(vault.store, THREADS), "nbdsrv-mark") as threads:
        marker = Marker(vault, census, shunned, threads)
        marker.walk(objects)
    return marker.found


class Mapped(NamedTuple):
    """A disk of a point, whose map is walked.

    Attributes:
        key: of the point's object.
        point: ``group/ulid``.
        disk: what the point says of it.
        fresh: is its root none that was walked before?
    """

    key: str
    point: str
    disk: DiskRecord
    fresh: bool


class PageOf(NamedTuple):
    """A page of a map that is to be read; no number: the end of that map."""

    mapped: Mapped
    root: Root | None
    number: int | None

    @property
    def bytes(self) -> int:
        """What it keeps in memory until its turn comes, about."""
        if self.number is None or self.root is None:
            return self.mapped.disk.root.length
        return self.root.page_slots * SLOT.size


class Marker:
    """The walk through all maps. Who verifies them looks closer: see ``verify_maps``.

    ::

        points ── disks ── roots ── pages ── slots       each read ahead of what comes behind it,
                                                         and looked at in the order of the points

    Attributes:
        found: so far.
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
        self.found = Mark()

    def walk(self, objects: Iterable[Stored]) -> None:
        """All that these points refer to. Count the packs again after listing the points."""
        self._good = frozenset(self._census.packs.keys() - self._shunned)
        wanted = self._wanted(objects)
        with self._looking_everywhere():
            for each, page in abreast(self._threads, self._read, wanted, lambda each: each.bytes):
                if isinstance(page, DiskError):
                    self._lose(page)
                elif page is not None:
                    self._slots(each.mapped, page)
                if each.number is None:
                    self.walked(each.mapped, each.root)
        self.settle_doubtful()

    def _wanted(self, objects: Iterable[Stored]) -> Iterator[PageOf]:
        """The pages of these points that no page before them was, map by map."""
        afar = self._threads if self._vault.store.distant else None
        disks = self._mapped(objects)
        for mapped, root in abreast(afar, self._root_of, disks, lambda each: each.disk.root.length):
            if isinstance(root, DiskError):
                self._lose(root)
                continue
            if root is not None:
                for number, id_, place in root.pages.places():
                    self._settle_map(mapped, Kind.PAGE, id_, place)
                    if id_ not in self._pages:
                        self._pages.add(id_)
                        yield PageOf(mapped, root, number)
            yield PageOf(mapped, root, None)

    def _mapped(self, objects: Iterable[Stored]) -> Iterator[Mapped]:
        """The disks of these points."""
        afar = self._threads if self._vault.store.distant else None
        for stored, record in abreast(afar, self._point, objects, lambda stored: stored.size):
            if isinstance(record, ObjectMissing):
                continue  # pruned meanwhile
            if isinstance(record, DiskError):
                self.lost_point(stored.key, record)
                continue
            for disk in self.disks_of(record):
                fresh = disk.root.id not in self._roots
                self._roots.add(disk.root.id)
                mapped = Mapped(stored.key, f"{record.group}/{record.id}", disk, fresh)
                self._settle_map(mapped, Kind.ROOT, bytes.fromhex(disk.root.id), disk.root.place)
                yield mapped

    def _point(self, stored: Stored) -> PointRecord | DiskError:
        try:
            return self.point(stored.key)
        except DiskError as error:
            return error

    def _root_of(self, mapped: Mapped) -> Root | DiskError | None:
        return self.root(mapped.disk.root) if mapped.fresh else None

    def _read(self, each: PageOf) -> Page | DiskError | None:
        if each.number is None or each.root is None:
            return None
        return self.page(each.root, each.number)

    def _lose(self, error: DiskError) -> None:
        """A root or page that cannot be read."""
        if isinstance(error, CorruptImage):
            self.found.damage.append(error)

    # --- what who verifies does otherwise --------------------------------------------------------

    def point(self, key: str) -> PointRecord:
        """The point in that object; called by many threads, as ``root`` and ``page``."""
        return self._vault.point(key)

    def lost_point(self, key: str, error: DiskError) -> None:
        """A point cannot be read.

        Raises:
            DiskError: that may be the store's fault.
        """
        if not isinstance(error, CorruptImage):
            raise error
        if isinstance(error.__cause__, StoreError) and is_outage(error, self._vault.store):
            raise error.__cause__ from error
        self.found.damage.append(error)

    def disks_of(self, record: PointRecord) -> Iterable[DiskRecord]:
        """The disks of a point whose maps are to be walked."""
        self.found.points += 1
        return record.disks

    def walked(self, mapped: Mapped, root: Root | None) -> None:
        """All pages of a disk's map have been seen; ``root`` where it is fresh."""

    def root(self, ref: Ref) -> Root | DiskError:
        """The map of a disk, or why it cannot be read."""
        try:
            return self._vault.root(ref)
        except DiskError as error:
            return self._damage(error, ref.place)

    def page(self, root: Root, number: int) -> Page | DiskError:
        """A page of it, likewise."""
        try:
            return self._vault.page(root, number)
        except DiskError as error:
            return self._damage(error, root.pages.place(number))

    # --- marking ---------------------------------------------------------------------------------

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

    def _damage(self, error: DiskError, place: Place) -> DiskError:
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

    def _slots(self, mapped: Mapped, page: Page) -> None:
        if not self._good.issuperset(page.names):
            for _, id_, place in page.places():
                self._settle(mapped, Kind.CHUNK, id_, place, page.step)
            return
        rows: list[list[int]] = [[] for _ in page.names]
        row = self.row
        for id_, pack, offset, clen, codec, frames in page.form.iter_unpack(page.slots):
            if id_ != ZERO_ID:
                rows[pack].append(row(id_, offset, clen, codec, frames))
        for name, found in zip(page.names, rows, strict=True):
            if found:
                self._live(name, page.step).add(found)

    def _settle_map(self, mapped: Mapped, kind: Kind, id_: bytes, place: Place) -> None:
        if place.pack not in self._census.packs:
            self._moved.add(id_)
        self._settle(mapped, kind, id_, place)

    def _settle(
        self, mapped: Mapped, kind: Kind, id_: bytes, place: Place, row_size: int = RECORD_SIZE
    ) -> None:
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
                key = key_of(kind, place.pack)
                self.found.missing.append(Missing(mapped.point, mapped.disk.name, key))

    def _mark(self, id_: bytes, place: Place, row_size: int = RECORD_SIZE) -> None:
        self._live(place.pack, row_size).add((self.row(id_, *place[1:]),))

    def _live(self, name: bytes, row_size: int) -> Live:
        found = self.found.live.get(name)
        if found is None:
            found = self.found.live[name] = Live(row_size)
        return found
