"""Verification, and flipped bytes anywhere."""

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import NbdsrvError
from nbdsrv.repository.casync.stores import ChunkStores
from nbdsrv.repository.repository import LEVELS
from tests.disk.reading import content as read
from tests.formats.mutants import Mutation, mutations, threads
from tests.repository.casync.conftest import Make
from tests.repository.casync.encoder import chunk_file, content_id, index, written
from tests.repository.casync.opening import golden, opened

CONTENT = random.Random(1).randbytes(20_000)
PATIENCE_S = 20


@pytest.mark.parametrize("level", LEVELS)
async def test_what_casync_made_is_sound(make: Make, workers: Workers, level: str) -> None:
    make(golden(), "vm1-2026-01-01.caibx", "--chunk-size=4096:16384:65536")
    root = make(golden() + b"x", "vm1-2026-01-02.caibx", "--chunk-size=4096:16384:65536").parent
    async with opened(root, workers) as repository:
        check = await repository.verify(level)
    assert (check.findings, check.unread) == ([], [])
    assert (check.points, check.disks) == (2, 2)
    assert "an index carries no checksum" in check.unchecked[0]
    assert any("no chunk was read" in text for text in check.unchecked) == (level == "structure")


async def test_damage_is_named_with_whom_it_hurts(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = [5000, 10_000, 15_000, 20_000]
    written(tmp_path / "vm1-2026-01-01.caibx", CONTENT, cuts)
    written(tmp_path / "vm1-2026-01-02.caibx", CONTENT[5000:], [5000, 10_000, 15_000])
    store = tmp_path / "default.castr"
    missing = chunk_file(store, content_id(CONTENT[5000:10_000]))
    missing.unlink()
    broken = chunk_file(store, content_id(CONTENT[15_000:]))
    broken.write_bytes(broken.read_bytes()[:-1])
    (tmp_path / "vm2.caibx").write_bytes(
        index([(5000, bytes(32)), (4000, bytes(32)), (9000, bytes(32))], (1024, 4096, 16384))
    )
    seen: list[bytes] = []
    once = ChunkStores.read

    def watched(self: ChunkStores, id_: bytes, length: int) -> tuple[bytes, int]:
        seen.append(id_)
        return once(self, id_, length)

    monkeypatch.setattr(ChunkStores, "read", watched)
    async with opened(tmp_path, workers) as repository:
        shallow = await repository.verify("structure")
        check = await repository.verify("chunks")
        points = await repository.points("vm1")
        later = await repository.verify("packs", points[1:])
    found = {finding.key: finding for finding in check.findings}
    names = [str(path.relative_to(tmp_path)) for path in (missing, broken)]
    assert set(found) == {"vm2.caibx", *names}
    assert [(hurt.point, hurt.ranges) for hurt in found[names[0]].hurts] == [
        ("vm1/2026-01-01", [(5000, 5000)]),
        ("vm1/2026-01-02", [(0, 5000)]),
    ]
    assert [(hurt.point, hurt.ranges) for hurt in found[names[1]].hurts] == [
        ("vm1/2026-01-01", [(15_000, 5000)]),
        ("vm1/2026-01-02", [(10_000, 5000)]),
    ]
    assert {finding.key for finding in shallow.findings} == {"vm2.caibx", names[0]}
    assert {finding.key for finding in later.findings} == set(names)
    assert [len(finding.hurts) for finding in later.findings] == [1, 1]
    assert len(seen) == 4 + 3


async def test_without_a_store_nothing_is_claimed(tmp_path: Path, workers: Workers) -> None:
    written(tmp_path / "vm1.caibx", CONTENT, [10_000, 20_000], store="elsewhere")
    async with opened(tmp_path, workers) as repository:
        check = await repository.verify("chunks")
    assert check.findings == []
    assert "no chunk store beside it" in check.unread[0]


@pytest.mark.parametrize("which", ["index", "chunk"])
def test_flipped_bytes(tmp_path: Path, which: str) -> None:
    """A DiskError of one line, or the right bytes."""
    cuts = [5000, 9000, 15_000, 20_000]
    path = written(tmp_path / "vm1.caibx", CONTENT, cuts)
    victim = path
    if which == "chunk":
        victim = chunk_file(tmp_path / "default.castr", content_id(CONTENT[5000:9000]))
    good = victim.read_bytes()

    async def attempt(workers: Workers) -> None:
        async with asyncio.timeout(PATIENCE_S), opened(tmp_path, workers) as repository:
            for point in await repository.points():
                for facts in point.disks:
                    disk = await repository.open_disk(point, facts.name)
                    try:
                        for offset in range(0, min(disk.size, 25_000), 1000):
                            length = min(1000, disk.size - offset)
                            try:
                                found = await read(disk, offset, length)
                            except NbdsrvError as error:
                                _one_line(error)
                                continue
                            assert found == CONTENT[offset : offset + length]
                    finally:
                        await disk.close()
            await repository.verify("chunks")

    with threads() as (runner, workers):

        @settings(max_examples=100)
        @given(mutations(len(good)), st.integers(0, len(good)) | st.none())
        def change(changes: list[Mutation], cut: int | None) -> None:
            mutant = bytearray(good)
            for position, data in changes:
                mutant[position : position + len(data)] = data
            victim.write_bytes(mutant[:cut])
            try:
                runner.run(attempt(workers))
            except NbdsrvError as error:
                _one_line(error)

        change()


def _one_line(error: Exception) -> None:
    assert "\n" not in str(error)


def test_an_index_that_claims_to_be_endless(tmp_path: Path) -> None:
    """Sparse files of a TiB: nothing of it is read but its ends."""
    path = tmp_path / "vm1.caibx"
    good = index([(1 << 40, bytes(32))], (1, 1, 1 << 16))
    with path.open("wb") as file:
        count = 1 << 34
        file.truncate(104 + 40 * count)
        file.write(good[:64])
        file.seek(64 + 40 * (count - 1))
        file.write((1 << 40).to_bytes(8, "little"))
        file.seek(64 + 40 * count)
        file.write(good[-40:-16] + (56 + 40 * count).to_bytes(8, "little") + good[-8:])
    (tmp_path / "default.castr").mkdir()
    with threads() as (runner, workers):

        async def attempt() -> None:
            async with opened(tmp_path, workers) as repository:
                (point,) = await repository.points()
                assert point.flags == ()
                disk = await repository.open_disk(point, "disk")
                try:
                    await read(disk, 1 << 39, 10)
                finally:
                    await disk.close()

        with pytest.raises(NbdsrvError, match="chunk 17179869183 from 0 to"):
            runner.run(attempt())
