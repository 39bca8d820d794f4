"""Repositories for tests, put together from their parts: no writer, no clock, no threads.

::

    build = Building.fresh()                        a plain repository in memory
    first = build.point("vm", {"sda": b"..."})      PointRecord; content it has is not stored again
    disk = await open_disk(build, workers, first, "sda")
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.disk import PointDisk
from nbdsrv.repository.native.entry import Body, Kind, Place
from nbdsrv.repository.native.frames import encode_frames
from nbdsrv.repository.native.hashing import ZERO_ID
from nbdsrv.repository.native.index import encode_segment
from nbdsrv.repository.native.layout import (
    index_key,
    meta_key,
    new_ulid,
    pack_key,
    point_key,
    ulid_time,
)
from nbdsrv.repository.native.listing import described
from nbdsrv.repository.native.pack import Pack, PackKind
from nbdsrv.repository.native.point import DiskRecord, PointRecord, Ref, encode_point
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.repository.native.sealing import Codec, compress
from nbdsrv.repository.native.slots import SLOT, Page, Root, encode_page, slot_form
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store

__all__ = ["CHUNK", "PAGE_SLOTS", "Building", "open_disk"]

CHUNK = 64 << 10
PAGE_SLOTS = 16


@dataclass
class Building:
    """A repository, and what is in it so far.

    Attributes:
        vault: open.
        places: of everything stored, by id.
        pack_bytes: after which a pack is closed.
        level: of compression.
    """

    vault: Vault
    places: dict[bytes, Place] = field(default_factory=dict)
    pack_bytes: int = 1 << 20
    level: int = 1

    @classmethod
    def fresh(
        cls,
        store: Store | None = None,
        *,
        passphrase: str | None = None,
        chunk: int = CHUNK,
        page_slots: int = PAGE_SLOTS,
        **config: Any,
    ) -> "Building":
        """A repository without points."""
        cipher = "aes-256-gcm" if passphrase else None
        shape = RepositoryConfig(chunk_size=chunk, page_slots=page_slots, cipher=cipher, **config)
        return cls(Vault.create(store or MemoryStore(), shape, lambda: passphrase or ""))

    def point(self, group: str, disks: Mapping[str, bytes], **fields: Any) -> PointRecord:
        """Store a point; ``fields`` are the record's."""
        id_ = fields.pop("id", None) or new_ulid()
        fields.setdefault("created", ulid_time(id_))
        records = [self.disk(name, content) for name, content in disks.items()]
        record = PointRecord(id=id_, group=group, disks=records, **fields)
        vault = self.vault
        data = encode_point(record, vault.repository, vault.sealing, vault.hashing)
        assert vault.store.put_new(point_key(group, id_), data)
        return record

    def disk(self, name: str, content: bytes) -> DiskRecord:
        """Store chunks and map of a disk, but no point that refers to it."""
        shape, before = self.vault.config, len(self.places)
        step = shape.chunk_size
        chunks = [content[at : at + step] for at in range(0, len(content), step)]
        new: list[tuple[bytes, Place, int]] = []
        ids = self._store(Kind.CHUNK, chunks, new)
        pages = [ids[at : at + shape.page_slots] for at in range(0, len(ids), shape.page_slots)]
        form = slot_form(step)
        encoded = [
            encode_page(*self._slots(page, form), form) if any_data(page) else b"" for page in pages
        ]
        page_ids = self._store(Kind.PAGE, encoded, new)
        contents = b"".join(
            Page((), b"".join(SLOT.pack(each, 0, 0, 0, 0, b"") for each in page), SLOT).content(
                self.vault.hashing
            )
            for page in pages
        )
        pages_ = Page(*self._slots(page_ids, SLOT), SLOT)
        root = Root(len(content), step, shape.page_slots, pages_, contents)
        (root_id,) = self._store(Kind.ROOT, [root.encode()], new)
        vault = self.vault
        if new:
            data = encode_segment(new, vault.repository, vault.hashing)
            vault.store.put_new(index_key(new_ulid()), data)
        return DiskRecord(
            name=name,
            size=len(content),
            root=Ref.of(root_id, self.places[root_id]),
            image_id=root.image_id(vault.hashing).hex(),
            new_bytes=sum(place.length for _, place, _ in new),
            unchanged_bytes=before and step,
        )

    def _store(
        self, kind: Kind, contents: list[bytes], new: list[tuple[bytes, Place, int]]
    ) -> list[bytes]:
        """Ids of these contents, each stored if it is not yet."""
        vault, key = self.vault, pack_key if kind is Kind.CHUNK else meta_key
        ids = [vault.hashing.id_of(each) if any(each) else ZERO_ID for each in contents]
        pack_kind = PackKind.CHUNKS if kind is Kind.CHUNK else PackKind.METAS
        pack = None
        for index, (id_, content) in enumerate(zip(ids, contents, strict=True)):
            if id_ != ZERO_ID and id_ not in self.places:
                pack = pack or Pack(pack_kind, vault.repository, vault.sealing, vault.hashing)
                if kind == Kind.CHUNK:
                    codec = Codec.FRAMES
                    body: Body = encode_frames(memoryview(content), id_, self.level)
                else:
                    codec, body = compress(content, self.level)
                row = pack.add(kind, codec, len(content), id_, body)
                self.places[id_] = row.place(b"")
            full = pack is not None and pack.size >= self.pack_bytes
            if pack is not None and (full or index == len(ids) - 1):
                data = pack.finish()
                assert vault.store.put_new(key(pack.name), data)
                for row in pack.listed:
                    place = self.places[row.id] = row.place(pack.name)
                    new.append((row.id, place, row.kind))
                pack = None
        return ids

    def _slots(self, ids: list[bytes], form: struct.Struct) -> tuple[list[bytes], bytes]:
        """Names of packs, and slots that lie in them."""
        names: dict[bytes, int] = {}
        slots = []
        for id_ in ids:
            if id_ == ZERO_ID:
                slots.append(bytes(form.size))
                continue
            pack, *place = self.places[id_]
            slots.append(form.pack(id_, names.setdefault(pack, len(names)), *place))
        return list(names), b"".join(slots)


def any_data(ids: list[bytes]) -> bool:
    """Is one of them more than zeroes?"""
    return any(id_ != ZERO_ID for id_ in ids)


async def open_disk(build: Building, workers: Workers, record: PointRecord, name: str) -> PointDisk:
    """A disk of a point, through a repository that is closed with it."""
    repository = NativeRepository(build.vault, workers)
    try:
        disk = await repository.open_disk(described(record), name)
    finally:
        await repository.close()
    assert isinstance(disk, PointDisk)
    return disk
