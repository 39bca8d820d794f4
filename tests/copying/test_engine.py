"""The copying engine keeps the writers' contract and reads only what it must."""

import asyncio
import errno
import itertools
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.copying.engine import Copy
from nbdsrv.copying.reading import WINDOW
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, UnsupportedImage
from nbdsrv.formats.raw_writer import RawWriter
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.writer import Plan
from tests.copying.disks import MIB, MemoryDisk, pieces
from tests.copying.notebook import Notebook
from tests.disk.threads import running_workers

UNIT = 4096
chance = random.Random("engine")
NOISE = chance.randbytes(3 * MIB)
ORDERS = pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "any order"])


@ORDERS
async def test_data_arrives_and_holes_are_never_read(workers: Workers, *, ordered: bool) -> None:
    content, data = pieces(
        40 * MIB + 5, (4096, NOISE), (30 * MIB + 1, b"x" * 9), (40 * MIB, b"tail!")
    )
    source = MemoryDisk(workers, content, data)
    writer = Notebook(ordered=ordered)
    outcome = await Copy(source, writer, workers).run()
    assert writer.fate == "finished"
    assert bytes(writer.image) == content
    assert writer.zero_calls == []
    assert sum(length for _, length in source.reads) == 3 * MIB + UNIT + 5
    assert (outcome.size, outcome.data) == (40 * MIB + 5, 3 * MIB + UNIT + 5)
    assert outcome.written == 3 * MIB + UNIT + 5
    assert outcome.zero == outcome.size - outcome.data


@ORDERS
async def test_zeroes_within_data_become_holes(workers: Workers, *, ordered: bool) -> None:
    content, _ = pieces(9 * MIB, (3 * MIB, NOISE[:MIB]), (5 * MIB + 100, b"x"))
    writer = Notebook(ordered=ordered)
    outcome = await Copy(MemoryDisk(workers, content), writer, workers).run()
    assert bytes(writer.image) == content
    assert writer.zero_calls == []
    assert sorted(writer.data_calls) == [(3 * MIB, MIB), (5 * MIB, UNIT)]
    assert (outcome.data, outcome.written) == (9 * MIB, MIB + UNIT)
    assert outcome.zero == 8 * MIB - UNIT


async def test_data_comes_in_whole_granules(workers: Workers) -> None:
    content, data = pieces(10 * MIB + 77, (70_000, b"a"), (5 * MIB, NOISE), (10 * MIB + 70, b"end"))
    writer = Notebook(granularity=2 * MIB)
    await Copy(MemoryDisk(workers, content, data), writer, workers).run()
    assert bytes(writer.image) == content
    assert writer.data_calls == [
        (0, 2 * MIB),
        (4 * MIB, 2 * MIB),
        (6 * MIB, 2 * MIB),
        (10 * MIB, 77),
    ]


async def test_a_pipe_gets_everything_that_was_announced(workers: Workers) -> None:
    content, _ = pieces(6 * MIB, (4 * MIB, NOISE[:MIB]))
    source = MemoryDisk(workers, content, [(0, MIB), (4 * MIB, 2 * MIB)])
    writer = Notebook(seekable=False, granularity=65536)
    await Copy(source, writer, workers).run()
    assert bytes(writer.image) == content
    assert writer.planned == [(0, MIB), (4 * MIB, 2 * MIB)]
    assert writer.data_calls == writer.planned


@ORDERS
async def test_a_disk_that_is_overwritten_gets_its_zeroes(
    workers: Workers, *, ordered: bool
) -> None:
    content, data = pieces(12 * MIB, (2 * MIB, NOISE), (8 * MIB, bytes(MIB) + b"x" * 65536))
    writer = Notebook(ordered=ordered, fresh=False, before=b"\xff" * (13 * MIB))
    await Copy(MemoryDisk(workers, content, data), writer, workers).run()
    assert bytes(writer.image) == content + b"\xff" * MIB
    assert (8 * MIB, MIB) in writer.zero_calls
    assert sum(length for _, length in writer.zero_calls) == 9 * MIB - 65536


