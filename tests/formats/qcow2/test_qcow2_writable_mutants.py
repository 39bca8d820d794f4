"""Writing to images with flipped bytes: only a DiskError may leave, in time, and no descriptor."""

import asyncio
import os
import shutil
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.opening import Opening, open_image
from tests.disk.reading import content
from tests.formats.images import Image
from tests.formats.mutants import INTERESTING, Mutation, threads
from tests.formats.qcow2.peer import qemu_img
from tests.formats.qcow2.texts import compressed

EXAMPLES = 3000 if os.environ.get("NBDSRV_FUZZ") == "full" else 60
PATIENCE_S = 20
CLUSTER = 1024
SMALL = Image("small", 100 * CLUSTER, ((0, 30_000), (50_000, 9000)))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mutants")
    path, _ = compressed(directory, SMALL, "-o", f"cluster_size={CLUSTER}")
    qemu_img("bitmap", "--add", path, "b0")
    qemu_img("snapshot", "-c", "before", path)
    qemu_img("snapshot", "-c", "again", path)
    return path


def words(path: Path) -> list[int]:
    """Where something other than zero stands in what is not guest data: worth a change."""
    content = path.read_bytes()
    return [at for at in range(0, len(content) - 8, 8) if any(content[at : at + 8])]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[asyncio.Runner, Workers]]:
    with threads() as found:
        yield found


async def tolerated(work: Coroutine[Any, Any, Any]) -> Any:
    """Its result, None if it raises a DiskError of one line."""
    message = ""
    try:
        return await work
    except DiskError as error:
        message = str(error)
    assert message.count("\n") == 0
    return None


async def attempt(path: Path, workers: Workers) -> None:
    """Whatever fails, the rest is tried nevertheless."""
    async with asyncio.timeout(PATIENCE_S):
        opening = open_image(str(path), "qcow2", Opening(workers, writable=True))
        disk = await tolerated(opening)
        if disk is None:
            return
        end = min(disk.size, SMALL.size)
        data = memoryview(b"change" * end)
        for offset, length in ((0, 10), (2000, 5000), (40_000, 20_000), (0, end), (end - 5, 5)):
            start, count = max(offset, 0), max(min(length, end - offset), 0)
            await tolerated(disk.write(start, data[:count]))
            await tolerated(disk.trim(start, count))
            await tolerated(disk.flush())
            await tolerated(disk.zero(start, count, punch=True, fast=False))
            await tolerated(content(disk, start, count))
        await tolerated(disk.close())


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_only_disk_errors_leave(
    image: Path, running: tuple[asyncio.Runner, Workers], data: st.DataObject
) -> None:
    places = st.sampled_from(words(image)).flatmap(lambda at: st.integers(at, at + 7))
    changes = st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=4)
    mutants: list[Mutation] = data.draw(
        st.lists(st.tuples(places, changes), min_size=1, max_size=4)
    )
    runner, workers = running
    path = image.with_name("mutant.qcow2")
    shutil.copyfile(image, path)
    with path.open("r+b") as file:
        for position, value in mutants:
            file.seek(position)
            file.write(value)
    before = os.listdir("/proc/self/fd")
    runner.run(attempt(path, workers))
    assert os.listdir("/proc/self/fd") == before
