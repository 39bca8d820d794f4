"""Reading entries: fetched, decrypted, unpacked, proven; and found elsewhere where that fails.

::

    place ── store.get_range ── open_entry ──> content
                │  missing, changed, EIO
                └── the index: other packs that have it ──> content, or CorruptImage

A place in a map is a hint. A pack that was repacked, or damaged, may have left the same content in
another, and only if no pack has it is it lost. A pack that is short or has a bad sector (EIO) is
damaged like any other; a store that does not answer is not.
"""

import errno as os_errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.native.entry import (
    ENTRY_SIZE,
    MAX_CONTENT,
    Kind,
    Place,
    open_entry,
)
from nbdsrv.repository.native.frames import expand_frames, frame_span, is_raw, open_frame
from nbdsrv.repository.native.hashing import Hashing
from nbdsrv.repository.native.layout import meta_key, pack_key
from nbdsrv.repository.native.pack import HEADER_SIZE, MAX_PACK, parse_header
from nbdsrv.repository.native.sealing import TAG_SIZE, BrokenPayload, Seal, Sealing
from nbdsrv.store.store import Data, ObjectMissing, Store, StoreError

__all__ = ["Entries", "key_of"]

MAX_SEALS = 1 << 14
"""Packs whose keys are kept; half a TiB of them."""


def key_of(kind: int, pack: bytes) -> str:
    """The object an entry of that kind lies in."""
    return pack_key(pack) if kind == Kind.CHUNK else meta_key(pack)


class Entries:
    """The entries of one repository. Thread-safe; everything blocks.

    Attributes:
        elsewhere: id to all places where it may lie; asked when the first place fails. Its
            StoreErrors are those of ``read``.
        on_damage: told of each entry that was not what it must be, once it is found out. A pack
            that is gone is damage only if what was in it is nowhere else: repacking moves things.
    """

    def __init__(self, store: Store, repository: bytes, sealing: Sealing, hashing: Hashing) -> None:
        self._store = store
        self._repository = repository
        self._sealing = sealing
        self._hashing = hashing
        self._plain = sealing.seal(b"") if sealing.id_key is None else None
        self._seals: OrderedDict[str, Seal] = OrderedDict()
        self._lock = threading.Lock()
        self.elsewhere: Callable[[bytes], Iterator[Place]] = lambda _: iter(())
        self.on_damage: Callable[[DiskError], None] = lambda _: None

    def read(self, kind: Kind, id_: bytes, place: Place) -> Data:
        """The content of that id.

        Raises:
            CorruptImage: no pack has it any more; names the object and the offset.
            StoreError: the store does not answer, be it only when asked where else it lies.
        """
        try:
            return self.read_there(kind, id_, place)
        except DiskError as error:
            if not _is_local(error):
                raise
            if not isinstance(error, ObjectMissing):
                self.on_damage(error)
            for other in self.elsewhere(id_):
                if other[:2] == place[:2]:
                    continue
                try:
                    return self.read_there(kind, id_, other)
                except DiskError as again:
                    if not _is_local(again):
                        raise
            if not isinstance(error, ObjectMissing):
                raise
            text = f"corrupt repository: {key_of(kind, place.pack)} is missing"
            lost = CorruptImage(f"{text}; `nbdsrv verify` tells what it hurts")
            self.on_damage(lost)
            raise lost from error

    def read_there(self, kind: Kind, id_: bytes, place: Place) -> Data:
        """The content of that id from that very place.

        Raises:
            CorruptImage: it is not there.
            ObjectMissing: nor is the pack.
            StoreError: the store does not answer.
        """
        with self._opening(kind, place) as (seal, data):
            return open_entry(seal, self._hashing, place.offset, id_, kind, data)

    def frame_there(self, id_: bytes, place: Place, length: int, number: int) -> bytes:
        """One frame of a chunk of ``length`` bytes, from that very place; one read.

        Raises:
            BrokenPayload: the place's lengths cannot be.
            as ``read_there``.
        """
        span = frame_span(place.frames, length, number)
        with self._opening(Kind.CHUNK, place, span) as (seal, piece):
            raw = is_raw(place.frames, number)
            return open_frame(seal, place.offset, id_, length, number, piece, raw=raw)

    def chunk_there(self, id_: bytes, place: Place, length: int) -> bytes:
        """A chunk of ``length`` bytes, each of its frames proven, from that very place.

        Raises:
            as ``read_there``.
        """
        with self._opening(Kind.CHUNK, place, (0, place.length)) as (seal, payload):
            return expand_frames(place.frames, payload, seal, place.offset, id_, length)

    @contextmanager
    def _opening(
        self, kind: Kind, place: Place, span: tuple[int, int] | None = None
    ) -> Iterator[tuple[Seal, Data]]:
        """The key for an entry and its bytes; what is broken about it is told with its place.

        ``span``: (position, length) in the payload; None for all, the header included.
        """
        key = key_of(kind, place.pack)
        if not (
            HEADER_SIZE <= place.offset < MAX_PACK and 0 <= place.length <= MAX_CONTENT + TAG_SIZE
        ):
            # From a record of an index, say: nothing is allocated for it.
            text = f"corrupt repository: {key} at {place.offset}: no entry can be there"
            raise CorruptImage(text)
        start, size = place.offset, ENTRY_SIZE + place.length
        if span is not None:
            start, size = start + ENTRY_SIZE + span[0], span[1]
        data = self._store.get_range(key, start, size)
        try:
            yield self._plain or self._seal(key), data
        except BrokenPayload as error:
            with self._lock:
                # What failed may be the salt: the next read looks at the pack's header again.
                self._seals.pop(key, None)
            self._store.doubt(key)  # or it broke on its way here
            text = f"corrupt repository: {key} at {place.offset}: {error}"
            raise CorruptImage(text) from error

    def seal_of(self, pack: bytes) -> Seal:
        """The key of a pack of chunks; read from its header the first time.

        Raises:
            BrokenPayload: that is damaged.
            StoreError: the store does not answer.
        """
        return self._plain or self._seal(pack_key(pack))

    def _seal(self, key: str) -> Seal:
        found = self._seals.get(key)
        if found is not None:
            return found
        header = parse_header(self._store.get_range(key, 0, HEADER_SIZE), self._repository)
        seal = self._sealing.seal(header.salt)
        with self._lock:
            self._seals[key] = seal
            while len(self._seals) > MAX_SEALS:
                self._seals.popitem(last=False)
        return seal


def _is_local(error: DiskError) -> bool:
    """Is it about this one pack, so that another may be asked?"""
    if isinstance(error, StoreError):
        return isinstance(error, ObjectMissing) or error.errno == os_errno.EIO
    return isinstance(error, CorruptImage)
