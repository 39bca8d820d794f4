"""Asking a disk about all of it."""

from nbdsrv.disk.sweep import STEP, sweep
from protocol.extents import DATA, HOLE, ExtentList

SIZE = 1 << 62


async def test_a_hole_of_exbibytes_takes_few_questions() -> None:
    asked: list[tuple[int, int]] = []

    async def ask(offset: int, length: int) -> ExtentList:
        asked.append((offset, length))
        return ExtentList(offset, [(length, HOLE)])

    found = [each async for each in sweep(ask, 5, SIZE)]
    assert len(asked) < 30
    assert [(each.offset, each.length) for each in found] == asked
    assert sum(each.length for each in found) == SIZE - 5


async def test_where_there_is_more_to_tell_less_is_asked_about() -> None:
    asked: list[int] = []

    async def ask(offset: int, length: int) -> ExtentList:
        asked.append(length // STEP)
        if offset == 3 * STEP:  # several extents
            return ExtentList(offset, [(length - STEP, DATA), (STEP, HOLE)])
        if offset == 8 * STEP:  # less than was asked
            return ExtentList(offset, [(STEP, HOLE)])
        return ExtentList(offset, [(length, HOLE)])

    ends = [each.end // STEP async for each in sweep(ask, 0, 12 * STEP)]
    assert ends == [1, 3, 7, 8, 9, 10, 12]
    assert asked == [1, 2, 4, 1, 2, 1, 2]
