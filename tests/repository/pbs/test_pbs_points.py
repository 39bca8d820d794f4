"""Points of a datastore: names, selectors, what a second listing costs, and what is damaged."""

import os
import shutil
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, PointMissing, RepositoryError
from nbdsrv.repository.pbs.layout import disk_names, group_path
from nbdsrv.repository.pbs.listing import Listing
from nbdsrv.repository.selector import select
from nbdsrv.store.directory_tree import DirectoryTree
from tests.repository.pbs.encoder import Datastore
from tests.repository.pbs.opened import T0, golden, open_disk, opened


async def test_groups_namespaces_and_points(store: Datastore, workers: Workers) -> None:
    store.snapshot("vm/100", T0, {"drive-scsi0": golden(), "drive-efidisk0": b"e" * 528})
    store.snapshot("vm/100", T0 + 86400, {"drive-scsi0": golden()}, notes="before", protected=True)
    store.snapshot("a/b/vm/100", T0, {"drive-virtio0": golden()})
    store.snapshot("vm/host/x.y", T0, {"disk": golden()})
    store.snapshot("ct/7", T0, {}, unprotected={"verify_state": {"state": "failed"}})
    async with opened(store.root, workers) as repository:
        assert await repository.groups() == ["a/b/vm/100", "ct/7", "vm/100", "vm/host/x.y"]
        points = await repository.points()
        assert [(each.group, each.id) for each in points] == [
            ("a/b/vm/100", "2026-01-01T00:00:00Z"),
            ("ct/7", "2026-01-01T00:00:00Z"),
            ("vm/100", "2026-01-01T00:00:00Z"),
            ("vm/100", "2026-01-02T00:00:00Z"),
            ("vm/host/x.y", "2026-01-01T00:00:00Z"),
        ]
        assert all(each.stamp == each.id for each in points)
        assert points[1].flags == ("verify-failed",)
        assert points[1].disks == ()
        first, second = await repository.points("vm/100")
        assert [(disk.name, disk.size) for disk in first.disks] == [
            ("drive-scsi0", len(golden())),
            ("drive-efidisk0", 528),
        ]
        assert (second.flags, second.facts["notes"]) == (("protected",), "before")
        assert second.facts["archives"] == ["qemu-server.conf.blob"]
        assert points[0].facts["namespace"] == "a/b"
        assert await repository.points("vm/101") == []
        assert await repository.points("nothing/like/it") == []
        for selector, wanted in {
            "vm/100/drive-scsi0@2026-01-02": second,
            "vm/100/drive-scsi0": second,
            "vm/100@2026-01-02": second,
            "vm/100/scsi0@2026-01-02": second,
            "efidisk0": first,
            "vm/100/drive-efidisk0": first,
            "a/b/vm/100": points[0],
            "drive-virtio0@latest": points[0],
        }.items():
            assert (await select(repository, selector)).point == wanted
        with pytest.raises(RepositoryError, match="may mean several disks"):
            await select(repository, "vm/100@2026-01-01")
        disk = await repository.open_disk(first, "efidisk0")
        assert (disk.size, disk.name.rpartition("#")[2]) == (
            528,
            f"vm/100/drive-efidisk0@{first.id}",
        )
        await disk.close()
        with pytest.raises(PointMissing, match="no disk 'sda'; it has drive-scsi0"):
            await repository.open_disk(first, "sda")


def test_names() -> None:
    assert group_path("vm/100") == "vm/100"
    assert group_path("a/vm/100") == "ns/a/vm/100"
    assert group_path("vm/vm/100") == "ns/vm/vm/100"
    for odd in (
        "",
        "vm",
        "vm/",
        "vm/..",
        "../vm/1",
        "x/100",
        "a//vm/1",
        "/vm/1",
        "a/" * 9 + "vm/1",
    ):
        assert group_path(odd) is None, odd
    assert disk_names(["a.img.fidx", "a.fidx", "root.pxar.didx", "b.fidx", "c.blob"]) == {
        "a": "a.fidx",
        "a.img": "a.img.fidx",
        "b": "b.fidx",
    }


async def test_what_comes_goes_and_changes_is_noticed(store: Datastore, workers: Workers) -> None:
    first = store.snapshot("vm/1", T0, {"d": b"x" * 100})
    async with opened(store.root, workers) as repository:
        (before,) = await repository.points()
        assert (await repository.points())[0] is before, "read again though nothing has changed"
        store.snapshot("vm/1", T0 + 60, {"d": b"y" * 100})
        points = await repository.points()
        assert (points[0] is before, len(points)) == (True, 2)
        (first / ".protected").touch()
        (again, _) = await repository.points()
        assert again.flags == ("protected",)
        shutil.rmtree(first)
        assert len(await repository.points()) == 1
        with pytest.raises(PointMissing, match="has been removed"):
            await repository.open_disk(before, "d")
        shutil.rmtree(store.root / "vm")
        assert await repository.points() == []
        assert await repository.groups() == []


