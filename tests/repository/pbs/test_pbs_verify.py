"""Verification: what each level sees, whom damage hurts, and what is not claimed."""

import hashlib
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.repository import chunk_sweep
from nbdsrv.repository.damage import Check
from nbdsrv.repository.pbs.chunks import Chunks, chunk_path
from nbdsrv.repository.repository import LEVELS
from tests.repository.pbs.encoder import CHUNK, Datastore, Key, blob, chunk_file, key_file
from tests.repository.pbs.opened import T0, golden, opened, rewritten

GOLDEN = golden()
ID = "2026-01-01T00:00:00Z"
LATER = "2026-01-01T00:01:00Z"


async def _verify(store: Datastore, workers: Workers, level: str, **more: str) -> Check:
    async with opened(store.root, workers) as repository:
        return await repository.verify(level, None, more.get("disk"))


def _digest(content: bytes, number: int) -> bytes:
    return hashlib.sha256(content[number * CHUNK : (number + 1) * CHUNK]).digest()


@pytest.mark.parametrize("level", LEVELS)
async def test_a_sound_store(store: Datastore, workers: Workers, level: str) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    store.snapshot("vm/1", T0 + 60, {"d": rewritten(GOLDEN, 3)})
    check = await _verify(store, workers, level)
    assert (check.findings, check.unread, check.notes) == ([], [], [])
    assert (check.points, check.disks) == (2, 2)
    stored = len(store.chunks) - 1  # the one of zeroes is not needed
    assert check.objects == stored + 2 * 3
    assert any("without a signature" in text for text in check.unchecked)
    assert any("no chunk was read" in text for text in check.unchecked) == (level == "structure")


@pytest.mark.parametrize("limit", [1 << 20, 2])
async def test_each_chunk_is_looked_at_once(
    store: Datastore, workers: Workers, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Also where not all of them can be remembered at a time."""
    for minute in range(4):
        store.snapshot("vm/1", T0 + 60 * minute, {"d": rewritten(GOLDEN, minute)})
    monkeypatch.setattr(chunk_sweep, "MAX_UNIQUE", limit)
    seen: list[bytes] = []
    prove = Chunks.prove

    def watched(self: Chunks, digest: bytes, length: int, key: None) -> int:
        seen.append(digest)
        return prove(self, digest, length, key)

    monkeypatch.setattr(Chunks, "prove", watched)
    path = chunk_file(store.root, _digest(GOLDEN, 6))
    path.write_bytes(blob(b"else"))
    check = await _verify(store, workers, "chunks")
    assert len(seen) == len(set(seen)) == len(store.chunks) - 1
    (finding,) = check.findings
    assert finding.key == chunk_path(_digest(GOLDEN, 6))
    assert [hurt.point for hurt in finding.hurts] == [
        f"vm/1/2026-01-01T00:0{minute}:00Z" for minute in range(4)
    ]
    assert finding.hurts[0].ranges == [(6 * CHUNK, CHUNK)]


async def test_what_each_level_sees(store: Datastore, workers: Workers) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    store.snapshot("vm/2", T0, {"d": GOLDEN[: 4 * CHUNK], "e": GOLDEN[6 * CHUNK :]})
    missing, flipped, other = (_digest(GOLDEN, number) for number in (0, 3, 6))
    chunk_file(store.root, missing).unlink()
    path = chunk_file(store.root, flipped)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    chunk_file(store.root, other).write_bytes(blob(b"x" * CHUNK))
    wanted = {
        chunk_path(missing): {f"vm/1/{ID} d": 0, f"vm/2/{ID} d": 0},
        chunk_path(flipped): {f"vm/1/{ID} d": 3 * CHUNK, f"vm/2/{ID} d": 3 * CHUNK},
        chunk_path(other): {f"vm/1/{ID} d": 6 * CHUNK, f"vm/2/{ID} e": 0},
    }
    for level, count in zip(LEVELS, (1, 2, 3), strict=True):
        check = await _verify(store, workers, level)
        found = {
            finding.key: {f"{hurt.point} {hurt.disk}": hurt.ranges[0][0] for hurt in finding.hurts}
            for finding in check.findings
        }
        assert found == {key: wanted[key] for key in list(wanted)[:count]}, level
    check = await _verify(store, workers, "chunks", disk="e")
    assert [finding.key for finding in check.findings] == [chunk_path(other)]


async def test_indexes_and_blobs(store: Datastore, workers: Workers) -> None:
    path = store.snapshot("vm/1", T0, {"d": GOLDEN, "e": GOLDEN})
    index = path / "d.img.fidx"
    raw = bytearray(index.read_bytes())
    raw[-1] ^= 1
    index.write_bytes(raw)
    config = path / "qemu-server.conf.blob"
    config.write_bytes(blob(b"cores: 9\nmemory: 2048\n" * 9))
    check = await _verify(store, workers, "structure")
    assert [finding.key.rpartition("/")[2] for finding in check.findings] == ["d.img.fidx"]
    assert check.findings[0].hurts[0].length == len(GOLDEN)
    check = await _verify(store, workers, "packs")
    assert [finding.key.rpartition("/")[2] for finding in check.findings] == [
        "d.img.fidx",
        "qemu-server.conf.blob",
    ]
    config.unlink()
    check = await _verify(store, workers, "structure")
    assert "is missing" in check.findings[1].text


async def test_encrypted(
    store: Datastore, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key(b"k" * 32)
    store.snapshot("vm/1", T0, {"d": GOLDEN}, key=key)
    digest = key.digest(GOLDEN[:CHUNK])
    chunk_file(store.root, digest).write_bytes(blob(b"x" * CHUNK, key=key))
    check = await _verify(store, workers, "chunks")
    assert check.findings == []
    assert any("for want of the key" in text for text in check.unchecked)
    (tmp_path / "key").write_text(key_file(key))
    monkeypatch.setenv("NBDSRV_PBS_KEYFILE", str(tmp_path / "key"))
    check = await _verify(store, workers, "chunks")
    assert [finding.key for finding in check.findings] == [chunk_path(digest)]
    assert check.unchecked == []


async def test_many_broken_chunks_are_counted(
    store: Datastore, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_sweep, "MAX_FINDINGS", 2)
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    for digest in store.chunks:
        chunk_file(store.root, digest).unlink()
    check = await _verify(store, workers, "structure")
    assert [finding.key for finding in check.findings[2:]] == [".chunks"]
    assert check.findings[2].text == f"{len(store.chunks) - 3} more chunks are missing or broken"
    hurt = sum(hurt.length for finding in check.findings for hurt in finding.hurts)
    zeroes = 3 * CHUNK
    assert hurt == len(GOLDEN) - zeroes


async def test_what_the_server_found_is_passed_on(store: Datastore, workers: Workers) -> None:
    failed = {"verify_state": {"state": "failed", "upid": "UPID:x"}}
    store.snapshot("vm/1", T0, {"d": GOLDEN}, unprotected=failed)
    check = await _verify(store, workers, "structure")
    assert check.findings == []
    assert ["own last verification" in note.text for note in check.notes] == [True]


async def test_some_points_only(store: Datastore, workers: Workers) -> None:
    store.snapshot("vm/1", T0, {"d": GOLDEN})
    store.snapshot("vm/1", T0 + 60, {"d": rewritten(GOLDEN, 0)})
    chunk_file(store.root, _digest(GOLDEN, 0)).unlink()
    async with opened(store.root, workers) as repository:
        first, second = await repository.points()
        assert (await repository.verify("chunks", [second])).findings == []
        assert len((await repository.verify("chunks", [first])).findings) == 1
