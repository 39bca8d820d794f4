"""A repository as it lies in its store: opened, its points listed, its maps read. All blocking.

::

    Vault.open(store) ── nbdrepo.json ── keys ──> hashing, sealing
        points()   points/..  ──> PointRecord
        root()     metas/..   ──> Root ── page() ──> Page ── chunk() ──> bytes
        index()    index/.. and what packs say of themselves ──> Index

``NativeRepository`` is this for an event loop.
"""

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from nbdsrv.errors import CorruptImage, RepositoryError
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.entries import Entries
from nbdsrv.repository.native.entry import Kind, Place
from nbdsrv.repository.native.hashing import ZERO_ID, Hashing
from nbdsrv.repository.native.index import MAX_SEGMENT, Index, Segment
from nbdsrv.repository.native.keys import create_master, unlock
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
from nbdsrv.repository.native.sealing import BrokenPayload, Sealing
from nbdsrv.repository.native.slots import SLOT_SIZE, Page, Root
from nbdsrv.store.store import Data, ObjectMissing, Store, Stored, StoreError

__all__ = ["Passphrase", "Vault"]

Passphrase = Callable[[], str]
"""Asked only for a repository that is encrypted. Raises ConfigError if there is none."""

MAX_CONFIG = 1 << 16

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
        master = None
        if config.cipher is not None:
            # The key goes first: a repository that is there can be unlocked.
            master = create_master(store, data, passphrase())
        if not store.put_new(CONFIG, data):
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
        data = self.store.get(key, MAX_POINT)
        return decode_point(key, data, self.repository, self.sealing, self.hashing)

    def points(self, group: str | None = None) -> tuple[list[PointRecord], list[CorruptImage]]:
        """All points that can be read, and what is wrong with the others."""
        found: list[PointRecord] = []
        damaged: list[CorruptImage] = []
        for stored in self.point_objects(group):
            try:
                found.append(self.point(stored.key))
            except ObjectMissing:
                continue  # pruned meanwhile
            except CorruptImage as error:
                damaged.append(error)
        return found, damaged

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
            return Page((), bytes(SLOT_SIZE * count))
        place = root.pages.place(number)
        return self._parsed(Kind.PAGE, id_, place, lambda data: Page.parse(data, count))

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

    def index(self, usable: set[bytes] | None = None) -> Index:
        """All segments of the index. Damaged ones are left out: an index is a cache."""
        index = Index(usable)
        for stored in self.store.list(INDEX):
            if not stored.key.endswith(".ix"):
                continue
            try:
                data = self.store.get(stored.key, MAX_SEGMENT)
                segment = Segment.parse(stored.key, data, self.repository, self.hashing)
            except (ObjectMissing, CorruptImage):
                continue
            index.add_segment(segment)
        return index

    def _elsewhere(self, id_: bytes) -> Iterator[Place]:
        """Where else the content of an id lies; the index is loaded for who needs it first."""
        with self._lock:
            if self._index is None:
                try:
                    self._index = self.index()
                except StoreError:
                    return iter(())
            index = self._index
        return index.find_all(id_)

    def close(self) -> None:
        """Close the store."""
        self.store.close()
