"""Disks of snapshots: the contract, holes, contexts, keys, damage, locks, cancellation."""

import asyncio
import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.pbs.chunks import Chunks
from protocol.extents import HOLE
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content as read
from tests.repository.pbs.encoder import CHUNK, Datastore, Key, blob, chunk_file, key_file
from tests.repository.pbs.opened import T0, golden, open_disk, opened, rewritten

GOLDEN = golden()
SINCE = "nbdsrv:changed-since:"


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Key:
    """In a file that the environment names."""
    made = Key(b"0123456789abcdef" * 2)
    (tmp_path / "key").write_text(key_file(made))
    monkeypatch.setenv("NBDSRV_PBS_KEYFILE", str(tmp_path / "key"))
    return made


@pytest.mark.parametrize("compress", [True, False])
async def test_the_contract(store: Datastore, workers: Workers, compress: bool) -> None:
    store.compress = compress
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    store.snapshot("vm/1", T0 + 60, {"d": rewritten(GOLDEN, 3)})
    await check_disk(
        lambda: open_disk(store.root, workers, "@2026-01-01T00:00:00"),
        GOLDEN,
        extents_granularity=CHUNK,
    )


async def test_the_contract_encrypted(store: Datastore, workers: Workers, key: Key) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN}, key=key)
    await check_disk(lambda: open_disk(store.root, workers), GOLDEN, extents_granularity=CHUNK)


@pytest.mark.parametrize("content", [b"", b"x", bytes(CHUNK), bytes(CHUNK + 1), b"y" * CHUNK * 2])
async def test_odd_disks(store: Datastore, workers: Workers, content: bytes) -> None:
    store.snapshot("vm/1", T0, {"d": content})
    await check_disk(lambda: open_disk(store.root, workers), content)


