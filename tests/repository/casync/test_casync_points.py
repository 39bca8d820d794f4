"""Indexes as restore points: names, listings, damage, links."""

import os
import random
import shutil
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, PointMissing
from nbdsrv.repository.casync.listing import Listing
from nbdsrv.repository.casync.names import Name, name_of
from nbdsrv.repository.selector import select
from nbdsrv.store.directory_tree import DirectoryTree
from tests.repository.casync.encoder import content_id, index, put_chunk, written
from tests.repository.casync.opening import open_disk, opened

CONTENT = random.Random(1).randbytes(20_000)
DAY = 1767225600.0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("vm1-2026-01-01.caibx", Name("vm1", "disk", "2026-01-01", DAY)),
        ("vm1_20260101.caibx", Name("vm1", "disk", "20260101", DAY)),
        (
            "vm1-2026-01-01T03:00:05Z.caibx",
            Name("vm1", "disk", "2026-01-01T03:00:05Z", DAY + 10805),
        ),
        ("vm1-20260101-0300.caibx", Name("vm1", "disk", "20260101-0300", DAY + 10800)),
        ("a-b.2026-01-01 0300.caibx", Name("a-b", "disk", "2026-01-01 0300", DAY + 10800)),
        ("vm1/2026-01-01T0300.caibx", Name("vm1", "disk", "2026-01-01T0300", DAY + 10800)),
        ("vm1/sda-2026-01-01.caibx", Name("vm1", "sda", "2026-01-01", DAY)),
        ("disk.caibx", Name("disk", "disk", "current", None)),
        ("vm1/sda.caibx", Name("vm1", "sda", "current", None)),
        ("2026-01-01.caibx", Name("here", "disk", "2026-01-01", DAY)),
        ("vm-20261399.caibx", Name("vm-20261399", "disk", "current", None)),
        ("vm-0000-01-01.caibx", Name("vm-0000-01-01", "disk", "current", None)),
        ("img-12345678.caibx", Name("img-12345678", "disk", "current", None)),
    ],
)
def test_names(path: str, name: Name) -> None:
    assert name_of(path, "here") == name


