"""``null:``: everything is read, nothing is kept; and buffers that go round."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nbdsrv.copying.reading import PIECE, Lender
from nbdsrv.copying.target import Place, Target, parse_target
from nbdsrv.copying.writers import Compression, Making, check_making
from nbdsrv.errors import ConfigError


def test_null_is_a_target_of_its_own() -> None:
    assert parse_target("null:") == Target("null:", Place.NOWHERE, "null:", "raw")
    assert parse_target("null:x").place is Place.FILE
    with pytest.raises(ConfigError):
        parse_target("null:", "qcow2")
    with pytest.raises(ConfigError):
        check_making(parse_target("null:"), Making(Compression("zlib")))


def test_all_data_is_read_and_nothing_is_made(tmp_path: Path) -> None:
    source = tmp_path / "disk.img"
    with source.open("wb") as file:
        file.write(b"x" * (5 << 20))
        file.truncate(64 << 20)
    command = [sys.executable, "-m", "nbdsrv", "copy", "--json", str(source), "null:"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert (told["size"], told["data_bytes"]) == (64 << 20, 5 << 20)
    assert told["target"] == "null:"
    assert list(tmp_path.iterdir()) == [source]


class Deep:
    """A disk that wants so much in flight."""

    depth = 0


async def test_buffers_are_as_many_as_a_disk_wants_in_flight() -> None:
    disk = Deep()
    lender = Lender(4, deep=(disk,), spare=1)
    taken = [await lender.take() for _ in range(4)]
    fifth = asyncio.ensure_future(lender.take())
    await asyncio.sleep(0)
    assert not fifth.done()
    disk.depth = 8 * PIECE
    lender.give_back(taken.pop())
    taken.append(await fifth)
    taken += [await lender.take() for _ in range(5)]
    assert len(taken) == 9
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await lender.take()
    disk.depth = 2 * PIECE
    for buffer in taken[:6]:
        lender.give_back(buffer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await lender.take()
    lender.give_back(taken[6])
    async with lender.lend() as buffer:
        assert len(buffer) == PIECE


async def test_a_buffer_promised_to_somebody_who_has_gone_is_the_next_ones() -> None:
    lender = Lender(1, 10)
    buffer = await lender.take()
    first, second = (asyncio.ensure_future(lender.take()) for _ in range(2))
    await asyncio.sleep(0)
    lender.give_back(buffer)
    first.cancel()
    async with asyncio.timeout(1):
        assert await second is buffer
