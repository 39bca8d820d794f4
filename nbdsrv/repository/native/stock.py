"""What one point stores: each content once, in packs that go up two at a time.

::

    id ── ours? ── the repository's? ── no ──> add ──> open pack ── full ──> put   (two at a time)
            └───────────┴── slot                                      └──> rows of the index

Memory: the open pack and two that are put, one more for each further disk that is written at the
same time; and about half a KiB for each of the last ``index.SMALL`` chunks, 48 bytes for those
before. That few packs are without a name bounds everything else that must wait for one.
"""

import asyncio
import threading
from collections.abc import Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.repository.native.entry import Body, Kind
from nbdsrv.repository.native.index import SMALL, Segment, encode_segment
from nbdsrv.repository.native.known import Known
from nbdsrv.repository.native.layout import index_key, new_ulid
from nbdsrv.repository.native.pack import Listed, PackKind
from nbdsrv.repository.native.pack_writer import Filled, PackWriter
from nbdsrv.repository.native.sealing import Codec
from nbdsrv.repository.native.slots import slot_form
from nbdsrv.repository.native.vault import Vault

__all__ = ["MAX_LEVEL", "Stock", "storing_level"]

UPLOADS = 2
"""Packs that are put at a time: one is hashed while the other is written, or two on their way."""
META_TARGET = 16 << 20
"""Bytes of a meta pack: the pages of 80 GiB. It is kept twice in memory until it is put."""


class Stock:
    """Everything that is stored for one point.

    Attributes:
        lock: for ``chunks``, ``metas`` and the maps of the disks; held by threads, briefly.
        known: what the repository had before.
        chunks: packs of chunks.
        metas: packs of pages and roots.
        level: of compression.
        failure: why this point can no longer be committed, or None.
    """

    def __init__(self, vault: Vault, workers: Workers, known: Known, level: int) -> None:
        self.vault = vault
        self.workers = workers
        self.known = known
        self.level = level
        self.lock = threading.Lock()
        self._form = slot_form(vault.config.chunk_size)
        target = vault.config.pack_target
        self.chunks = PackWriter(vault, PackKind.CHUNKS, target)
        self.metas = PackWriter(vault, PackKind.METAS, min(target, META_TARGET))
        self.failure: BaseException | None = None
        self._waiting = 0
        self._fewer = asyncio.Condition()
        self._own: dict[bytes, bytes] = {}
        self._rows: list[tuple[bytes, list[Listed]]] = []
        self._count = 0

    def check(self) -> None:
        """Raises RepositoryError if something could not be stored before."""
        if self.failure is not None:
            text = f"{self.vault.name}: nothing is committed after an error"
            raise RepositoryError(f"{text} ({self.failure})") from self.failure

    def find(self, id_: bytes) -> bool:
        """Is that content stored, or about to be? Without the lock."""
        return id_ in self._own or self.known.find(id_) is not None

    def slot(self, id_: bytes) -> bytes | None:
        """A slot for content that is stored. With the lock."""
        own = self._own.get(id_)
        if own is not None:
            return own
        place = self.known.find(id_)
        if place is None:
            return None
        return self._form.pack(id_, self.chunks.number(place.pack), *place[1:])

    def add(self, id_: bytes, codec: Codec, ulen: int, body: Body) -> bytes:
        """Store a chunk; its slot. With the lock."""
        number, row = self.chunks.add(Kind.CHUNK, codec, ulen, id_, body)
        slot = self._form.pack(id_, number, *row.place(b"")[1:])
        self._own[id_] = slot
        return slot

    async def room(self) -> None:
        """Wait until a pack may become full: until few enough are being put."""
        async with self._fewer:
            await self._fewer.wait_for(lambda: self._waiting < UPLOADS or self.failure is not None)
        self.check()

    def full(self) -> list[tuple[PackWriter, Filled]]:
        """Packs that are full, to be put at once. With the lock."""
        found = ((packs, packs.full()) for packs in (self.chunks, self.metas))
        filled = [(packs, pack) for packs, pack in found if pack is not None]
        self._waiting += len(filled)
        return filled

    async def put(self, full: Sequence[tuple[PackWriter, Filled]]) -> None:
        """Put what ``full`` gave.

        Raises:
            DiskError: it is not stored, and the point is lost.
        """
        try:
            for packs, filled in full:
                self.check()
                await self.workers.run(self._put, packs, filled)
        except BaseException as error:
            self.failure = self.failure or error
            raise
        finally:
            with self.lock:
                self._waiting -= len(full)
            if full:
                async with self._fewer:
                    self._fewer.notify_all()

    async def put_rest(self, packs: PackWriter) -> None:
        """Put what is left in the open pack."""
        with self.lock:
            filled = packs.rest()
            self._waiting += filled is not None
        if filled is not None:
            await self.put([(packs, filled)])

    async def put_index(self) -> None:
        """Put a segment of the index for what none has yet."""
        await self.workers.run(self._put_rows, 0)

    def _put(self, packs: PackWriter, filled: Filled) -> None:
        packs.put(filled)
        with self.lock:
            packs.put_packs += 1
            self._rows.append((filled.pack.name, filled.pack.listed))
            self._count += len(filled.pack.listed)
        self._put_rows(SMALL)

    def _put_rows(self, limit: int) -> None:
        """Put a segment if there are more rows than ``limit``."""
        with self.lock:
            if self._count <= limit:
                return
            rows, self._rows = self._rows, []
            self._count = 0
        vault = self.vault
        triples = [(row.id, row.place(name), row.kind) for name, rows_ in rows for row in rows_]
        key = index_key(new_ulid())
        data = encode_segment(triples, vault.repository, vault.hashing)
        vault.store.put_new(key, data)
        if limit:  # there is more to come, and it may be the same again
            self.known.add(Segment.parse(key, data, vault.repository, vault.hashing))
            with self.lock:
                for id_, _, _ in triples:
                    self._own.pop(id_, None)


def storing_level(level: int) -> int:
    """A level of compression: 0 is none.

    Raises:
        ConfigError: zstd has no such level.
    """
    if not 0 <= level <= MAX_LEVEL:
        raise ConfigError(f"zstd levels are 0 (none) to {MAX_LEVEL}, not {level}")
    return level


MAX_LEVEL = 19
"""Higher ones take more memory than a backup may."""
