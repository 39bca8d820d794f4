"""Slices: what lies outside cannot be reached, and errors are where the slice has them."""

import errno
from pathlib import Path

import pytest

from nbdsrv.disk.runs import FileRun, RemoteRun
from nbdsrv.disk.slice import Slice
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.raw import open_raw
from tests.disk.reading import content
from tests.disk.slow_disk import image, opened

SIZE = 1 << 20
BASE, LENGTH = 4096, 65536


@pytest.mark.parametrize(("base", "size"), [(-1, 10), (0, SIZE + 1), (SIZE, 1), (10, -1)])
async def test_a_range_that_is_not_there_is_refused(
    base: int, size: int, tmp_path: Path, workers: Workers
) -> None:
    image(tmp_path, SIZE)
    inside = await opened(tmp_path, workers)
    with pytest.raises(DiskError):
        Slice(workers, inside, base, size)
    await inside.close()


async def test_addresses_are_handed_out_as_far_as_the_slice_goes(
    tmp_path: Path, workers: Workers
) -> None:
    image(tmp_path, SIZE)
    inside = await open_raw(str(tmp_path / "disk"), workers, writable=True)
    part = Slice(workers, inside, BASE, LENGTH)
    [run] = await part.runs(100, 200)
    assert isinstance(run, FileRun)
    assert (run.position, run.length) == (BASE + 100, LENGTH - 100)
    placed = part.place(100, 200)
    assert placed is not None
    assert (placed.position, placed.length) == (BASE + 100, LENGTH - 100)
    before = part.epoch
    await part.trim(0, 4096)
    assert part.epoch != before
    await part.close()


async def test_a_slice_of_what_is_elsewhere_is_elsewhere(tmp_path: Path, workers: Workers) -> None:
    image(tmp_path, SIZE)
    part = Slice(workers, await opened(tmp_path, workers), BASE, LENGTH)
    assert list(await part.runs(100, 200)) == [RemoteRun(200)]
    await part.close()


async def test_an_error_is_where_the_slice_has_it(tmp_path: Path, workers: Workers) -> None:
    golden = image(tmp_path, SIZE)
    inside = await opened(tmp_path, workers)
    inside.bad = BASE + 1000
    part = Slice(workers, inside, BASE, LENGTH)
    with pytest.raises(DiskError) as raised:
        await content(part, 0, LENGTH)
    assert (raised.value.offset, raised.value.errno) == (1000, errno.EIO)
    assert await content(part, 1001, 500) == golden[BASE + 1001 : BASE + 1501]
    await part.close()
