"""Chains, names and layouts that no fixture has, in repositories made to measure."""

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import PointMissing, RepositoryError
from nbdsrv.repository.repository import CHANGED_SINCE
from nbdsrv.repository.selector import select
from nbdsrv.store.tree import Tree
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content
from tests.repository.xo.made import BLOCK, VM, Layer, Made, bits
from tests.repository.xo.opened import contents, opened, opener

A, B, C, D = (f"2026020{day}T000000Z" for day in (1, 2, 3, 4))
OTHER = "c1b8f5d3-6e20-4d9f-8b64-0000000000bb"


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(4096) * (BLOCK // 4096)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "xo")


LAYOUTS = ("vhd", "none", "gzip", "brotli")


@pytest.mark.parametrize("top", LAYOUTS)
@pytest.mark.parametrize("base", LAYOUTS)
async def test_partial_bitmaps_let_any_layout_below_through(
    made: Made, base: str, top: str, workers: Workers
) -> None:
    size = 3 * BLOCK + 512
    last = bytes(512) + bytes(BLOCK - 512)
    made.point(A, [Layer(A, size, {0: block(1), 1: block(2), 3: last}, layout=base)])
    some = bits([0, 1, 2, 130, *range(1000, 1500), 4095])
    delta = Layer(B, size, {0: block(3), 1: block(4), 2: block(5)}, {0: some, 2: some}, top, A)
    made.point(B, [delta])
    async with opened(made.root, workers) as repository:
        assert await contents(repository, f"web@{B}") == made.content(B)
        disk = await repository.open_disk((await repository.points())[-1], "root")
        try:
            golden = made.content(B)
            for at in (
                0,
                511,
                512 * 3,
                512 * 130,
                512 * 1499,
                BLOCK - 1,
                2 * BLOCK + 700,
                size - 9,
            ):
                assert await content(disk, at, 9) == golden[at : at + 9], at
        finally:
            await disk.close()
        done = await repository.verify("chunks")
        assert done.findings == []


async def test_the_contract_over_a_mixed_chain(made: Made, workers: Workers) -> None:
    some = bits([*range(7), *range(2000, 2200)])
    made.point(A, [Layer(A, 2 * BLOCK, {0: block(1)}, layout="vhd")])
    made.point(B, [Layer(B, 2 * BLOCK, {0: block(2), 1: block(3)}, {1: some}, "gzip", A)])
    made.point(C, [Layer(C, 2 * BLOCK + 1000, {2: block(4)}, {}, "none", B)])
    made.point(D, [Layer(D, 2 * BLOCK + 1000, {0: block(5)}, {0: some}, "vhd", C)])
    async with opened(made.root, workers) as repository:
        point = (await repository.points())[-1]
        await check_disk(opener(repository, point, "root"), made.content(D))


async def test_disks_that_grow(made: Made, workers: Workers) -> None:
    made.point(A, [Layer(A, BLOCK + 4096, {0: block(1), 1: block(2)})])  # garbage behind its end
    made.point(B, [Layer(B, 3 * BLOCK, {2: block(3)}, parent=A)])
    async with opened(made.root, workers) as repository:
        first, second = await repository.points()
        assert [point.disks[0].size for point in (first, second)] == [BLOCK + 4096, 3 * BLOCK]
        found = await contents(repository, f"web@{B}")
        assert found == made.content(B)
        assert not any(found[BLOCK + 4096 : 2 * BLOCK])
        disk = await repository.open_disk(second, "root")
        flags = await extent_map(disk, CHANGED_SINCE + A)
        await disk.close()
        assert flags == bytes(BLOCK + 4096) + b"\1" * (2 * BLOCK - 4096)


@pytest.mark.parametrize("algorithm", ["chacha20-poly1305", "aes-256-gcm"])
async def test_encrypted_and_the_wrong_key(
    tmp_path: Path, algorithm: str, workers: Workers
) -> None:
    made = Made(tmp_path / "xo", algorithm)
    made.point(A, [Layer(A, BLOCK, {0: block(1)}, layout="none")])
    async with opened(made.root, workers) as repository:
        assert await contents(repository, "web") == block(1)
    for key, said in (("f" * 32, "does not open"), ("short", "32 characters, this one 5")):
        with pytest.raises(RepositoryError, match=said):
            async with opened(made.root, workers, key):
                pass
    # Remotes from before encryption.json: the cipher is found out.
    (made.root / "encryption.json").unlink()
    async with opened(made.root, workers) as repository:
        assert await contents(repository, "web") == block(1)


async def test_names_for_vms_and_disks(made: Made, workers: Workers) -> None:
    disks = [Layer(A, BLOCK, {0: block(n)}, name=name) for n, name in enumerate("xyz")]
    made.point(A, disks, label="db")
    made.point(B, [Layer(B, BLOCK, {0: block(9)}, name="x")], vm=OTHER, label="db")
    async with opened(made.root, workers) as repository:
        names = ["db (b0a7e4c2)", "db (c1b8f5d3)"]
        assert await repository.groups() == names
        points = await repository.points()
        assert [point.group for point in points] == names
        for selector in (
            f"{VM}/y@{A}",
            f"{names[0]}/xvdb",
            f"{VM}/{points[0].disks[1].aliases[1]}",
        ):
            chosen = await select(repository, selector)
            assert (chosen.point.group, chosen.disk) == (names[0], "y")
            assert await contents(repository, selector) == block(1)
        with pytest.raises(PointMissing):
            await select(repository, f"{VM}/xvdd")


async def test_disks_of_one_name_are_told_apart(made: Made, workers: Workers) -> None:
    made.point(A, [Layer(A, BLOCK, {0: block(n)}, name=f"n{n}") for n in range(3)])
    path = made.root / made.vm() / f"{A}.json"
    text = path.read_text().replace('"name_label": "n0"', '"name_label": "same"')
    path.write_text(
        text.replace('"name_label": "n1"', '"name_label": "same"').replace('"n2"', '""')
    )
    async with opened(made.root, workers) as repository:
        (point,) = await repository.points()
        assert [disk.name for disk in point.disks] == ["same (xvda)", "same (xvdb)", "xvdc"]
        assert await contents(repository, "web/same (xvdb)") == block(1)


async def test_a_running_job_and_strangers_are_shown_or_passed_over(
    made: Made, workers: Workers
) -> None:
    made.point(A, [Layer(A, BLOCK, {0: block(1)})])
    (made.root / f"{made.vm()}.lock").mkdir()
    (made.root / "xo-vm-backups/.queue/clean-vm").mkdir(parents=True)
    made.file(f"{made.vm()}/.1234.{B}.json", b"half")
    made.file(f"{made.vm()}/cache.json.gz", b"lies")
    made.file(f"{made.vm()}/notes.json", b"{}")
    async with opened(made.root, workers) as repository:
        (point,) = await repository.points()
        assert point.flags == ("locked",)
        assert await contents(repository, "web") == block(1)


async def test_an_alias_that_is_a_directory_and_one_that_leads_to_a_file(
    made: Made, workers: Workers
) -> None:
    made.point(A, [Layer(A, BLOCK, {0: block(1)})])
    made.point(B, [Layer(B, BLOCK, {0: block(2)}, layout="vhd")])
    directory = made.root / made.vdi()
    alias = directory / f"{A}.alias.vhd"
    alias.unlink()
    (directory / "data" / f"{A}.vhd").rename(alias)
    (directory / f"{B}.vhd").rename(directory / "data" / "plain")
    (directory / f"{B}.alias.vhd").write_text(" ./data/plain\n")
    json = made.root / made.vm() / f"{B}.json"
    json.write_text(json.read_text().replace(f"{B}.vhd", f"{B}.alias.vhd"))
    async with opened(made.root, workers) as repository:
        assert await contents(repository, f"web@{A}") == block(1)
        assert await contents(repository, f"web@{B}") == block(2)


class Counted:
    """Counts what is read of a tree."""

    def __init__(self, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[str] = []
        for name in ("read", "open_file", "read_range"):
            monkeypatch.setattr(tree, name, self._counting(getattr(tree, name)))

    def _counting(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(path: str, *arguments: object) -> object:
            self.reads.append(path)
            return call(path, *arguments)

        return counted


async def test_a_second_listing_reads_nothing_and_sees_what_is_new_and_gone(
    made: Made, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.point(A, [Layer(A, BLOCK, {0: block(1)})])
    made.point(B, [Layer(B, BLOCK, {0: block(2)}, parent=A)])
    async with opened(made.root, workers) as repository:
        await repository.points()
        counted = Counted(repository._remote.tree, monkeypatch)
        assert [point.flags for point in await repository.points()] == [(), ()]
        assert counted.reads == []
        made.point(C, [Layer(C, BLOCK, {0: block(3)}, parent=B)])
        assert [point.id for point in await repository.points()] == [A, B, C]
        assert len(counted.reads) == 5  # JSON, alias, filters, header, footer
        (made.root / made.vm() / f"{C}.json").unlink()
        assert [point.id for point in await repository.points()] == [A, B]
        os.unlink(made.root / made.vdi() / f"{A}.alias.vhd")
        damaged, after = await repository.points()
        assert (damaged.flags, after.flags) == (("damaged",), ("damaged",))
        assert "is missing" in damaged.facts["reason"]
        assert "(the parent of" in after.facts["reason"]


async def test_disks_outlive_the_repository_they_are_opened_from(
    made: Made, workers: Workers
) -> None:
    made.point(A, [Layer(A, BLOCK, {0: block(1)})])
    async with opened(made.root, workers) as repository:
        (point,) = await repository.points()
        disk = await repository.open_disk(point, "root")
    assert await content(disk, 0, BLOCK) == block(1)
    await disk.close()
    await disk.close()
    with pytest.raises(RepositoryError, match="closed"):
        await repository.points()


async def test_no_repository_of_xen_orchestra(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(RepositoryError, match="there is no xo-vm-backups/"):
        async with opened(tmp_path, workers):
            pass


@pytest.mark.parametrize("layout", ["vhd", "brotli"])
async def test_opening_may_be_cancelled_at_any_moment(
    made: Made, layout: str, workers: Workers
) -> None:
    made.point(A, [Layer(A, BLOCK, {0: block(1)}, layout=layout)])
    made.point(B, [Layer(B, BLOCK, {}, layout=layout, parent=A)])
    async with opened(made.root, workers) as repository:
        point = (await repository.points())[-1]
        before = len(os.listdir("/proc/self/fd"))
        for patience in range(12):
            task = asyncio.ensure_future(repository.open_disk(point, "root"))
            for _ in range(patience):
                await asyncio.sleep(0.0005)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await task.result().close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert await contents(repository, f"web@{B}") == block(1)
    assert len(os.listdir("/proc/self/fd")) < before  # the tree's own is closed
