"""Every wrapper keeps the Disk contract, over a file and over a Disk that is elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nbdsrv.disk.cached import Cached
from nbdsrv.disk.deadline import Deadline
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.progress import Progress
from nbdsrv.disk.readahead import ReadAhead
from nbdsrv.disk.slice import Slice
from nbdsrv.disk.throttle import Rate, Throttle
from nbdsrv.disk.workers import Workers
from tests.disk.check_disk import CONTRACT, check_disk
from tests.disk.slow_disk import image, wrapper_opener

SIZE = (1 << 20) + 777
BASE = 12_345
Wrap = Callable[[Workers, Disk], Disk]

WRAPPERS: dict[str, Wrap] = {
    "passthrough": Passthrough,
    "cached": Cached,
    "cached-tiny": lambda workers, inside: Cached(workers, inside, block=4096, limit=16384),
    "read-ahead": ReadAhead,
    "read-ahead-tiny": lambda workers, inside: ReadAhead(
        workers, inside, chunk=16384, window=65536
    ),
    "throttle": lambda workers, inside: Throttle(workers, inside, Rate(1 << 40)),
    "deadline": lambda workers, inside: Deadline(workers, inside, 60.0),
    "progress": lambda workers, inside: Progress(workers, inside, lambda moved: None),
}


@pytest.mark.parametrize("remote", [False, True], ids=["file", "remote"])
@pytest.mark.parametrize("name", WRAPPERS)
async def test_the_contract(name: str, remote: bool, tmp_path: Path, workers: Workers) -> None:
    golden = image(tmp_path, SIZE)
    open_disk = wrapper_opener(
        tmp_path,
        workers,
        lambda inside: WRAPPERS[name](workers, inside),
        remote=remote,
        writable=True,
    )
    await check_disk(open_disk, golden)


@pytest.mark.parametrize("name", WRAPPERS)
async def test_read_only(name: str, tmp_path: Path, workers: Workers) -> None:
    golden = image(tmp_path, SIZE)
    open_disk = wrapper_opener(
        tmp_path,
        workers,
        lambda inside: WRAPPERS[name](workers, inside),
        remote=False,
        writable=False,
    )
    for check in CONTRACT:
        if check.__name__ in {"check_read_only", "check_out_of_range", "check_status"}:
            await check(open_disk, golden)


@pytest.mark.parametrize("remote", [False, True], ids=["file", "remote"])
@pytest.mark.parametrize("size", [0, 1, 4096, SIZE - BASE])
async def test_slices(size: int, remote: bool, tmp_path: Path, workers: Workers) -> None:
    golden = image(tmp_path, SIZE)
    open_disk = wrapper_opener(
        tmp_path,
        workers,
        lambda inside: Slice(workers, inside, BASE, size, "part"),
        remote=remote,
        writable=True,
    )
    await check_disk(open_disk, golden[BASE : BASE + size])
    after = (tmp_path / "disk").read_bytes()
    assert golden[:BASE] == after[:BASE]
    assert golden[BASE + size :] == after[BASE + size :]
