"""A disk of a point read through the vault alone: root, pages, chunks, nothing in between."""

import os

from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.store import Store

__all__ = ["KIB", "MIB", "fresh_vault", "listed", "noise", "read_back"]

KIB, MIB = 1 << 10, 1 << 20


def fresh_vault(
    store: Store | None = None,
    *,
    chunk: int = 64 * KIB,
    page_slots: int = 16,
    pack: int = 1 * MIB,
    cipher: str | None = None,
    hash_: str = "blake3",
) -> Vault:
    """An empty repository; small packs and pages, so that a small disk has several."""
    config = RepositoryConfig(
        chunk_size=chunk, page_slots=page_slots, pack_target=pack, cipher=cipher, hash=hash_
    )
    return Vault.create(store or MemoryStore(), config, lambda: "correct horse")


def read_back(vault: Vault, record: PointRecord, name: str = "disk") -> bytes:
    """All bytes of a disk."""
    disk = record.disk(name)
    assert disk is not None
    root = vault.root(disk.root)
    assert root.size == disk.size
    assert root.image_id(vault.hashing).hex() == disk.image_id
    content = bytearray(disk.size)
    for number in range(len(root)):
        page = vault.page(root, number)
        assert page.content(vault.hashing) == root.content(number)
        for index, id_, place in page.places():
            offset = (number * root.page_slots + index) * root.chunk_size
            length = min(root.chunk_size, disk.size - offset)
            content[offset : offset + length] = vault.chunk(id_, place, length)
    return bytes(content)


def listed(vault: Vault, group: str = "vm") -> list[PointRecord]:
    """All points of a group; none is damaged."""
    points, damaged = vault.points(group)
    assert damaged == []
    return points


def noise(length: int) -> bytes:
    """What does not compress and was never there before."""
    return os.urandom(length)