def test_a_second_listing_reads_no_manifest(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in range(5):
        store.snapshot("vm/1", T0 + 86400 * day, {"d": b"x" * 100})
    tree = DirectoryTree(str(store.root))
    listing = Listing(tree, [])
    before = listing.rows()
    monkeypatch.setattr(DirectoryTree, "read", None)
    assert listing.rows() == before
    tree.close()


async def test_an_unfinished_backup_is_no_point(store: Datastore, workers: Workers) -> None:
    store.snapshot("vm/1", T0, {"d": b"x" * 100})
    store.snapshot("vm/1", T0 + 60, {"d": b"x" * 100}, finished=False)
    store.snapshot("vm/2", T0 + 60, {"d": b"x" * 100}, finished=False)
    async with opened(store.root, workers) as repository:
        assert len(await repository.points()) == 1
        assert await repository.groups() == ["vm/1"]
        check = await repository.verify("structure")
        assert [note.text.split(":")[0] for note in check.notes] == ["vm/1", "vm/2"]
        assert check.findings == []


async def test_a_broken_manifest_spoils_its_own_point_only(
    store: Datastore, workers: Workers
) -> None:
    bad = store.snapshot("vm/1", T0, {"d": golden()})
    store.snapshot("vm/1", T0 + 60, {"d": golden()})
    other = store.snapshot("vm/2", T0, {"d": golden()})
    path = bad / "index.json.blob"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    shutil.copy(store.directory("vm/1", T0 + 60) / path.name, other / path.name)
    async with opened(store.root, workers) as repository:
        one, two, three = await repository.points()
        assert (one.flags, one.disks) == (("damaged",), ())
        assert f"{path}: its CRC-32 is wrong" in one.facts["reason"]
        assert "is of another snapshot: vm/1/1767225660" in three.facts["reason"]
        with pytest.raises(CorruptImage, match="CRC-32"):
            await repository.open_disk(one, "d")
        disk = await repository.open_disk(two, "d")
        await disk.close()
        check = await repository.verify("structure")
        assert [each.key for each in check.findings] == [
            "vm/1/2026-01-01T00:00:00Z/index.json.blob",
            "vm/2/2026-01-01T00:00:00Z/index.json.blob",
        ]


async def test_a_missing_index_leaves_the_other_disks(store: Datastore, workers: Workers) -> None:
    path = store.snapshot("vm/1", T0, {"a": golden(), "b": golden(2)})
    (path / "a.img.fidx").unlink()
    async with opened(store.root, workers) as repository:
        (point,) = await repository.points()
        assert (point.flags, [disk.name for disk in point.disks]) == (("partial",), ["b"])
        with pytest.raises(CorruptImage, match=r"a\.img\.fidx is missing"):
            await repository.open_disk(point, "a")
        await (await repository.open_disk(point, "b")).close()
        (finding,) = (await repository.verify("chunks")).findings
        assert finding.key.endswith("a.img.fidx")
        (path / "b.img.fidx").unlink()
        (point,) = await repository.points()
        assert (point.flags, point.disks) == (("damaged",), ())


async def test_what_is_no_datastore(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(RepositoryError, match="no datastore of Proxmox Backup Server"):
        async with opened(tmp_path, workers):
            pass


@pytest.mark.parametrize("how", ["disk", "directory", "manifest", "chunk", "namespaces"])
async def test_links_lead_nowhere_out(
    store: Datastore, workers: Workers, tmp_path: Path, how: str
) -> None:
    path = store.snapshot("vm/1", T0, {"d": golden()})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret" * 4096)
    victim = {
        "disk": path / "d.img.fidx",
        "manifest": path / "index.json.blob",
        "directory": store.root / "vm" / "2",
        "chunk": next(each for each in (store.root / ".chunks").rglob("*") if each.is_file()),
        "namespaces": store.root / "ns",
    }[how]
    if victim.exists():
        victim.unlink()
    if how == "namespaces":
        victim.mkdir()
        (victim / "up").symlink_to("..")  # endless, but for the depth the format allows
        (victim / "down").symlink_to(".")
    else:
        victim.symlink_to(outside / "secret" if how != "directory" else outside)
    async with opened(store.root, workers) as repository:
        points = await repository.points()
        if how == "namespaces":
            assert 2 <= len(points) <= 1000
            return
        assert all(point.group == "vm/1" for point in points)
        if how == "chunk":
            disk = await repository.open_disk(points[0], "d")
            with pytest.raises(CorruptImage, match="leads out"):
                await disk.read_into(0, memoryview(bytearray(disk.size)))
            await disk.close()
    assert os.listdir(outside) == ["secret"]


async def test_an_open_disk_outlives_its_repository(store: Datastore, workers: Workers) -> None:
    content = golden()
    store.snapshot("vm/1", T0, {"d": content})
    disk = await open_disk(store.root, workers)
    buffer = bytearray(len(content))
    await disk.read_into(0, memoryview(buffer))
    assert bytes(buffer) == content
    await disk.close()
