"""Repositories made by hand, of the core's own parts: what the writer does, slowly and in order.

Chunks that the repository has are not stored again; everything of one call goes into one pack and
one meta pack.
"""

import struct
from collections.abc import Mapping
from uuid import UUID

from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.entry import Body, Kind, Place
from nbdsrv.repository.native.frames import encode_frames
from nbdsrv.repository.native.hashing import ID_SIZE, ZERO_ID
from nbdsrv.repository.native.index import encode_segment
from nbdsrv.repository.native.layout import index_key, meta_key, new_ulid, pack_key, point_key
from nbdsrv.repository.native.pack import Pack, PackKind
from nbdsrv.repository.native.point import DiskRecord, PointRecord, Ref, encode_point
from nbdsrv.repository.native.sealing import CIPHER, DEFAULT_LEVEL, Codec, compress
from nbdsrv.repository.native.slots import SLOT, Page, Root, encode_page, slot_form
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store

CHUNK = 64 << 10
SLOTS = 16
PASSPHRASE = "correct horse battery staple"


def config(*, encrypted: bool = False, hash_: str = "blake3") -> RepositoryConfig:
    """The smallest chunks and pages there can be."""
    cipher = CIPHER if encrypted else None
    return RepositoryConfig(hash=hash_, cipher=cipher, chunk_size=CHUNK, page_slots=SLOTS)


def made(store: Store | None = None, *, encrypted: bool = False, hash_: str = "blake3") -> Vault:
    """A new, empty repository."""
    settings = config(encrypted=encrypted, hash_=hash_)
    return remembered(Vault.create(store or MemoryStore(), settings, lambda: PASSPHRASE))


_masters: dict[UUID, bytes | None] = {}


def remembered(vault: Vault) -> Vault:
    """What ``reopened`` opens without deriving a key from a passphrase, which takes its time."""
    _masters[vault.config.id] = vault.sealing._master
    return vault


def reopened(store: Store) -> Vault:
    """As another process would open it."""
    settings = RepositoryConfig.parse(store.get("nbdrepo.json"), "nbdrepo.json")
    return Vault(store, settings, _masters[settings.id])


def content(*chunks: int, tail: int = 0) -> bytes:
    """A disk: a chunk of each number's own bytes, 0 for zeroes, and the beginning of another."""
    whole = b"".join(_chunk(number) for number in chunks)
    return whole + _chunk(7)[:tail]


def _chunk(number: int) -> bytes:
    return (
        b"".join(bytes([number, at & 255, at >> 8]) * 4 for at in range(CHUNK // 12 + 1))[:CHUNK]
        if number
        else bytes(CHUNK)
    )


class _Filling:
    """The two packs of one call."""

    def __init__(self, vault: Vault) -> None:
        make = (vault.repository, vault.sealing, vault.hashing)
        self.vault = vault
        self.known = vault.index()
        self.chunks = Pack(PackKind.CHUNKS, *make)
        self.metas = Pack(PackKind.METAS, *make)
        self.fresh: dict[bytes, Place] = {}

    def store(self, kind: Kind, data: bytes) -> tuple[bytes, Place]:
        """An entry, and where it lies; in a pack not named yet the name is empty."""
        id_ = self.vault.hashing.id_of(data)
        pack = self.chunks if kind == Kind.CHUNK else self.metas
        if (place := self.known.find(id_, kind)) is not None:
            return id_, place
        if id_ not in self.fresh:
            if kind == Kind.CHUNK:
                codec = Codec.FRAMES
                body: Body = encode_frames(memoryview(data), id_, DEFAULT_LEVEL)
            else:
                codec, body = compress(data)
            row = pack.add(kind, codec, len(data), id_, body)
            self.fresh[id_] = row.place(b"")
        return id_, self.fresh[id_]

    def seal(self, pack: Pack) -> bytes:
        """Put it, if there is anything in it."""
        if not pack.listed:
            return b""
        data = pack.finish()
        key = (pack_key if pack is self.chunks else meta_key)(pack.name)
        assert self.vault.store.put_new(key, data)
        return pack.name


def add_point(vault: Vault, group: str, disks: Mapping[str, bytes], **facts: object) -> PointRecord:
    """A restore point of these disks."""
    filling = _Filling(vault)
    mapped = {
        name: [
            ZERO if not any(part := data[at : at + CHUNK]) else filling.store(Kind.CHUNK, part)
            for at in range(0, len(data), CHUNK)
        ]
        for name, data in disks.items()
    }
    chunks = filling.seal(filling.chunks)
    drafts = []
    for name, slots in mapped.items():
        pages, contents = [], b""
        for at in range(0, len(slots), SLOTS):
            page = _page(slots[at : at + SLOTS], chunks, slot_form(CHUNK))
            contents += page.content(vault.hashing)
            stored = filling.store(Kind.PAGE, encode_page(page.names, page.slots, page.form))
            pages.append(stored if contents[-ID_SIZE:] != ZERO_ID else ZERO)
        drafts.append((name, pages, contents))
    # A root names the pack its pages lie in, so it goes into the next one.
    metas = filling.seal(filling.metas)
    packs = [(filling.chunks, chunks), (filling.metas, metas)]
    filling.metas = Pack(PackKind.METAS, vault.repository, vault.sealing, vault.hashing)
    filling.fresh = {}
    roots = []
    for name, pages, contents in drafts:
        size = len(disks[name])
        root = Root(size, CHUNK, SLOTS, _page(pages, metas, SLOT), contents)
        roots.append((name, size, root, filling.store(Kind.ROOT, root.encode())))
    top = filling.seal(filling.metas)
    packs.append((filling.metas, top))
    records = [
        DiskRecord(
            name=name,
            size=size,
            root=Ref.of(id_, place if place.pack else place._replace(pack=top)),
            image_id=root.image_id(vault.hashing).hex(),
        )
        for name, size, root, (id_, place) in roots
    ]
    rows = [(row.id, row.place(name), row.kind) for pack, name in packs for row in pack.listed]
    segment = encode_segment(rows, vault.repository, vault.hashing)
    assert vault.store.put_new(index_key(new_ulid()), segment)
    settings = {"id": new_ulid(), "created": 1_700_000_000.0, "group": group, **facts}
    record = PointRecord(disks=records, **settings)
    data = encode_point(record, vault.repository, vault.sealing, vault.hashing)
    assert vault.store.put_new(point_key(group, record.id), data)
    return record


ZERO = (ZERO_ID, Place(b"", 0, 0, 0))


def _page(slots: list[tuple[bytes, Place]], fresh: bytes, form: struct.Struct) -> Page:
    """Slots as a page; those without a pack's name lie in the ``fresh`` one."""
    names: dict[bytes, int] = {}
    rows = []
    for id_, place in slots:
        if id_ == ZERO_ID:
            rows.append(bytes(form.size))
            continue
        number = names.setdefault(place.pack or fresh, len(names))
        rows.append(form.pack(id_, number, *place[1:]))
    return Page(list(names), b"".join(rows), form)


def restored(vault: Vault, record: PointRecord, name: str) -> bytes:
    """A disk of a point, read through the vault."""
    disk = record.disk(name)
    assert disk is not None
    root = vault.root(disk.root)
    out = bytearray(root.size)
    for number in range(len(root)):
        for index, id_, place in vault.page(root, number).places():
            at = number * root.page_span + index * CHUNK
            length = min(CHUNK, root.size - at)
            out[at : at + length] = vault.chunk(id_, place, length)
    return bytes(out)
