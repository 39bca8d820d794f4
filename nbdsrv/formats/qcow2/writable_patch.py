"""Changing one stretch of a Page, instead of reading all of it again.

::

    before   |======= a =======|.. b ..|
    patch           |## new ##|
    after    |= a' =|## new ##|a|.. b ..|      neighbours merge where the file goes on
"""

from nbdsrv.formats.page import Kind, Page, Stretch

__all__ = ["Stretch", "patch"]

_DATA, _BLOCK = int(Kind.DATA), int(Kind.BLOCK)


def patch(page: Page, new: Stretch) -> None:
    """Put ``new`` in place of whatever the page says of its bytes, which the page must cover."""
    start, end = new[0], new[1]
    first, last = page.find(start), page.find(end - 1)
    before, after = page.stretch(first), page.stretch(last)
    parts = [_cut(before, before[0], start), new, _cut(after, end, after[1])]
    if first:
        first -= 1
        parts.insert(0, page.stretch(first))
    if last + 1 < len(page):
        last += 1
        parts.append(page.stretch(last))
    page.replace(first, last, _merged([part for part in parts if part[0] < part[1]]))


def _cut(segment: Stretch, start: int, end: int) -> Stretch:
    """The part of ``segment`` from ``start`` to ``end``."""
    begin, _, kind, position, file = segment
    return start, end, kind, position + start - begin if kind == _DATA else position, file


def _merged(parts: list[Stretch]) -> list[Stretch]:
    merged = parts[:1]
    for part in parts[1:]:
        last = merged[-1]
        goes_on = (
            part[2] == last[2]
            and part[2] != _BLOCK
            and part[4] is last[4]
            and (part[2] != _DATA or part[3] == last[3] + last[1] - last[0])
        )
        if goes_on:
            merged[-1] = (last[0], part[1], last[2], last[3], last[4])
        else:
            merged.append(part)
    return merged