async def test_zero_chunks_are_holes_and_cost_nothing(
    store: Datastore, workers: Workers, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroes = bytes(5 * CHUNK + 512)
    store.snapshot("vm/1", T0, {"d": zeroes})
    store.snapshot("vm/1", T0 + 60, {"d": zeroes}, key=key)
    monkeypatch.setattr(Chunks, "read", None)
    for point in ("2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"):
        disk = await open_disk(store.root, workers, f"@{point}")
        assert await extent_map(disk) == bytes([HOLE]) * len(zeroes)
        assert await read(disk, 0, disk.size) == zeroes
        await disk.close()


async def test_what_has_changed(store: Datastore, workers: Workers) -> None:
    later = rewritten(GOLDEN, 3, 8) + b"grown"
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    store.snapshot("vm/1", T0 + 60, {"d": later, "e": b"x"})
    store.snapshot("vm/1", T0 + 120, {"d": later})
    disk = await open_disk(store.root, workers, "vm/1/d@2026-01-01T00:01:00Z")
    assert disk.contexts[2:] == (
        SINCE + "2026-01-01T00:02:00Z",
        SINCE + "2026-01-01T00:00:00Z",
    )
    same = await extent_map(disk, disk.contexts[2])
    assert same == bytes(len(later))
    changed = await extent_map(disk, disk.contexts[3])
    wanted = bytearray(len(later))
    for number in (3, 8):
        wanted[number * CHUNK : (number + 1) * CHUNK] = b"\1" * CHUNK
    wanted[9 * CHUNK :] = b"\1" * (len(later) - 9 * CHUNK)
    assert changed == bytes(wanted)
    for offset, length in ((5, 1), (3 * CHUNK - 1, 2), (8 * CHUNK + 7, 2 * CHUNK)):
        end = min(offset + length, disk.size)
        found = await disk.status(disk.contexts[3], offset, end - offset)
        states = b"".join(bytes([each.flags]) * each.length for each in found)
        assert states == changed[offset:end]
    with pytest.raises(DiskError, match="no context"):
        await disk.status(SINCE + "2027", 0, 1)
    await disk.close()
    disk = await open_disk(store.root, workers, "vm/1/e")
    assert disk.contexts[2:] == ()
    await disk.close()


async def test_at_most_256_contexts_are_announced(store: Datastore, workers: Workers) -> None:
    for minute in range(260):
        store.snapshot("vm/1", T0 + 60 * minute, {"d": b"x"}, with_files=False)
    disk = await open_disk(store.root, workers, "@2026-01-01T00:05:00Z")
    assert len(disk.contexts) == 2 + 256
    assert disk.contexts[2] == SINCE + "2026-01-01T04:19:00Z"
    oldest = await disk.status(SINCE + "2026-01-01T00:00:00Z", 0, 1)
    assert [each.flags for each in oldest] == [0]
    for minute in range(9, 20):  # more of them than are kept open
        await disk.status(f"{SINCE}2026-01-01T00:{minute:02}:00Z", 0, 1)
    await disk.close()


async def test_a_broken_chunk_is_an_error_for_its_range_alone(
    store: Datastore, workers: Workers
) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    digest = hashlib.sha256(GOLDEN[3 * CHUNK : 4 * CHUNK]).digest()
    path = chunk_file(store.root, digest)
    good = path.read_bytes()
    for bad, said in (
        (good[:-1] + bytes([good[-1] ^ 1]), "its CRC-32 is wrong"),
        (blob(b"other" * 1000), "does not have the digest that is its name"),
        (good[:7], "was it cut short"),
        (b"", "are no blob"),
        (b"\0" * 100, "as no blob does"),
        (blob(bytes(CHUNK + 1)), "unpacks to more than 65536 bytes"),
        (blob(b"z" * (CHUNK + 1), compress=False), "holds 65537 bytes, more than 65536"),
        (blob(bytes(1 << 28)), "unpacks to more than 65536 bytes"),
        (blob(GOLDEN[:CHUNK], key=Key(bytes(32))), "is encrypted, though nothing says so"),
    ):
        path.write_bytes(bad)
        disk = await open_disk(store.root, workers)
        with pytest.raises(CorruptImage, match=said) as caught:
            await read(disk, 3 * CHUNK + 5, 10)
        assert str(path) in str(caught.value)
        assert (caught.value.errno, caught.value.offset) == (errno.EIO, 3 * CHUNK + 5)
        assert await read(disk, 0, 3 * CHUNK) == GOLDEN[: 3 * CHUNK]
        assert await read(disk, 4 * CHUNK, disk.size - 4 * CHUNK) == GOLDEN[4 * CHUNK :]
        await disk.close()


async def test_a_missing_chunk(store: Datastore, workers: Workers) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    path = chunk_file(store.root, hashlib.sha256(GOLDEN[:CHUNK]).digest())
    disk = await open_disk(store.root, workers)
    path.rename(path.with_name(path.name + ".0.bad"))
    with pytest.raises(CorruptImage, match=r"put it aside as \.0\.bad"):
        await read(disk, 0, 1)
    path.with_name(path.name + ".0.bad").unlink()
    with pytest.raises(CorruptImage, match=f"{path}: is missing"):
        await read(disk, 0, 1)
    await disk.close()


async def test_an_index_that_was_changed_is_not_opened(store: Datastore, workers: Workers) -> None:
    """A digest in it changed into another chunk's would be wrong content nobody notices."""
    path = store.snapshot("vm/1", T0, {"d": GOLDEN}) / "d.img.fidx"
    good = path.read_bytes()
    other = good[:4096] + good[4128:4160] + good[4128:]
    csum = hashlib.sha256(other[4096:]).digest()
    for bad, said in (
        (other, "do not have the checksum of the header"),
        (other[:32] + csum + other[64:], "not the index whose checksum the manifest has"),
        (good[:-1], "was it cut short"),
        (good + b"x", "was it cut short"),
        (good[:100], "are no index"),
        (b"x" + good[1:], "no fixed index"),
        (good[:72] + bytes([1]) + good[73:], "chunks of 65537 bytes"),
        (good[:72] + bytes(8) + good[80:], "chunks of 0 bytes"),
        (good[:64] + b"\xff" * 8 + good[72:], "was it cut short"),
        (good[:64] + bytes([good[64] ^ 1]) + good[65:], "the manifest says"),
    ):
        path.write_bytes(bad)
        with pytest.raises(CorruptImage, match=said) as caught:
            await open_disk(store.root, workers)
        assert str(path) in str(caught.value)


async def test_keys(
    store: Datastore, workers: Workers, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN}, key=Key(b"o" * 32))
    store.snapshot("vm/2", T0, {"d": GOLDEN}, key=key)
    store.snapshot("vm/3", T0, {"d": GOLDEN}, key=key, mode="sign-only")
    store.snapshot("vm/4", T0, {"d": GOLDEN}, key=key, unprotected={"key-fingerprint": None})
    with pytest.raises(RepositoryError, match="that is none of the keys given; name its key file"):
        await open_disk(store.root, workers, "vm/1")
    for group in ("vm/2", "vm/3", "vm/4"):
        disk = await open_disk(store.root, workers, group)
        assert await read(disk, 0, disk.size) == GOLDEN
        assert disk.facts["signature"] == "valid"
        await disk.close()
    monkeypatch.delenv("NBDSRV_PBS_KEYFILE")
    async with opened(store.root, workers) as repository:
        assert [len(point.disks) for point in await repository.points()] == [1, 1, 1, 1]
    with pytest.raises(RepositoryError, match="is encrypted with the key") as caught:
        await open_disk(store.root, workers, "vm/2")
    assert "name its key file in NBDSRV_PBS_KEYFILE" in str(caught.value)
    disk = await open_disk(store.root, workers, "vm/3")
    assert disk.facts["signature"] == "not checked"
    await disk.close()