def _index(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(exist_ok=True)
    return written(path, content, [10_000, len(content)])


async def test_a_directory_of_them(tmp_path: Path, workers: Workers) -> None:
    for name in ("vm1-2026-01-01", "vm1-2026-01-02", "web/sda-2026-01-01", "web/sdb-2026-01-01"):
        _index(tmp_path / f"{name}.caibx")
    _index(tmp_path / "alone.caibx")
    os.utime(tmp_path / "alone.caibx", (0, DAY))
    (tmp_path / "tree.caidx").write_bytes(b"a directory's")
    async with opened(tmp_path, workers) as repository:
        assert await repository.groups() == ["alone", "vm1", "web"]
        points = await repository.points()
        assert [(p.group, p.id, [d.name for d in p.disks], p.stamp[:10]) for p in points] == [
            ("alone", "current", ["disk"], "2026-01-01"),
            ("vm1", "2026-01-01", ["disk"], "2026-01-01"),
            ("vm1", "2026-01-02", ["disk"], "2026-01-02"),
            ("web", "2026-01-01", ["sda", "sdb"], "2026-01-01"),
        ]
        for selector, wanted in {
            "vm1/disk@2026-01-01": points[1],
            "vm1": points[2],
            "web/sdb": points[3],
            "alone": points[0],
        }.items():
            assert (await select(repository, selector)).point == wanted
        assert await repository.points("nobody") == []
        with pytest.raises(PointMissing, match="no disk 'sdc'; it has sda, sdb"):
            await repository.open_disk(points[3], "sdc")
        (tmp_path / "vm1-2026-01-01.caibx").unlink()
        _index(tmp_path / "vm1-2026-01-03.caibx")
        assert [p.id for p in await repository.points("vm1")] == ["2026-01-02", "2026-01-03"]
        with pytest.raises(PointMissing, match="has been removed"):
            await repository.open_disk(points[1], "disk")


async def test_one_index(tmp_path: Path, workers: Workers) -> None:
    path = _index(tmp_path / "vm1-2026-01-01.caibx")
    _index(tmp_path / "vm1-2026-01-02.caibx")
    async with opened(path, workers) as repository:
        assert repository.name == str(path)
        (point,) = await repository.points()
        assert point.id == "2026-01-01"
    with pytest.raises(DiskError, match="no such directory"):
        await open_disk(tmp_path / "none.caibx", workers)


async def test_two_of_one_name(tmp_path: Path, workers: Workers) -> None:
    _index(tmp_path / "vm1-2026-01-01.caibx")
    _index(tmp_path / "vm1_2026-01-01.caibx")
    async with opened(tmp_path, workers) as repository:
        (point,) = await repository.points()
        assert [disk.name for disk in point.disks] == ["disk", "vm1_2026-01-01"]
        await (await repository.open_disk(point, "vm1_2026-01-01")).close()


def test_a_second_listing_opens_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _index(tmp_path / "vm1-2026-01-01.caibx")
    tree = DirectoryTree(str(tmp_path))
    listing = Listing(tree)
    before = listing.rows()
    monkeypatch.setattr("nbdsrv.repository.casync.listing.BlobIndex", None)
    assert listing.rows() == before
    tree.close()


async def test_a_broken_index_spoils_its_own_disk_only(tmp_path: Path, workers: Workers) -> None:
    good = _index(tmp_path / "vm1-2026-01-01.caibx").read_bytes()
    bad = tmp_path / "vm1-2026-01-02.caibx"
    for raw, said in (
        (b"", "was it cut short"),
        (good[:100], "was it cut short"),
        (good[:-1], "was it cut short"),
        (good[:64] + good[104:], "a table of"),
        (b"x" + good[1:], "no index of casync"),
        (good[:24] + b"\xff" * 8 + good[32:], "chunks of 18446744073709551615 to"),
        (good[:40] + b"\xff" * 7 + b"\0" + good[48:], "are not served"),
        (good[:104] + b"\xff" * 8 + good[112:], "a disk of"),
        (good[:104] + bytes(8) + good[112:], "a disk of 0 bytes"),
    ):
        bad.write_bytes(raw)
        async with opened(tmp_path, workers) as repository:
            one, two = await repository.points()
            assert (one.flags, two.flags, two.disks) == ((), ("damaged",), ()), said
            assert said in two.facts["reason"]
            assert str(bad) in two.facts["reason"]
            with pytest.raises(DiskError, match=said):
                await repository.open_disk(two, "disk")
    (tmp_path / "web").mkdir()
    shutil.copy(tmp_path / "vm1-2026-01-01.caibx", tmp_path / "web" / "sda.caibx")
    (tmp_path / "web" / "sdb.caibx").write_bytes(b"x")
    async with opened(tmp_path, workers) as repository:
        (point,) = await repository.points("web")
        assert (point.flags, [disk.name for disk in point.disks]) == (("partial",), ["sda"])
        with pytest.raises(CorruptImage, match=r"sdb\.caibx"):
            await repository.open_disk(point, "sdb")


async def test_chunks_that_do_not_follow_each_other(tmp_path: Path, workers: Workers) -> None:
    store = tmp_path / "default.castr"
    ids = [put_chunk(store, CONTENT[at : at + 5000]) for at in range(0, 20_000, 5000)]
    for ends in (
        (5000, 15_000, 10_000, 20_000),
        (5000, 5000, 15_000, 20_000),
        (5000, 10_000, 1 << 60, 20_000),
        (500, 10_000, 15_000, 20_000),
        (20_000, 15_000, 10_000, 20_000),
    ):
        path = tmp_path / "vm1.caibx"
        items = list(zip(ends, ids, strict=True))
        path.write_bytes(index(items, (1024, 4096, 16384)))
        disk = await open_disk(path, workers)
        with pytest.raises(CorruptImage) as caught:
            await disk.read_into(12_000, memoryview(bytearray(10)))
        assert str(path) in str(caught.value)
        await disk.close()


async def test_links_lead_nowhere_out(tmp_path: Path, workers: Workers) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    root.mkdir()
    _index(outside / "secret.caibx")
    (root / "vm1.caibx").symlink_to(outside / "secret.caibx")
    (root / "web").symlink_to(outside)
    (root / "default.castr").symlink_to(outside / "default.castr")
    async with opened(root, workers) as repository:
        assert await repository.points() == []
    (root / "vm2.caibx").write_bytes(index([(5000, content_id(b"x"))], (1024, 4096, 16384)))
    with pytest.raises(DiskError, match="no chunk store"):
        await open_disk(root, workers)
