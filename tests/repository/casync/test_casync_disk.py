"""Disks in casync's chunks: made by casync itself, and by an encoder for what it does not make."""

import asyncio
import errno
import gzip
import lzma
import os
import random
from pathlib import Path

import pytest
import zstandard

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, RepositoryError
from nbdsrv.repository.casync import index as index_module
from nbdsrv.repository.casync.stores import ChunkStores
from protocol.extents import HOLE
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content as read
from tests.repository.casync.conftest import Make
from tests.repository.casync.encoder import chunk_file, content_id, written
from tests.repository.casync.opening import golden, open_disk, opened

GOLDEN = golden()
SMALL = "--chunk-size=4096:16384:65536"


@pytest.mark.parametrize(
    "options",
    [
        (SMALL,),
        (SMALL, "--digest=sha256"),
        (SMALL, "--compression=xz"),
        (SMALL, "--compression=gzip"),
        (),
    ],
)
async def test_the_contract_on_what_casync_made(
    make: Make, workers: Workers, options: tuple[str, ...]
) -> None:
    path = make(GOLDEN, "vm1.caibx", *options)
    await check_disk(lambda: open_disk(path, workers), GOLDEN)


async def test_holes_of_what_casync_made(make: Make, workers: Workers) -> None:
    path = make(GOLDEN, "vm1.caibx", SMALL)
    disk = await open_disk(path, workers)
    states = await extent_map(disk)
    assert states.count(HOLE) >= 900 << 10
    assert not any(GOLDEN[at] for at, state in enumerate(states) if state)
    await disk.close()


