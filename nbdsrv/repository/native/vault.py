"""A repository as it lies in its store: opened, its points listed, its maps read. All blocking.

::

    Vault.open(store) ── nbdrepo.json ── keys ──> hashing, sealing
        points()   points/..  ──> PointRecord
        root()     metas/..   ──> Root ── page() ──> Page ── chunk() ──> bytes
        index()    index/.. and what packs say of themselves ──> Index

``NativeRepository`` is this for an event loop.
"""

import errno as os_errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nbdsrv.errors import CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.native.abreast import objects_abreast
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.damage import is_outage
from nbdsrv.repository.native.entries import Entries
from nbdsrv.repository.native.entry import Kind, Place
from nbdsrv.repository.native.hashing import ZERO_ID, Hashing
from nbdsrv.repository.native.index import Index, Segment
from nbdsrv.repository.native.keys import add_slot, unlock
from nbdsrv.repository.native.layout import (
    CONFIG,
    INDEX,
    KEYS,
    METAS,
    PACKS,
    POINTS,
    group_of,
    pack_of,
    point_prefix,
)
from nbdsrv.repository.native.pack import (
    TRAILER_SIZE,
    Listed,
    parse_directory,
    parse_trailer,
)
from nbdsrv.repository.native.point import MAX_POINT, PointRecord, Ref, decode_point
from nbdsrv.repository.native.sealing import KEY_SIZE, BrokenPayload, Sealing
from nbdsrv.repository.native.segments import read_segments
from nbdsrv.repository.native.slots import Page, Root, slot_form
from nbdsrv.store.store import Data, ObjectMissing, Store, Stored, StoreError

__all__ = ["Passphrase", "Vault"]

Passphrase = Callable[[], str]
"""Asked only for a repository that is encrypted. Raises ConfigError if there is none."""

MAX_CONFIG = 1 << 16
RELISTS = 4
"""Times an index is loaded, at most, because segments were replaced meanwhile."""
_DAMAGED = frozenset({os_errno.EIO, os_errno.EFBIG})
"""Of a StoreError about one object: it is short, in a bad sector, or longer than it may be."""

T = TypeVar("T")


