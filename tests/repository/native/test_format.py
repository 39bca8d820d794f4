"""The format as others know it: a stranger's reader, and repositories of long ago.

``golden/`` holds a repository of each kind, made once by ``tests.repository.native.golden``, run as
a program, and never again: what has been written with version 1 stays readable.
"""

import hashlib
import os
import random
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.repository.native.collect import collect
from nbdsrv.repository.native.hashing import HASHES
from nbdsrv.repository.native.layout import pack_key, point_key
from nbdsrv.repository.native.point import PointRecord
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.native.writer import begin
from nbdsrv.store.directory import DirectoryStore
from tests.repository.native.golden import GOLDEN, GROUP, KINDS, history
from tests.repository.native.made import CHUNK, PASSPHRASE, add_point, made, reopened, restored
from tests.repository.native.stranger import Stranger


def random_disk(seed: int) -> bytes:
    """Zeroes, noise, text and repeated chunks, of an odd size."""
    source = random.Random(seed)
    kinds = [bytes(CHUNK), source.randbytes(CHUNK), b"text, " * (CHUNK // 6) + bytes(CHUNK % 6)]
    chunks = [source.choice(kinds) for _ in range(source.randrange(60))]
    return b"".join(chunks)[: -source.randrange(1, CHUNK)]


@pytest.mark.parametrize("hash_", HASHES)
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_stranger_restores_what_we_store(tmp_path: Path, hash_: str, encrypted: bool) -> None:
    vault = made(DirectoryStore(str(tmp_path)), encrypted=encrypted, hash_=hash_)
    disks = [{"sda": random_disk(n), "vdb": random_disk(n + 100), "none": b""} for n in range(3)]
    for each in disks:
        add_point(vault, "vm/1 é", each)
    stranger = Stranger(str(tmp_path), PASSPHRASE)
    points = stranger.points("vm/1 é")
    assert [record.id for record in vault.points()[0]] == [point["id"] for point in points]
    for point, each in zip(points, disks, strict=True):
        assert each == {name: stranger.restore(point, name) for name in each}


async def written(
    vault: Vault, workers: Workers, disk: bytes, parent: PointRecord | None
) -> PointRecord:
    """A point as backups write it."""
    writer = await begin(vault, workers, GROUP, parent)
    told = await writer.disk("sda", len(disk))
    for at in range(0, len(disk), 3 * CHUNK):
        piece = bytearray(disk[at : at + 3 * CHUNK])
        await told.data(at, piece, len(piece))
    return await writer.commit_record()


@pytest.mark.parametrize("hash_", HASHES)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_stranger_restores_what_was_backed_up_and_collected(
    tmp_path: Path, workers: Workers, hash_: str, encrypted: bool
) -> None:
    vault = made(DirectoryStore(str(tmp_path)), encrypted=encrypted, hash_=hash_)
    source, records, disks = random.Random(7), [], []
    disk = bytearray(source.randbytes(30 * CHUNK) + bytes(3 * CHUNK) + b"end")
    for _ in range(5):
        records.append(await written(vault, workers, bytes(disk), records[-1] if records else None))
        disks.append(bytes(disk))
        for _ in range(6):
            at = source.randrange(33) * CHUNK
            disk[at : at + CHUNK] = source.choice([bytes(CHUNK), source.randbytes(CHUNK)])
    stranger = Stranger(str(tmp_path), PASSPHRASE)
    assert disks == [stranger.restore(point, "sda") for point in stranger.points(GROUP)]
    # Most of what the first ones had goes, the rest moves: the places in the maps are old.
    for record in records[:3]:
        vault.store.delete(point_key(GROUP, record.id))
    collected = collect(vault, grace_s=0, repack_below=90)
    assert collected.deleted_packs
    assert collected.moved_packs
    assert disks[3:] == [stranger.restore(point, "sda") for point in stranger.points(GROUP)]
    assert disks[4] == restored(reopened(vault.store), records[4], "sda")


def test_a_stranger_notices_what_we_would() -> None:
    """That is: the reader above does verify, so that it proves something."""
    stranger = Stranger(str(GOLDEN / "plain-blake3"))
    point = stranger.points(GROUP)[0]
    point["disks"][0]["image_id"] = "00" * 32
    with pytest.raises(AssertionError):
        stranger.restore(point, point["disks"][0]["name"])


@pytest.mark.parametrize("kind", KINDS)
def test_repositories_of_long_ago_stay_readable(kind: str) -> None:
    path = str(GOLDEN / kind)
    vault = Vault.open(DirectoryStore(path), lambda: PASSPHRASE)
    points, damaged = vault.points(GROUP)
    assert ([], len(history())) == (damaged, len(points))
    stranger = Stranger(path, PASSPHRASE)
    for record, foreign, disks in zip(points, stranger.points(GROUP), history(), strict=True):
        assert set(disks) == {disk.name for disk in record.disks}
        for name, content in disks.items():
            assert content == restored(vault, record, name)
            assert content == stranger.restore(foreign, name)
    assert list(vault.index())


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_long_ago_are_todays(kind: str) -> None:
    vault = Vault.open(DirectoryStore(str(GOLDEN / kind)), lambda: PASSPHRASE)
    for stored in vault.pack_objects():
        name = vault.hashing.name_of(vault.store.get(stored.key))
        assert stored.key.removeprefix("metas/").removeprefix("packs/") == pack_key(name)[6:]
        assert vault.directory(stored)


def test_golden_repositories_are_small_and_unchanged() -> None:
    """Whoever changes them has changed the format."""
    size, hashed = 0, hashlib.sha256()
    for folder, _, names in sorted(os.walk(GOLDEN)):
        for name in sorted(names):
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            size += len(data)
            hashed.update(os.path.relpath(os.path.join(folder, name), GOLDEN).encode() + data)
    assert size < 64 << 10
    assert hashed.hexdigest() == SUM


SUM = "328bf8e82ed7306a96720d374152cb1f89671bad8b2c56c5b6660a8f47e48088"