async def test_reads_are_in_flight_together_and_bounded(workers: Workers) -> None:
    source = MemoryDisk(workers, chance.randbytes(64 * MIB))
    writer = Notebook(ordered=False)
    await Copy(source, writer, workers).run()
    assert bytes(writer.image) == source.content
    assert 1 < source.most <= WINDOW
    assert 1 < writer.most <= WINDOW


async def test_the_source_is_read_ahead_of_an_ordered_writer(workers: Workers) -> None:
    source = MemoryDisk(workers, chance.randbytes(32 * MIB))
    writer = Notebook(ordered=True)
    await Copy(source, writer, workers).run()
    assert bytes(writer.image) == source.content
    assert 1 < source.most <= WINDOW
    assert writer.most == 1


async def test_an_empty_disk(workers: Workers) -> None:
    writer = Notebook()
    outcome = await Copy(MemoryDisk(workers, b""), writer, workers).run()
    assert (writer.fate, outcome.size, outcome.written) == ("finished", 0, 0)


async def test_progress_counts_data_to_its_end(workers: Workers) -> None:
    content, data = pieces(20 * MIB, (0, NOISE), (12 * MIB, NOISE))
    told: list[tuple[int, int]] = []
    source = MemoryDisk(workers, content, data)
    await Copy(source, Notebook(), workers, advance=lambda a, b: told.append((a, b))).run()
    assert told[-1] == (6 * MIB, 6 * MIB)
    assert all(before < after for before, after in itertools.pairwise(told))


# --- over a backing image ------------------------------------------------------------------------


async def test_only_what_differs_from_the_backing_image_is_written(workers: Workers) -> None:
    below, below_data = pieces(
        16 * MIB, (0, NOISE), (6 * MIB, NOISE), (10 * MIB, NOISE), (15 * MIB, b"z" * 65536)
    )
    content = bytearray(below)
    content[65536:65546] = b"difference"
    content[6 * MIB : 7 * MIB] = bytes(MIB)
    content[10 * MIB : 13 * MIB] = bytes(3 * MIB)
    data = [(0, 3 * MIB), (6 * MIB, 3 * MIB), (15 * MIB, MIB)]
    writer = Notebook(granularity=65536, ordered=False, before=below)
    base = MemoryDisk(workers, below, below_data)
    await Copy(MemoryDisk(workers, bytes(content), data), writer, workers, base=base).run()
    assert bytes(writer.image) == bytes(content)
    assert writer.data_calls == [(65536, 65536)]
    assert sorted(writer.zero_calls) == [(6 * MIB, MIB), (10 * MIB, 3 * MIB)]


@pytest.mark.parametrize("size", [MIB - 1, 3 * MIB + 5, 9 * MIB])
async def test_a_backing_image_of_another_size(workers: Workers, size: int) -> None:
    below = chance.randbytes(size)
    content = below[:MIB].ljust(2 * MIB, b"x") + bytes(3 * MIB) + b"end"
    before = below[: len(content)].ljust(len(content), b"\0")
    writer = Notebook(granularity=65536, before=before)
    source = MemoryDisk(workers, content, [(0, 2 * MIB), (5 * MIB, 3)])
    await Copy(source, writer, workers, base=MemoryDisk(workers, below)).run()
    assert bytes(writer.image) == content


block = st.sampled_from([b"\0", b"a", b"b"]).map(lambda byte: byte * 65536)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    above=st.lists(block, max_size=40),
    below=st.lists(block, max_size=40),
    ordered=st.booleans(),
    tail=st.binary(max_size=3),
)
async def test_whatever_lies_below_the_source_is_what_is_read(
    above: list[bytes], below: list[bytes], ordered: bool, tail: bytes
) -> None:
    content, base = b"".join(above) + tail, b"".join(below)
    data = [(at, 65536) for at in range(0, len(content), 65536) if any(content[at : at + 65536])]
    data = [(at, min(length, len(content) - at)) for at, length in data]
    before = base[: len(content)].ljust(len(content), b"\0")
    writer = Notebook(granularity=65536, ordered=ordered, before=before)
    async with running_workers() as workers:
        source = MemoryDisk(workers, content, data)
        await Copy(source, writer, workers, base=MemoryDisk(workers, base)).run()
    assert bytes(writer.image) == content


