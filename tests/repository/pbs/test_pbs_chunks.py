"""Chunks: what is proven once, what at every read, and when a file is another one."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.pbs import chunks as module
from nbdsrv.repository.pbs.chunks import Chunks
from nbdsrv.store.directory_tree import DirectoryTree
from tests.repository.pbs.encoder import CHUNK, Datastore, Key, blob, chunk_file

DATA = os.urandom(CHUNK)
OTHER = os.urandom(CHUNK)


class Counted:
    """SHA-256, and how often it was asked for."""

    def __init__(self) -> None:
        self.times = 0

    def sha256(self, data: Any) -> Any:
        self.times += 1
        return hashlib.sha256(data)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Files count as settled although they have just been made."""
    counted = Counted()
    monkeypatch.setattr(module, "hashlib", counted)
    monkeypatch.setattr(module, "SETTLED_NS", 0)
    return counted


def test_a_file_is_hashed_once_and_again_by_prove(store: Datastore, hashed: Counted) -> None:
    digest = store.put_chunk(DATA, None)
    chunks = Chunks(DirectoryTree(str(store.root)))
    for _ in range(3):
        assert chunks.read(digest, CHUNK, None) == DATA
    assert hashed.times == 1
    chunks.prove(digest, CHUNK, None)
    assert hashed.times == 2


def test_what_has_just_been_written_is_not_believed(store: Datastore) -> None:
    """A change within the same tick of the file system's clock would not be noticed."""
    digest = store.put_chunk(DATA, None)
    chunks = Chunks(DirectoryTree(str(store.root)))
    chunks.read(digest, CHUNK, None)
    path = chunk_file(store.root, digest)
    before = path.stat()
    path.write_bytes(blob(OTHER))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptImage, match="digest"):
        chunks.read(digest, CHUNK, None)


@pytest.mark.parametrize("in_place", [True, False])
def test_another_file_is_hashed_again(store: Datastore, hashed: Counted, in_place: bool) -> None:
    store.compress = False
    digest = store.put_chunk(DATA, None)
    chunks = Chunks(DirectoryTree(str(store.root)))
    chunks.read(digest, CHUNK, None)
    path = chunk_file(store.root, digest)
    before = path.stat()
    target = path if in_place else Path(f"{path}.tmp")
    target.write_bytes(blob(OTHER, compress=False))  # of the same size, and its CRC is right
    target.rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptImage, match="digest"):
        chunks.read(digest, CHUNK, None)
    assert hashed.times == 2


@pytest.mark.parametrize("compress", [True, False])
def test_a_bit_that_flips_behind_the_file_systems_back(
    store: Datastore, hashed: Counted, compress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.compress = compress
    digest = store.put_chunk(b"text " * (CHUNK // 5) + b"x", None)
    length = store.chunks[digest]
    chunks = Chunks(DirectoryTree(str(store.root)))
    chunks.read(digest, length, None)
    path = chunk_file(store.root, digest)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    # As if nothing had been written: what was remembered is what the file says of itself.
    monkeypatch.setattr(chunks, "_proven", {digest: _state(path)})
    with pytest.raises(CorruptImage, match="CRC-32"):
        chunks.read(digest, length, None)
    assert hashed.times == 1


def test_the_tag_is_checked_at_every_read(store: Datastore, hashed: Counted) -> None:
    key = Key(bytes(range(32)))
    digest = store.put_chunk(DATA, key)
    from nbdsrv.repository.pbs.keys import CryptKey

    chunks = Chunks(DirectoryTree(str(store.root)))
    ours = CryptKey(bytes(range(32)))
    assert chunks.read(digest, CHUNK, ours) == DATA
    with pytest.raises(CorruptImage, match="does not decrypt"):
        chunks.read(digest, CHUNK, CryptKey(bytes(32)))
    assert hashed.times == 0  # the key hashes


def test_memory_of_what_is_proven_is_bounded(
    store: Datastore, hashed: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PROVEN", 2)
    chunks = Chunks(DirectoryTree(str(store.root)))
    digests = [store.put_chunk(bytes([number]) * 100, None) for number in range(3)]
    for digest in (*digests, digests[2], digests[0]):
        chunks.read(digest, 100, None)
    assert hashed.times == 4


def _state(path: Path) -> tuple[int, int, int, int, int]:
    info = path.stat()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
