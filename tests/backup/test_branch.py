"""A branch takes pieces in any order, size and overlap, and tells each chunk once."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdsrv.backup.branch import Branch, FailsAlone, Piece
from nbdsrv.backup.owed import Owed
from nbdsrv.backup.partial import MAX_SPANS, Partials
from nbdsrv.backup.ranges import together, whole
from nbdsrv.copying.survey import DataMap
from nbdsrv.errors import DiskError
from nbdsrv.repository.repository import DiskWriter, WriteSummary

UNIT = 64
SIZE = 40 * UNIT + 17
CONTENT = bytes(n * 7 % 251 for n in range(SIZE))
RANGES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 400)), max_size=8).map(sorted)


class Recording(DiskWriter):
    """A writer that only looks: each chunk once, whole, and right."""

    def __init__(self, size: int = SIZE, granularity: int = UNIT) -> None:
        self.name, self.size, self.granularity = "disk", size, granularity
        self.summary = WriteSummary()
        self.content = bytearray(b"\xff" * size)
        self.told: list[tuple[int, int]] = []
        self.hold: Callable[[], Awaitable[object]] | None = None
        self.failure: DiskError | None = None

    async def data(self, offset: int, buffer: bytearray, length: int) -> None:
        assert isinstance(buffer, bytearray)
        await self._told(offset, length)
        self.content[offset : offset + length] = buffer[:length]

    async def zero(self, offset: int, length: int) -> None:
        await self._told(offset, length)
        self.content[offset : offset + length] = bytes(length)

    async def _told(self, offset: int, length: int) -> None:
        assert offset % self.granularity == 0
        assert (offset + length) % self.granularity == 0 or offset + length == self.size
        self.told.append((offset, length))
        if self.hold is not None:
            await self.hold()
        if self.failure is not None:
            raise self.failure


def chunks(told: list[tuple[int, int]]) -> list[int]:
    return sorted(n for at, span in told for n in range(at // UNIT, -(-(at + span) // UNIT)))


def offer(branch: Branch, offset: int, length: int) -> None:
    part = bytearray(CONTENT[offset : offset + length])
    branch.offer(offset, memoryview(part), lambda: Piece(bytearray(part)))
    part[:] = b"\xee" * len(part)  # whoever reads goes on with his buffer


@given(
    told=RANGES,
    reads=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 700)), max_size=60),
    zeroes=RANGES,
    room=st.sampled_from([UNIT, 3 * UNIT, 1 << 20]),
)
@settings(max_examples=300, deadline=None)
async def test_any_reads_tell_each_chunk_once_and_right(
    told: list[tuple[int, int]],
    reads: list[tuple[int, int]],
    zeroes: list[tuple[int, int]],
    room: int,
) -> None:
    plan = together(SIZE, UNIT, [told])
    writer = Recording()
    branch = Branch(writer, plan, FailsAlone(), queue=room)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(branch.run())
        for number, (offset, length) in enumerate(reads):
            offer(branch, offset, min(length, SIZE - offset))
            assert branch.backlog <= max(room, 700 + UNIT)
            if number % 3 == 0:
                await asyncio.sleep(0)
        await branch.drained()
        for at, span in list(branch.owed.rest()):
            await branch.drained()
            offer(branch, at, span)
        await branch.drained()
        if room > 700:
            assert list(branch.owed.rest()) == []
        branch.close()
    assert len(chunks(writer.told)) == len(set(chunks(writer.told)))
    owed = {n // UNIT for at, span in plan.ranges() for n in range(at, at + span)}
    left = {n // UNIT for at, span in branch.owed.rest() for n in range(at, at + span)}
    assert set(chunks(writer.told)) == owed - left
    for at, span in writer.told:
        assert writer.content[at : at + span] == CONTENT[at : at + span]
    assert branch.given == sum(span for _, span in writer.told)
    assert branch.backlog == 0


async def test_what_does_not_fit_is_missed_and_costs_nothing() -> None:
    writer = Recording()
    go_on = asyncio.Event()
    writer.hold = go_on.wait
    branch = Branch(writer, whole(SIZE, UNIT), FailsAlone(), queue=8 * UNIT)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(branch.run())
        for at in range(0, SIZE, 4 * UNIT):
            offer(branch, at, min(4 * UNIT, SIZE - at))
            await asyncio.sleep(0)
            assert branch.backlog <= 8 * UNIT
        assert branch.given == 8 * UNIT
        assert branch.missed == SIZE - 8 * UNIT
        assert list(branch.owed.rest()) == [(8 * UNIT, SIZE - 8 * UNIT)]
        go_on.set()
        await branch.drained()
        branch.zero(0, SIZE)
        await branch.drained()
        branch.close()
    assert chunks(writer.told) == list(range(41))


async def test_a_failure_is_its_owners_and_the_rest_is_let_go() -> None:
    writer, owner = Recording(), FailsAlone()
    writer.failure = DiskError("full", errno.ENOSPC)
    freed: list[bytearray] = []
    branch = Branch(writer, whole(SIZE, UNIT), owner)
    moves: list[int] = []
    branch.moved = lambda: moves.append(branch.backlog)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(branch.run())
        for at in range(0, 10 * UNIT, UNIT):
            piece = Piece(bytearray(UNIT), freed.append)
            branch.offer(at, memoryview(piece.buffer), lambda piece=piece: piece)
            piece.let_go()
        await branch.drained()
        assert owner.failure is writer.failure
        assert not branch.alive
        offer(branch, 20 * UNIT, UNIT)
        assert branch.backlog == 0
        branch.close()
    assert len(freed) == 10
    assert moves[-1] == 0


async def test_a_mistake_of_ours_is_a_failure_too(caplog: pytest.LogCaptureFixture) -> None:
    writer, owner = Recording(), FailsAlone()

    async def wrong() -> None:
        raise ZeroDivisionError("oh")

    writer.hold = wrong
    branch = Branch(writer, whole(SIZE, UNIT), owner)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(branch.run())
        offer(branch, 0, UNIT)
        await branch.drained()
        branch.close()
    assert "a fault of nbdsrv: oh" in str(owner.failure)
    assert "branch.bug" in caplog.text


@given(
    told=RANGES,
    taken=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12),
    asked=st.tuples(st.integers(0, 40), st.integers(1, 41)),
)
def test_what_is_owed(
    told: list[tuple[int, int]], taken: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    plan = together(SIZE, UNIT, [told])
    owed = Owed(plan, UNIT)
    expected = {n // UNIT for at, span in plan.ranges() for n in range(at, at + span)}
    for first, count in taken:
        owed.take(first, min(first + count, 41))
        expected -= set(range(first, first + count))
    assert {n for n in range(41) if n in owed} == expected
    first, stop = asked[0], min(sum(asked), 41)
    runs = list(owed.runs(first, stop))
    assert [n for low, high in runs for n in range(low, high)] == sorted(
        expected & set(range(first, stop))
    )
    assert {n // UNIT for at, span in owed.rest() for n in range(at, at + span)} == expected


def test_what_is_owed_of_a_disk_of_many_pages() -> None:
    size = 3 * 4096 * UNIT
    plan = DataMap(size, UNIT)
    plan.add(0, size)
    owed = Owed(plan, UNIT)
    assert list(owed.rest()) == [(0, 4096 * UNIT), (4096 * UNIT, 4096 * UNIT)] or list(
        owed.rest()
    ) == [(0, size)]
    owed.take(4000, 4096 + 5)
    assert list(owed.runs(0, 3 * 4096)) == [(0, 4000), (4096 + 5, 3 * 4096)]
    owed.take(0, 3 * 4096)
    assert list(owed.rest()) == []
    other = DataMap(size, UNIT)
    other.add(0, UNIT)
    owed.tell(other)
    assert list(owed.rest()) == []


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 63), st.integers(1, 64)), max_size=60
    )
)
def test_parts_become_chunks(parts: list[tuple[int, int, int]]) -> None:
    partials = Partials(UNIT, 5 * UNIT + 17, limit=3 * UNIT)
    for chunk, skip, length in parts:
        size = UNIT if chunk < 5 else 17
        at, end = chunk * UNIT + min(skip, size - 1), chunk * UNIT + min(skip + length, size)
        found = partials.add(at, memoryview(CONTENT)[at:end])
        assert len(partials) <= 3
        if found is not None:
            assert found == CONTENT[chunk * UNIT : chunk * UNIT + size]


def test_memory_of_parts_is_bounded() -> None:
    partials = Partials(1 << 20, 1 << 40)
    for n in range(200):
        assert partials.add(n << 20, memoryview(b"x")) is None
        assert len(partials) <= 16
    for n in range(MAX_SPANS):
        assert partials.add((300 << 20) + 2 * n, memoryview(b"x")) is None
    assert len(partials) == 16
    partials.add((300 << 20) + 1000, memoryview(b"x"))
    assert len(partials) == 15
    partials.drop(0, 1 << 20)
    assert len(partials) == 0