async def test_a_manifest_that_was_changed_is_noticed(
    store: Datastore, workers: Workers, key: Key
) -> None:
    path = store.snapshot("vm/1", T0, {"d": GOLDEN}, key=key, mode="sign-only")
    document = store.manifest(path)
    document["unprotected"]["notes"] = "may be edited"
    store.put_manifest(path, document)
    async with opened(store.root, workers) as repository:
        (point,) = await repository.points()
        assert point.flags == ()
        document["files"].pop()
        store.put_manifest(path, document)
        (point,) = await repository.points()
        assert point.flags == ("damaged",)
        assert "its signature is not of what it says" in point.facts["reason"]


async def test_encrypted_chunks_are_proven(store: Datastore, workers: Workers, key: Key) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN}, key=key)
    path = chunk_file(store.root, key.digest(GOLDEN[:CHUNK]))
    for bad, said in (
        (blob(b"x" * CHUNK, key=key), "digest that is its name"),
        (blob(GOLDEN[:CHUNK], key=Key(b"o" * 32)), "does not decrypt with the key"),
        (blob(GOLDEN[:CHUNK]), "is not encrypted, though its index is"),
    ):
        path.write_bytes(bad)
        disk = await open_disk(store.root, workers)
        with pytest.raises(CorruptImage, match=said):
            await read(disk, 0, 1)
        await disk.close()


async def test_the_snapshot_is_locked_while_a_disk_is_open(
    store: Datastore, workers: Workers
) -> None:
    path = store.snapshot("vm/1", T0, {"d": GOLDEN})
    disk = await open_disk(store.root, workers)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await disk.close()
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(RepositoryError, match="is being written or removed right now"):
        await open_disk(store.root, workers)
    os.close(fd)
    await (await open_disk(store.root, workers)).close()


async def test_a_file_system_without_locks(
    store: Datastore, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    await (await open_disk(store.root, workers)).close()


async def test_opening_that_is_cancelled_leaves_nothing_open(
    store: Datastore, workers: Workers
) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    async with opened(store.root, workers) as repository:
        (point,) = await repository.points()
        await (await repository.open_disk(point, "d")).close()
        before = len(os.listdir("/proc/self/fd"))
        for patience in range(8):
            task = asyncio.ensure_future(repository.open_disk(point, "d"))
            for _ in range(patience):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await (await task).close()
            except asyncio.CancelledError:
                pass
        assert len(os.listdir("/proc/self/fd")) == before


async def test_nothing_is_written(store: Datastore, workers: Workers) -> None:
    def state() -> list[tuple[str, int, int]]:
        return sorted(
            (str(path), path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in store.root.rglob("*")
        )

    store.snapshot("vm/1", T0, {"d": GOLDEN})
    before = state()
    disk = await open_disk(store.root, workers)
    await read(disk, 0, disk.size)
    await disk.close()
    async with opened(store.root, workers) as repository:
        await repository.verify("chunks")
    assert state() == before