# --- what goes wrong -----------------------------------------------------------------------------


@ORDERS
async def test_a_bad_sector_is_named_and_nothing_is_left(
    workers: Workers, *, ordered: bool
) -> None:
    source = MemoryDisk(workers, chance.randbytes(24 * MIB), bad=13 * MIB + 512)
    writer = Notebook(ordered=ordered)
    with pytest.raises(DiskError) as caught:
        await Copy(source, writer, workers).run()
    assert f"at byte {13 * MIB + 512} " in str(caught.value)
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, 13 * MIB + 512)
    assert writer.fate == "aborted"
    assert source.under_way == 0


@ORDERS
async def test_a_full_target_is_told_and_aborted(workers: Workers, *, ordered: bool) -> None:
    full = DiskError("writing there: No space left on device", errno.ENOSPC)
    writer = Notebook(ordered=ordered, fault=(3, full))
    source = MemoryDisk(workers, chance.randbytes(40 * MIB))
    with pytest.raises(DiskError) as caught:
        await Copy(source, writer, workers).run()
    assert caught.value is full
    assert writer.fate == "aborted"
    assert source.under_way == 0


async def test_a_target_that_refuses_is_aborted_before_anything_is_read(workers: Workers) -> None:
    class Refusing(Notebook):
        async def begin(self, plan: Plan) -> None:
            raise UnsupportedImage("too large")

    writer = Refusing()
    source = MemoryDisk(workers, chance.randbytes(MIB))
    with pytest.raises(UnsupportedImage):
        await Copy(source, writer, workers).run()
    assert (writer.fate, source.reads) == ("aborted", [])


@ORDERS
@pytest.mark.parametrize("patience", [1, 3, 10, 40])
async def test_cancellation_aborts(workers: Workers, patience: int, *, ordered: bool) -> None:
    class Endless(Notebook):
        async def finish(self) -> None:
            await asyncio.Event().wait()

    writer = Endless(ordered=ordered)
    source = MemoryDisk(workers, chance.randbytes(30 * MIB))
    copying = asyncio.ensure_future(Copy(source, writer, workers).run())
    for _ in range(patience):
        await asyncio.sleep(0)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert writer.fate == "aborted"
    assert (source.under_way, writer.under_way) == (0, 0)


# --- writing in the threads that read ------------------------------------------------------------


async def test_a_threaded_writer_is_given_data_where_it_was_read(
    tmp_path: Path, workers: Workers
) -> None:
    content, _ = pieces(9 * MIB + 1, (MIB, NOISE), (6 * MIB + 100, b"x"), (9 * MIB, b"y"))
    path = tmp_path / "disk.img"
    writer = RawWriter(workers, TargetFile(str(path)))
    outcome = await Copy(MemoryDisk(workers, content), writer, workers).run()
    assert path.read_bytes() == content
    assert outcome.written == 3 * MIB + UNIT + 1
    assert outcome.zero == outcome.size - outcome.written
    assert path.stat().st_blocks * 512 == 3 * MIB + 2 * UNIT


async def test_what_goes_wrong_there_is_told_as_it_is(tmp_path: Path, workers: Workers) -> None:
    class Full(RawWriter):
        def store(self, offset: int, data: memoryview) -> None:
            if offset >= 4 * MIB:
                raise DiskError("writing there: No space left on device", errno.ENOSPC)
            super().store(offset, data)

    writer = Full(workers, TargetFile(str(tmp_path / "disk.img")))
    source = MemoryDisk(workers, chance.randbytes(20 * MIB))
    with pytest.raises(DiskError, match=r"^writing there: No space left on device$"):
        await Copy(source, writer, workers).run()
    assert os.listdir(tmp_path) == []
