"""What differs between two points' disks, told by their maps; no chunk is read.

::

    mine    |page a|page b|page c|..          contents equal: unchanged, no page is read
    theirs  |page a|page x|page c|            contents differ: slot by slot
    flags   0      1 0 1 0 0      1111        beyond the shorter disk all is changed
"""

from nbdsrv.errors import DiskError
from nbdsrv.repository.comparing import CHANGED, UNCHANGED
from nbdsrv.repository.native.hashing import ID_SIZE
from nbdsrv.repository.native.pages import Pages

__all__ = ["changes"]

MAX_EXTENTS = 1 << 16
MAX_PAGES = 64
"""Pages compared slot by slot in one go: some ten milliseconds. An answer may stop short."""


def changes(mine: Pages, theirs: Pages, offset: int, length: int) -> list[tuple[int, int]]:
    """(length, flags) from ``offset`` on: at least one, at most ``length`` bytes. Blocking.

    Where a page cannot be read, everything counts as changed.
    """
    ours, other = mine.root, theirs.root
    if (ours.chunk_size, ours.page_slots) != (other.chunk_size, other.page_slots):
        return [(length, CHANGED)]  # no slot of one stands for the bytes of one of the other
    end = offset + length
    common = min(ours.size, other.size)
    found: list[tuple[int, int]] = []
    at, left = offset, MAX_PAGES
    while at < end and left and len(found) < MAX_EXTENTS:
        if at >= common:
            found.append((end - at, CHANGED))
            break
        number = at // ours.page_span
        stop = min((number + 1) * ours.page_span, end, common)
        if ours.content(number) == other.content(number):
            found.append((stop - at, UNCHANGED))
        else:
            left -= 1
            found += _slot_by_slot(mine, theirs, number, at, stop)
        at = stop
    return found


def _slot_by_slot(
    mine: Pages, theirs: Pages, number: int, offset: int, end: int
) -> list[tuple[int, int]]:
    try:
        page, other = mine.get(number), theirs.get(number).slots
    except DiskError:
        return [(end - offset, CHANGED)]
    ours, step = page.slots, page.step
    chunk = mine.root.chunk_size
    first = number * mine.root.page_slots
    found: list[tuple[int, int]] = []
    at = offset
    for index in range(offset // chunk - first, -(-end // chunk) - first):
        slot = index * step
        same = ours[slot : slot + ID_SIZE] == other[slot : slot + ID_SIZE]
        stop = min((first + index + 1) * chunk, end)
        if found and found[-1][1] != same:
            found[-1] = (found[-1][0] + stop - at, found[-1][1])
        else:
            found.append((stop - at, UNCHANGED if same else CHANGED))
        at = stop
    return found
