"""What every format with tables stands on: pages, runs, extents, backing, within bounds.

The format here is the simplest there can be: a list of segments. Real ones are tested beside it.
"""

import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import BlockRun, FileRun, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats import paged
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.page import Kind, Page, Segment
from nbdsrv.formats.raw import open_raw
from protocol.contexts import ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ZERO
from tests.disk.check_disk import check_disk, extent_map
from tests.disk.reading import content

CLUSTER = 4096
PER_PAGE = 8


class ListDisk(MappedDisk):
    """``clusters``: one (kind, position) each; BLOCK positions are those of zlib streams."""

    format = "list"
    page_span = PER_PAGE * CLUSTER

    def __init__(
        self,
        workers: Workers,
        file: ImageFile,
        size: int,
        clusters: Sequence[tuple[Kind, int]],
        backing: Disk | None = None,
    ) -> None:
        super().__init__(workers, file, backing)
        self.size = size
        self.clusters = clusters
        self.pages_read: list[int] = []

    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        self.pages_read.append(offset)
        for at in range(offset, offset + length, CLUSTER):
            kind, position = self.clusters[at // CLUSTER]
            if position < 0:
                raise self.file.corrupt(at, "a cluster before the beginning")
            yield Segment(min(CLUSTER, offset + length - at), kind, position)

    def _decode(self, key: int) -> bytes:
        return zlib.decompressobj().decompress(self.file.read_up_to(key, 2 * CLUSTER))


class Made:
    """An image of random clusters in a file, and what it reads as over ``below``."""

    def __init__(self, path: Path, size: int, seed: int, below: bytes = b"") -> None:
        chance = random.Random(seed)
        below = below[:size].ljust(size, b"\0")
        self.path, self.size = str(path), size
        self.clusters: list[tuple[Kind, int]] = []
        golden = bytearray()
        file = bytearray(b"header")
        for at in range(0, size, CLUSTER):
            length = min(CLUSTER, size - at)
            kind = chance.choice((Kind.DATA, Kind.DATA, Kind.BLOCK, Kind.ZERO, Kind.ABSENT))
            if chance.random() < 0.3:
                file += b"some garbage between"
            position = len(file)
            data = chance.randbytes(16) * (CLUSTER // 16)
            if kind is Kind.DATA:
                file += data
            elif kind is Kind.BLOCK:
                file += zlib.compress(data)
            else:
                position = 0
            shown = {Kind.ZERO: bytes(length), Kind.ABSENT: below[at : at + length]}
            golden += shown.get(kind, data[:length])
            self.clusters.append((kind, position))
        path.write_bytes(file)
        self.golden = bytes(golden)

    def open(self, workers: Workers, backing: Disk | None = None) -> ListDisk:
        return ListDisk(workers, open_image_file(self.path), self.size, self.clusters, backing)


@pytest.mark.parametrize("size", [1, CLUSTER, 100 * CLUSTER, 77 * CLUSTER + 5])
async def test_the_contract_of_disks(workers: Workers, tmp_path: Path, size: int) -> None:
    image = Made(tmp_path / "image", size, seed=size)

    async def opened() -> Disk:
        return image.open(workers)

    await check_disk(opened, image.golden)


@pytest.mark.parametrize("below", [0, 30 * CLUSTER + 3, 90 * CLUSTER], ids=["no", "short", "long"])
async def test_the_contract_over_a_backing_chain(
    workers: Workers, tmp_path: Path, below: int
) -> None:
    (tmp_path / "raw").write_bytes(random.Random(1).randbytes(below))
    middle = Made(tmp_path / "middle", below, 2, (tmp_path / "raw").read_bytes())
    top = Made(tmp_path / "top", 70 * CLUSTER + 9, 3, middle.golden)

    async def opened() -> Disk:
        raw = await open_raw(str(tmp_path / "raw"), workers, writable=False)
        return top.open(workers, middle.open(workers, raw))

    await check_disk(opened, top.golden)


async def test_states_and_depths_of_a_chain(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    A, D, Z = Kind.ABSENT, Kind.DATA, Kind.ZERO
    below = [(D, 0), (D, 4096), (D, 8192), (A, 0), (A, 0), (Z, 0)]
    top = [(D, 0), (Z, 0), (A, 0), (Z, 0), (A, 0), (A, 0), (A, 0)]

    def opened(clusters: list[tuple[Kind, int]], backing: Disk | None = None) -> ListDisk:
        file = open_image_file(str(tmp_path / "file"))
        return ListDisk(workers, file, len(clusters) * CLUSTER, clusters, backing)

    disk = opened(top, opened(below))
    states = await extent_map(disk)
    assert [DATA, ZERO, DATA, ZERO, HOLE, ZERO, HOLE] == list(states[::CLUSTER])
    depths = await extent_map(disk, ALLOCATION_DEPTH)
    assert [1, 1, 2, 1, 0, 2, 0] == list(depths[::CLUSTER])
    await disk.close()


async def test_runs_merge_where_the_file_goes_on(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(20 * CLUSTER))
    clusters = [(Kind.DATA, (at + 1) * CLUSTER) for at in range(2 * PER_PAGE)]
    file = open_image_file(str(tmp_path / "file"))
    disk = ListDisk(workers, file, len(clusters) * CLUSTER, clusters)
    assert disk.locate(0, 1) is None
    whole = await disk.runs(100, 2 * PER_PAGE * CLUSTER - 100)
    assert [(FileRun, CLUSTER + 100, 2 * PER_PAGE * CLUSTER - 100)] == [
        (type(run), run.position, run.length) for run in whole if isinstance(run, FileRun)
    ]
    first = disk.locate(5, 1)
    assert first is not None
    assert PER_PAGE * CLUSTER - 5 == first[0].length, "as far as the page knows"
    await disk.close()


async def test_blocks_and_zeroes_are_told_apart(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(zlib.compress(b"x" * CLUSTER))
    clusters = [(Kind.BLOCK, 0), (Kind.ZERO, 0), (Kind.ABSENT, 0)]
    disk = ListDisk(workers, open_image_file(str(tmp_path / "file")), 3 * CLUSTER, clusters)
    block, zeroes = await disk.runs(10, 2 * CLUSTER)
    assert isinstance(block, BlockRun)
    assert (0, 10, CLUSTER - 10) == (block.key, block.skip, block.length)
    assert ZeroRun(CLUSTER + 10) == zeroes, "zeroes of both kinds are one run"
    assert b"x" * (CLUSTER - 10) + bytes(10) == await content(disk, 10, CLUSTER)
    await disk.close()


async def test_a_page_is_read_once_however_many_want_it(workers: Workers, tmp_path: Path) -> None:
    image = Made(tmp_path / "image", 64 * CLUSTER, seed=5)
    disk = image.open(workers)
    import asyncio

    await asyncio.gather(*(content(disk, at * 100, 5000) for at in range(200)))
    assert len(disk.pages_read) == len(set(disk.pages_read))
    await disk.close()


async def test_memory_is_bounded_and_everything_still_readable(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "MAX_SEGMENTS", 20)
    monkeypatch.setattr(paged, "PAGE_COST", 0)
    monkeypatch.setattr(paged, "AHEAD_SEGMENTS", 10)
    image = Made(tmp_path / "image", 200 * CLUSTER + 1, seed=6)
    disk = image.open(workers)
    for at in range(0, image.size - 3 * CLUSTER, 2 * CLUSTER):
        assert image.golden[at : at + 3 * CLUSTER] == await content(disk, at, 3 * CLUSTER)
        assert disk._segments <= 20 + PER_PAGE
        assert disk._segments == sum(len(page) for page in disk._pages.values())
    assert len(await extent_map(disk)) == image.size
    await disk.close()


async def test_pages_that_say_nothing_are_bounded_too(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty disk of 2 PiB took 670 MB: each of its million pages counted as one segment."""
    monkeypatch.setattr(paged, "MAX_SEGMENTS", 1000)
    image = Made(tmp_path / "image", 1000 * PER_PAGE * CLUSTER, seed=7)
    image.clusters = [(Kind.ABSENT, 0)] * len(image.clusters)
    disk = image.open(workers)
    assert [(image.size, HOLE)] == [(e.length, e.flags) for e in await disk.extents(0, image.size)]
    assert len(disk._pages) * paged.PAGE_COST <= 1000 + paged.PAGE_COST
    await disk.close()


async def test_a_broken_page_spoils_nothing_but_itself(workers: Workers, tmp_path: Path) -> None:
    image = Made(tmp_path / "image", 40 * CLUSTER, seed=8)
    broken = 2 * PER_PAGE + 3
    image.clusters[broken] = (Kind.DATA, -1)
    disk = image.open(workers)
    end = 2 * PER_PAGE * CLUSTER
    assert image.golden[:end] == await content(disk, 0, end)
    with pytest.raises(CorruptImage, match=rf"^corrupt image: .*image at {broken * CLUSTER}: "):
        await content(disk, end + 9 * CLUSTER - CLUSTER * 6, 10)
    after = 3 * PER_PAGE * CLUSTER
    assert image.golden[after : after + 999] == await content(disk, after, 999)
    with pytest.raises(CorruptImage):
        await extent_map(disk)
    await disk.close()


async def test_a_file_that_ends_too_early_is_an_error_where_it_ends(
    workers: Workers, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(CLUSTER + 10))
    clusters = [(Kind.DATA, 0), (Kind.DATA, CLUSTER)]
    disk = ListDisk(workers, open_image_file(str(tmp_path / "file")), 2 * CLUSTER, clusters)
    with pytest.raises(DiskError) as caught:
        await content(disk, 0, 2 * CLUSTER)
    assert CLUSTER + 10 == caught.value.offset
    await disk.close()


async def test_a_block_that_decodes_too_short_is_corrupt(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(zlib.compress(b"x" * 100))
    file = open_image_file(str(tmp_path / "file"))
    disk = ListDisk(workers, file, CLUSTER, [(Kind.BLOCK, 0)])
    with pytest.raises(CorruptImage, match="decodes to 100 bytes only"):
        await content(disk, 0, CLUSTER)
    assert b"x" * 50 == await content(disk, 50, 50)
    await disk.close()


def test_pages_merge_neighbours_only() -> None:
    page = Page(
        1000,
        [
            Segment(10, Kind.DATA, 500),
            Segment(10, Kind.DATA, 510),
            Segment(10, Kind.DATA, 530),
            Segment(5, Kind.ZERO),
            Segment(5, Kind.ZERO),
            Segment(5, Kind.ABSENT),
            Segment(7, Kind.BLOCK, 1),
            Segment(7, Kind.BLOCK, 1),
        ],
    )
    assert [
        (1000, 1020, Kind.DATA, 500, None),
        (1020, 1030, Kind.DATA, 530, None),
        (1030, 1040, Kind.ZERO, 0, None),
        (1040, 1045, Kind.ABSENT, 0, None),
        (1045, 1052, Kind.BLOCK, 1, None),
        (1052, 1059, Kind.BLOCK, 1, None),
    ] == [page.stretch(index) for index in range(len(page))]
