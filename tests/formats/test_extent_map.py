"""What is remembered of a layout, beside a list with one entry per byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.formats import extent_map
from nbdsrv.formats.extent_map import ExtentMap

SIZE = 64

spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: tuple(sorted(pair)))
steps = st.lists(st.tuples(st.sampled_from(["data", "hole", "forget"]), spans), max_size=40)


def stretch(model: list[bool | None], at: int) -> tuple[int, int, bool] | None:
    """The longest range around ``at`` whose bytes are all known and alike."""
    state = model[at]
    if state is None:
        return None
    start = end = at
    while start and model[start - 1] is state:
        start -= 1
    while end < SIZE and model[end] is state:
        end += 1
    return start, end, state


@given(steps)
def test_like_a_list_of_bytes(steps: list[tuple[str, tuple[int, int]]]) -> None:
    known = ExtentMap()
    model: list[bool | None] = [None] * SIZE
    for step, (start, end) in steps:
        if step == "forget":
            known.forget(start, end)
            model[start:end] = [None] * (end - start)
        else:
            known.learn(start, end, data=step == "data")
            model[start:end] = [step == "data"] * (end - start)
        for at in range(SIZE):
            found = known.find(at)
            expected = stretch(model, at)
            if expected is None or found is None:
                assert found is expected
                continue
            # Forgetting splits, learning merges: an entry may be less than the whole stretch.
            low, high, data = found
            assert low <= at < high
            assert expected[0] <= low
            assert high <= expected[1]
            assert data is expected[2]
        assert known.find(SIZE) is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_what_is_learnt_piece_by_piece_is_one_entry(lengths: list[int]) -> None:
    known = ExtentMap()
    at = 0
    for length in lengths:
        known.learn(at, at + length, data=True)
        at += length
    assert len(known) == 1
    assert known.find(0) == (0, at, True)


def test_merges_with_both_neighbours() -> None:
    known = ExtentMap()
    known.learn(0, 10, data=False)
    known.learn(20, 30, data=False)
    known.learn(10, 20, data=False)
    assert known.find(15) == (0, 30, False)
    assert len(known) == 1


def test_forgetting_the_middle_leaves_both_ends() -> None:
    known = ExtentMap()
    known.learn(0, 30, data=True)
    known.forget(10, 20)
    assert known.find(9) == (0, 10, True)
    assert known.find(10) is None
    assert known.find(19) is None
    assert known.find(20) == (20, 30, True)


def test_nothing_is_learnt_from_an_empty_range() -> None:
    known = ExtentMap()
    known.learn(5, 5, data=True)
    known.learn(7, 3, data=True)
    assert len(known) == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent_map, "MAX_ENTRIES", 100)
    known = ExtentMap()
    for at in range(0, 2000, 2):
        known.learn(at, at + 1, data=True)
        assert len(known) <= 100
        assert known.find(at) == (at, at + 1, True)


def test_positions_beyond_32_and_53_bits() -> None:
    known = ExtentMap()
    far = (1 << 60) + 1
    known.learn(far, far + 1, data=True)
    assert known.find(far) == (far, far + 1, True)
    assert known.find(far - 1) is None
