"""Windows: what is remembered of where bytes lie is true, grows together, and is bounded."""

import itertools
import random

from nbdsrv.disk.residency import NEVER, Residency
from nbdsrv.disk.runs import FileRun
from nbdsrv.net.windows import MAX_WINDOWS, WINDOW_BITS, Windows

SPAN = 1 << WINDOW_BITS
WARM = Residency(NEVER)


def run(fd: int, position: int, length: int) -> FileRun:
    return FileRun(fd, position, length, WARM)


def test_runs_of_one_place_grow_together() -> None:
    windows = Windows()
    windows.renew(0)
    assert windows.met(5000, run(3, 105_000, 3000)) == (5000, 8000, 3, 100_000, NEVER)
    assert windows.met(1000, run(3, 101_000, 7000)) == (1000, 8000, 3, 100_000, NEVER)
    assert windows.met(2000, run(3, 102_000, 500)) == (1000, 8000, 3, 100_000, NEVER)
    assert windows[0] == ((1000, 8000, 3, 100_000, NEVER), WARM)


def test_runs_that_do_not_touch_or_lie_elsewhere_do_not() -> None:
    windows = Windows()
    windows.renew(0)
    windows.met(5000, run(3, 105_000, 3000))
    assert windows.met(1000, run(3, 101_000, 2000))[:2] == (1000, 3000)
    assert windows.met(3000, run(4, 103_000, 2000)) == (3000, 5000, 4, 100_000, NEVER)
    assert windows.met(4000, run(4, 204_000, 2000)) == (4000, 6000, 4, 200_000, NEVER)


def test_another_epoch_forgets_all() -> None:
    windows = Windows()
    windows.renew(1)
    windows.met(0, run(3, 0, 10))
    windows.renew(1)
    assert windows
    windows.renew(2)
    assert not windows


def test_they_are_bounded() -> None:
    windows = Windows()
    windows.renew(0)
    for number in range(3 * MAX_WINDOWS):
        windows.met(number * SPAN, run(3, number * SPAN, 100))
        assert len(windows) <= MAX_WINDOWS


def test_whatever_is_met_what_is_remembered_is_true() -> None:
    """A disk whose pieces lie scattered in two files; every window leads to the right bytes."""
    dice = random.Random(5)
    edges = sorted({0, 8 * SPAN, *(dice.randrange(8 * SPAN) for _ in range(60))})
    pieces = [
        (start, end, dice.choice((3, 4)), dice.randrange(1 << 30))
        for start, end in itertools.pairwise(edges)
    ]
    windows = Windows()
    windows.renew(0)
    for _ in range(5000):
        start, end, fd, position = dice.choice(pieces)
        at = dice.randrange(start, end)
        window = windows.met(at, run(fd, position + at - start, end - at))
        low, high, *_ = window
        assert start <= low <= at < high <= end
        assert window[2:4] == (fd, position - start)
