"""All that a Disk tells of a range of any length.

::

    asked     |==1 TiB==|======2 TiB======|==1 TiB==|======2 TiB ...
    answered  |.........|.......|=====|...|.........|
               one extent,  several, or less         one extent
               all of it    than was asked

An answer about a long range may be long to find and to hold, so a disk is asked about little at a
time; but a hole of exbibytes, asked about so, would be millions of questions.
"""

from collections.abc import AsyncIterator, Awaitable, Callable

from protocol.extents import ExtentList

__all__ = ["sweep"]

STEP = 1 << 40
"""Bytes asked about at a time, where there is more to tell than one thing."""


async def sweep(
    ask: Callable[[int, int], Awaitable[ExtentList]], offset: int, end: int
) -> AsyncIterator[ExtentList]:
    """The answers from ``offset`` to ``end``, in order and without gaps.

    Args:
        ask: a Disk's ``extents`` or ``status``, called with (offset, length) in bytes.
        offset: where to begin.
        end: where to stop, exclusive.

    Raises:
        DiskError: as ``ask`` does.
    """
    step = STEP
    while offset < end:
        length = min(step, end - offset)
        found = await ask(offset, length)
        yield found
        step = step * 2 if len(found) == 1 and found.end == offset + length else STEP
        offset = found.end