@pytest.mark.parametrize("how", ["zstd", "none"])
@pytest.mark.parametrize("pages", [1, 50])
async def test_the_contract_on_other_stores(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, how: str, pages: int
) -> None:
    """Also with chunks that reach over the edges of pages, and more items than are read at once."""
    if pages > 1:
        monkeypatch.setattr("nbdsrv.repository.casync.disk.PAGE_CHUNKS", 1)
        monkeypatch.setattr(index_module, "BLOCK", 8)
    chance = random.Random(3)
    cuts, at = [], 0
    while at < len(GOLDEN):
        at = min(at + chance.randrange(1024, 16385), len(GOLDEN))
        cuts.append(at)
    path = written(tmp_path / "vm1.caibx", GOLDEN, cuts, how=how)
    disk = await open_disk(path, workers)
    assert await extent_map(disk) is not None
    assert (disk.size // disk.page_span > 40) == (pages > 1)  # type: ignore[attr-defined]
    await disk.close()
    await check_disk(lambda: open_disk(path, workers), GOLDEN)


@pytest.mark.parametrize("content", [b"", b"x", bytes(200_000), b"y" * 200_001])
async def test_odd_disks(make: Make, workers: Workers, content: bytes) -> None:
    path = make(content, "vm1.caibx", SMALL)
    await check_disk(lambda: open_disk(path, workers), content)


async def test_zeroes_cost_nothing(
    make: Make, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(bytes(1_000_000), "vm1.caibx", SMALL)
    monkeypatch.setattr(ChunkStores, "read", None)
    disk = await open_disk(path, workers)
    assert await extent_map(disk) == bytes([HOLE]) * 1_000_000
    await disk.close()


async def test_what_has_changed(make: Make, workers: Workers) -> None:
    later = bytearray(GOLDEN)
    later[100_000:100_010] = b"0123456789"
    later += b"grown"
    make(GOLDEN, "vm1-2026-01-01.caibx", SMALL)
    root = make(bytes(later), "vm1-2026-01-02.caibx", SMALL).parent
    make(bytes(later), "vm1-2026-01-03.caibx", SMALL)
    make(GOLDEN, "vm1-2026-01-04.caibx", SMALL, "--digest=sha256")
    disk = await open_disk(root, workers, "@2026-01-02")
    assert [name.rpartition(":")[2] for name in disk.contexts[2:]] == [
        "2026-01-04",
        "2026-01-03",
        "2026-01-01",
    ]
    other_ids, same, since = [await extent_map(disk, name) for name in disk.contexts[2:]]
    assert set(other_ids) == {1}
    assert same == bytes(len(later))
    missed = [at for at, byte in enumerate(GOLDEN) if byte != later[at] and not since[at]]
    assert missed == []
    assert set(since[len(GOLDEN) :]) == {1}
    assert since.count(1) < 400_000
    for offset, length in ((0, 1), (99_999, 3), (len(GOLDEN), 5), (50_000, 200_000)):
        found = await disk.status(disk.contexts[4], offset, length)
        states = b"".join(bytes([each.flags]) * each.length for each in found)
        assert states == since[offset : offset + len(states)]
    with pytest.raises(DiskError, match="no context"):
        await disk.status("nbdsrv:changed-since:2027", 0, 1)
    await disk.close()


async def test_a_broken_chunk_is_an_error_for_its_range_alone(
    tmp_path: Path, workers: Workers
) -> None:
    content = random.Random(5).randbytes(40_000)
    path = written(tmp_path / "vm1.caibx", content, [10_000, 20_000, 30_000, 40_000])
    store = tmp_path / "default.castr"
    victim = chunk_file(store, content_id(content[10_000:20_000]))
    good = victim.read_bytes()
    pack = zstandard.ZstdCompressor().compress
    stream = zstandard.ZstdCompressor(write_content_size=False)
    for bad, said in (
        (pack(content[:10_000]), "does not have the id that is its name"),
        (pack(content[:9_999]), "holds 9999 bytes, the index wants 10000"),
        (pack(bytes(1 << 28)), "would unpack to 268435456 bytes"),
        (stream.compress(bytes(1 << 28)), "unpacks to more than 10000 bytes"),
        (gzip.compress(bytes(1 << 26)), None),
        (lzma.compress(bytes(1 << 26)), "unpacks to more than 10000 bytes"),
        (good[:-1], "cut short"),
        (good[:3], "neither zstd nor xz nor gzip"),
        (b"", "neither zstd nor xz nor gzip"),
        (lzma.compress(content[10_000:20_000])[:-9], "does not unpack|cut short"),
        (gzip.compress(content[10_000:20_000])[:-9], "cut short"),
        (b"\0" * (1 << 20), "more than"),
    ):
        victim.write_bytes(bad)
        disk = await open_disk(path, workers)
        with pytest.raises(DiskError, match=said) as caught:
            await read(disk, 10_005, 10)
        assert str(victim) in str(caught.value)
        assert caught.value.offset == 10_005
        assert await read(disk, 0, 10_000) == content[:10_000]
        assert await read(disk, 20_000, 20_000) == content[20_000:]
        await disk.close()
    victim.unlink()
    disk = await open_disk(path, workers)
    with pytest.raises(CorruptImage, match=r"is not in .*default\.castr") as missing:
        await read(disk, 10_000, 1)
    assert missing.value.errno == errno.EIO
    await disk.close()


async def test_another_store_has_it_intact(tmp_path: Path, workers: Workers) -> None:
    content = random.Random(5).randbytes(20_000)
    path = written(tmp_path / "vm1.caibx", content, [10_000, 20_000])
    written(path, content, [10_000, 20_000], store="vm1.castr", how="none")
    chunk_file(tmp_path / "vm1.castr", content_id(content[:10_000]), "").write_bytes(b"broken")
    chunk_file(tmp_path / "default.castr", content_id(content[10_000:])).unlink()
    disk = await open_disk(path, workers)
    assert await read(disk, 0, 20_000) == content
    stores = disk.facts["stores"]
    assert [os.path.basename(each) for each in stores] == [  # type: ignore[attr-defined]
        "vm1.castr",
        "default.castr",
    ]
    await disk.close()


async def test_where_the_store_is(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(5).randbytes(10_000)
    (tmp_path / "a").mkdir()
    path = written(tmp_path / "a" / "sda.caibx", content, [10_000], store="../far/chunks")
    with pytest.raises(RepositoryError, match=r"no chunk store .* name it in NBDSRV_CASYNC_STORE"):
        await open_disk(path, workers)
    monkeypatch.setenv("NBDSRV_CASYNC_STORE", f"{tmp_path / 'a'}:{tmp_path / 'far' / 'chunks'}")
    disk = await open_disk(path, workers)
    assert await read(disk, 0, 10_000) == content
    await disk.close()
    monkeypatch.delenv("NBDSRV_CASYNC_STORE")
    (tmp_path / "far" / "chunks").rename(tmp_path / "other.castr")  # one directory up
    disk = await open_disk(tmp_path, workers, "a/sda")
    assert await read(disk, 0, 10_000) == content
    await disk.close()
    monkeypatch.setenv("NBDSRV_CASYNC_STORE", str(tmp_path / "nowhere"))
    with pytest.raises(DiskError, match="nowhere: no such directory"):
        await open_disk(path, workers)


async def test_an_open_disk_outlives_its_repository_and_leaves_nothing_open(
    make: Make, workers: Workers
) -> None:
    path = make(GOLDEN, "vm1.caibx", SMALL)
    await (await open_disk(path, workers)).close()
    before = len(os.listdir("/proc/self/fd"))
    disk = await open_disk(path, workers)
    assert await read(disk, 0, disk.size) == GOLDEN
    await disk.close()
    async with opened(path, workers) as repository:
        (point,) = await repository.points()
        for patience in range(8):
            task = asyncio.ensure_future(repository.open_disk(point, "disk"))
            for _ in range(patience):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await (await task).close()
            except asyncio.CancelledError:
                pass
    assert len(os.listdir("/proc/self/fd")) == before