class Vault:
    """An open repository. Thread-safe.

    Attributes:
        store: its objects.
        config: what it is.
        repository: its id, 16 bytes.
        sealing: its keys.
        hashing: how it names things.
        entries: its entries.
        name: for messages.
    """

    def __init__(self, store: Store, config: RepositoryConfig, master: bytes | None) -> None:
        """Use ``open`` or ``create``."""
        self.store = store
        self.config = config
        self.name = store.name
        self.repository = config.id.bytes
        self.sealing = Sealing(master)
        self.hashing = Hashing(config.hash, self.sealing.id_key)
        self.entries = Entries(store, self.repository, self.sealing, self.hashing)
        self.entries.elsewhere = self._elsewhere
        self._index: Index | None = None
        self._listed = 0.0
        self._segments: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    @classmethod
    def create(cls, store: Store, config: RepositoryConfig, passphrase: Passphrase) -> "Vault":
        """Make a repository where there is none.

        Raises:
            RepositoryError: there is one.
            StoreError: it cannot be written.
        """
        config.check()
        data = config.encode()
        try:
            store.get(CONFIG, MAX_CONFIG)
        except ObjectMissing:
            pass
        else:
            raise RepositoryError(f"{store.name}: there is a repository already")
        master, slot = None, None
        if config.cipher is not None:
            # The key goes first: a repository that is there can be unlocked.
            master = os.urandom(KEY_SIZE)
            slot = add_slot(store, data, master, passphrase())
        elif next(store.list(KEYS), None) is not None:
            text = f"{store.name}: {KEYS} holds keys that are left of another repository"
            raise RepositoryError(f"{text}; choose another place, or remove them")
        # Some services tell two who create the same object at once that both have: look who has.
        if not store.put_new(CONFIG, data) or store.get(CONFIG, MAX_CONFIG) != data:
            if slot is not None:
                store.delete(f"{KEYS}{slot}.json")
            raise RepositoryError(f"{store.name}: somebody else has just made a repository there")
        return cls(store, config, master)

    @classmethod
    def open(cls, store: Store, passphrase: Passphrase) -> "Vault":
        """Open a repository, for reading or writing.

        Raises:
            RepositoryError: there is none, it is of another version, or cannot be unlocked.
            StoreError: the store does not answer.
        """
        try:
            data = store.get(CONFIG, MAX_CONFIG)
        except ObjectMissing as error:
            text = f"{store.name}: no repository there"
            raise RepositoryError(f"{text}; `nbdsrv init` makes one") from error
        config = RepositoryConfig.parse(data, f"{store.name}/{CONFIG}")
        master = None
        if config.cipher is not None:
            master = unlock(store, data, passphrase())
        elif next(store.list(KEYS), None) is not None:
            # An exchanged configuration must not talk a writer into plain text.
            raise RepositoryError(f"{store.name}: has keys, and {CONFIG} says it is not encrypted")
        return cls(store, config, master)

    @classmethod
    def open_keyless(cls, store: Store) -> "Vault":
        """Without the key of an encrypted repository: for who only hashes objects.

        Raises:
            RepositoryError: there is none, or it is of another version.
            StoreError: the store does not answer.
        """
        try:
            data = store.get(CONFIG, MAX_CONFIG)
        except ObjectMissing as error:
            text = f"{store.name}: no repository there"
            raise RepositoryError(f"{text}; `nbdsrv init` makes one") from error
        return cls(store, RepositoryConfig.parse(data, f"{store.name}/{CONFIG}"), None)

    # --- points --------------------------------------------------------------------------------

    def groups(self) -> list[str]:
        """The names under which points are kept."""
        found = {group_of(stored.key) for stored in self.store.list(POINTS)}
        return sorted(group for group in found if group is not None)

    def point_objects(self, group: str | None = None) -> list[Stored]:
        """The objects of all points, by group and then by time."""
        prefix = POINTS if group is None else point_prefix(group)
        return [stored for stored in self.store.list(prefix) if group_of(stored.key) is not None]

    def point(self, key: str) -> PointRecord:
        """The point in the object of that key.

        Raises:
            CorruptImage: it is damaged.
            ObjectMissing: it has been pruned.
        """
        return self.decoded_point(key, self.point_data(key))

    def point_data(self, key: str) -> bytes:
        """The bytes of that object. Raises as ``point``."""
        try:
            return self.store.get(key, MAX_POINT)
        except StoreError as error:
            # One bad sector must not hide all the other points.
            if error.errno in _DAMAGED:
                blame = "" if is_outage(error, self.store) else "corrupt repository: "
                raise CorruptImage(f"{blame}{error}") from error
            raise

    def decoded_point(self, key: str, data: bytes) -> PointRecord:
        """The point in these bytes. Raises CorruptImage if they are damaged."""
        return decode_point(key, data, self.repository, self.sealing, self.hashing)

    def points(self, group: str | None = None) -> tuple[list[PointRecord], list[CorruptImage]]:
        """All points that can be read, and what is wrong with the others."""
        found: list[PointRecord] = []
        damaged: list[CorruptImage] = []
        for _, each in self.read_points(self.point_objects(group)):
            if isinstance(each, PointRecord):
                found.append(each)
            elif isinstance(each, CorruptImage):
                damaged.append(each)
            else:
                raise each
        return found, damaged

    def read_points(
        self, objects: Iterable[Stored]
    ) -> Iterator[tuple[Stored, PointRecord | DiskError]]:
        """The points in these objects, in their order, or why one cannot be read.

        Those that have been pruned meanwhile are left out. Of a distant store many are read at a
        time.
        """
        found = objects_abreast(self.store, lambda stored: self.point(stored.key), objects)
        for stored, each in found:
            if not isinstance(each, ObjectMissing):
                yield stored, each

    # --- maps and chunks -----------------------------------------------------------------------

    def root(self, ref: Ref) -> Root:
        """The map of a disk.

        Raises:
            CorruptImage: it is damaged.
        """
        return self._parsed(Kind.ROOT, bytes.fromhex(ref.id), ref.place, Root.parse)

    def page(self, root: Root, number: int) -> Page:
        """One page of a map; a page of zeroes is made up.

        Raises:
            CorruptImage: it is damaged.
        """
        count = root.slots_of(number)
        id_ = root.pages.id(number)
        if id_ == ZERO_ID:
            form = slot_form(root.chunk_size)
            return Page((), bytes(form.size * count), form)
        place = root.pages.place(number)
        chunk_size = root.chunk_size
        return self._parsed(Kind.PAGE, id_, place, lambda data: Page.parse(data, count, chunk_size))

    def chunk(self, id_: bytes, place: Place, length: int) -> Data:
        """The content of a chunk of ``length`` bytes.

        Raises:
            CorruptImage: it is damaged, and no other pack has it.
        """
        content = self.entries.read(Kind.CHUNK, id_, place)
        if len(content) != length:
            raise CorruptImage(f"corrupt repository: {self.name}: a chunk of another length")
        return content

    def _parsed(self, kind: Kind, id_: bytes, place: Place, parse: Callable[[Data], T]) -> T:
        content = self.entries.read(kind, id_, place)
        try:
            return parse(content)
        except BrokenPayload as error:
            text = f"corrupt repository: {self.name}: {kind.name.lower()} {id_.hex()}: {error}"
            raise CorruptImage(text) from error

    # --- packs and the index -------------------------------------------------------------------

    def pack_objects(self) -> Iterator[Stored]:
        """The objects of all packs and meta packs."""
        for prefix in (PACKS, METAS):
            for stored in self.store.list(prefix):
                if pack_of(stored.key) is not None:
                    yield stored

    def directory(self, stored: Stored) -> list[Listed]:
        """What a pack says of itself.

        Raises:
            CorruptImage: that is damaged; ``pack.scan`` finds what is left.
            ObjectMissing: it has been deleted.
        """
        try:
            if stored.size < TRAILER_SIZE:
                raise BrokenPayload("it is too short for a pack")
            end = self.store.get_range(stored.key, stored.size - TRAILER_SIZE, TRAILER_SIZE)
            offset, length = parse_trailer(end, stored.size)
            data = self.store.get_range(stored.key, offset, length + TRAILER_SIZE)
            return parse_directory(data, offset)
        except BrokenPayload as error:
            raise CorruptImage(f"corrupt repository: {stored.key}: {error}") from error
        except StoreError as error:
            if error.errno in _DAMAGED:
                raise CorruptImage(f"corrupt repository: {error}") from error
            raise

    def index(self, usable: set[bytes] | None = None) -> Index:
        """All segments of the index. Damaged ones are left out: an index is a cache.

        Args:
            usable: the packs whose records are wanted, by who reads the others' directories. None:
                all, for who asks the index alone.

        Raises:
            StoreError: the store does not answer.
        """
        for _ in range(RELISTS):
            index, complete = self._load_index(usable)
            if complete:
                break
        return index

    def _load_index(self, usable: set[bytes] | None) -> tuple[Index, bool]:
        """False: a collector has put one segment in the place of some while they were loaded."""
        index, complete = Index(usable), True
        for _, found in read_segments(self.store, self.repository, self.hashing):
            if isinstance(found, Segment):
                index.add_segment(found)
            elif isinstance(found, ObjectMissing):
                complete = False
            elif not isinstance(found, CorruptImage):
                # A reader would take for lost, until the index changes, what an outage hid. A
                # writer learns it from the packs that no segment knows then.
                outage = usable is None and is_outage(found, self.store)
                if found.errno not in _DAMAGED or outage:
                    raise found
        return index, complete

    def _elsewhere(self, id_: bytes) -> Iterator[Place]:
        """Where else the content of an id lies; the index is loaded for who needs it first.

        A server runs for weeks while packs are repacked. A pack goes only once the index says
        where its content is now, so an index that was listed after the content was missed is
        right; one that was listed before, however lately, may lead to what has just gone.

        Raises:
            StoreError: the index cannot be listed or read.
        """
        tried: Index | None = None
        for _ in range(RELISTS):
            missed = time.monotonic()
            with self._lock:
                index = self._index_after(tried, missed)
            if index is tried:
                return
            tried = index
            yield from index.find_all(id_)

    def _index_after(self, tried: Index | None, missed: float) -> Index:
        """A later one than was tried, if there is one. With the lock.

        Whoever waited for the lock while another listed the index has that one's answer.
        """
        index = self._index
        if index is not None and (index is not tried or self._listed >= missed):
            return index
        listed = time.monotonic()
        names = frozenset(stored.key for stored in self.store.list(INDEX))
        if index is None or names != self._segments:
            index, self._segments = self.index(), names
            self._index = index
        self._listed = listed
        return index

    def close(self) -> None:
        """Close the store."""
        self.store.close()
