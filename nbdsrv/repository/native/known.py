"""What a repository has already, as one writer sees it.

::

    lease ── condemned/, scrub/ ── packs/ metas/ ── index/ ── directories of packs no segment knows
             shunned               usable           find      what an interrupted writer has left

The last three are looked up when something is asked for first: where nothing has changed since the
parent, nothing is. That is late enough: what is condemned meanwhile was so while our lease was
there, and a collector waits for it.

A pack that was found damaged is shunned as one that is condemned: of most of its chunks the source
still has the content, and what is stored anew mends all the points that share it.
"""

import threading
from collections.abc import Iterable

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.entry import Kind, Place
from nbdsrv.repository.native.index import Index, Segment
from nbdsrv.repository.native.layout import pack_of
from nbdsrv.repository.native.pack import HEADER_SIZE, TRAILER_SIZE, Listed
from nbdsrv.repository.native.scrub import damaged_packs
from nbdsrv.repository.native.tombstones import condemned_packs
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.store import ObjectMissing, Stored

__all__ = ["Known"]


class Known:
    """Content that need not be stored again. Thread-safe; blocking.

    Attributes:
        shunned: names of packs that must not be used, 32 bytes each: condemned, or damaged.
    """

    def __init__(self, vault: Vault) -> None:
        """Finds out what is shunned. The writer's lease must have been taken before.

        Raises:
            StoreError: the store does not answer.
        """
        self._vault = vault
        self.shunned = frozenset(condemned_packs(vault.store) | damaged_packs(vault.store))
        self._lock = threading.RLock()
        self._listed: dict[bytes, Stored] | None = None
        self._usable: set[bytes] = set()
        self._index: Index | None = None

    def usable(self, pack: bytes) -> bool:
        """Is there such a pack, and is it here to stay?"""
        if self._listed is None:
            self._list()
        return pack in self._usable

    def find(self, id_: bytes, kind: Kind = Kind.CHUNK) -> Place | None:
        """Where content of that id and kind lies, in a usable pack."""
        return self._loaded().find(id_, kind)

    def add(self, segment: Segment) -> None:
        """What this writer has stored itself."""
        index = self._loaded()
        self._usable.update(segment.names)
        index.add_segment(segment)

    def _list(self) -> dict[bytes, Stored]:
        with self._lock:
            if self._listed is None:
                listed = {}
                for stored in self._vault.pack_objects():
                    name = pack_of(stored.key)
                    # Shorter than any pack: what a power cut has left of one, most often nothing.
                    whole = stored.size >= HEADER_SIZE + TRAILER_SIZE
                    if name is not None and whole and name not in self.shunned:
                        listed[name] = stored
                self._usable.update(listed)
                self._listed = listed
            return self._listed

    def _loaded(self) -> Index:
        index = self._index
        if index is None:
            with self._lock:
                index = self._index
                if index is None:
                    index = self._index = self._load()
        return index

    def _load(self) -> Index:
        listed = self._list()  # first: a pack that is listed later than the index is not missed
        index = self._vault.index(self._usable)
        for name in listed.keys() - index.packs():
            index.add_pack(name, self._directory(listed[name]))
        return index

    def _directory(self, stored: Stored) -> Iterable[Listed]:
        """What an interrupted writer's pack holds; nothing if it is damaged."""
        try:
            return self._vault.directory(stored)
        except (CorruptImage, ObjectMissing):
            return ()
