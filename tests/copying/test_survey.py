"""The map of where data is."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.copying.survey import DataMap, survey
from nbdsrv.disk.workers import Workers
from tests.copying.disks import MemoryDisk


def filled(ranges: list[tuple[int, int]], size: int, **options: int) -> DataMap:
    found = DataMap(size, **options)
    for offset, length in ranges:
        found.add(offset, length)
    return found


def test_ranges_grow_to_the_granularity_and_merge() -> None:
    found = filled([(5, 1), (17, 2), (48, 4)], 51, granularity=16)
    assert list(found.ranges()) == [(0, 32), (48, 3)]
    assert found.bytes == 35
    assert len(found) == 2


def test_pieces_end_on_multiples_and_gaps_come_whole() -> None:
    found = filled([(100, 250), (900, 50)], 1000)
    assert list(found.cut(128)) == [
        (0, 100, False),
        (100, 28, True),
        (128, 128, True),
        (256, 94, True),
        (350, 550, False),
        (900, 50, True),
        (950, 50, False),
    ]


def test_units_are_those_with_data_in_them() -> None:
    found = filled([(5, 1), (40, 30), (99, 1)], 100)
    assert list(found.units(16, 0, 7)) == [0, 2, 3, 4, 6]
    assert list(found.units(16, 3, 6)) == [3, 4]
    assert list(found.units(16, 1, 2)) == []


def test_an_empty_disk_has_no_pieces() -> None:
    assert list(DataMap(0).cut(128)) == []
    assert list(DataMap(300).cut(128)) == [(0, 300, False)]


def test_where_data_ends_or_begins() -> None:
    found = filled([(100, 100), (300, 100)], 1000)
    answers = [found.data_until(at) for at in (0, 99, 100, 199, 200, 350, 400, 999)]
    assert answers == [
        (False, 100),
        (False, 100),
        (True, 200),
        (True, 200),
        (False, 300),
        (True, 400),
        (False, 1000),
        (False, 1000),
    ]


@given(
    cuts=st.lists(st.integers(0, 5000), max_size=120, unique=True).map(sorted),
    granularity=st.sampled_from([1, 4, 64]),
    limit=st.sampled_from([2, 3, 16, 1000]),
)
def test_however_coarse_all_data_is_covered_within_the_limit(
    cuts: list[int], granularity: int, limit: int
) -> None:
    ranges = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    found = filled(ranges, 5000, granularity=granularity, limit=limit)
    told = list(found.ranges())
    assert len(told) <= limit
    assert sum(length for _, length in told) == found.bytes
    covered = {at for start, length in told for at in range(start, start + length)}
    assert covered >= {at for start, length in ranges for at in range(start, start + length)}
    for (start, length), (following, _) in itertools.pairwise(told):
        assert start + length < following
    for start, length in told:
        assert start % granularity == 0
        assert (start + length) % granularity == 0 or start + length == 5000
    if len(ranges) <= limit:
        assert found.granularity == granularity


async def test_survey_asks_the_whole_disk(workers: Workers) -> None:
    disk = MemoryDisk(workers, bytes(10_000), [(10, 20), (5000, 1), (9990, 10)])
    found = await survey(disk)
    assert list(found.ranges()) == [(10, 20), (5000, 1), (9990, 10)]
    assert disk.reads == []
    assert list((await survey(disk, 4096)).ranges()) == [(0, 10_000)]
