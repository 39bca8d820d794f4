"""Finding the zeroes in data: pieces that need not be written.

::

    buffer   |data|data|0000|0000|data|          units, aligned to the disk
    split     (0, 2 units, data) (2, 2 units, zero) (4, 1 unit, data)

Looking at every byte costs as much as copying it. So first one byte of each unit is looked at, all
of them in one slice; only units that begin with a zero are compared as a whole. And compared as
bytes: a memoryview compares forty times slower.
"""

from collections.abc import Iterator

__all__ = ["first_nonzero", "is_zero", "split"]

_ZEROES = memoryview(bytes(1 << 21))


def is_zero(block: bytearray | bytes, start: int, end: int) -> bool:
    """Are all bytes of [start, end) zero?"""
    step = len(_ZEROES)
    while end - start > step:
        if not block.startswith(_ZEROES, start):
            return False
        start += step
    if start == end:
        return True
    if block[start]:  # most data says so at once
        return False
    return block.startswith(_ZEROES[: end - start], start)


def first_nonzero(block: bytearray | bytes, start: int, end: int) -> int | None:
    """Where in [start, end) the first byte is that is not zero; None if all are."""
    if is_zero(block, start, end):
        return None
    while end - start > 1:
        middle = (start + end) // 2
        if is_zero(block, start, middle):
            start = middle
        else:
            end = middle
    return start


def split(block: bytearray, length: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """(start, length, is zero) for the first ``length`` bytes, neighbours alike merged.

    ``block`` begins on a multiple of ``unit`` of the disk; the last unit may be short.
    """
    data = 0  # where the data that has not been told of yet begins
    at = 0
    for start in _candidates(block, length, unit):
        end = min(start + unit, length)
        if start < at or not is_zero(block, start, end):
            continue
        at = _zeroes_end(block, end, length, unit)
        if data < start:
            yield data, start - data, False
        yield start, at - start, True
        data = at
    if data < length:
        yield data, length - data, False


def _candidates(block: bytearray, length: int, unit: int) -> Iterator[int]:
    """Where units begin whose first byte is zero."""
    first = block[0:length:unit]
    index = first.find(0)
    while index >= 0:
        yield index * unit
        index = first.find(0, index + 1)


def _zeroes_end(block: bytearray, at: int, length: int, unit: int) -> int:
    """Where the zeroes end that reach up to ``at``, in whole units."""
    if length - at >= unit and is_zero(block, at, length):
        return length
    while at < length:
        end = min(at + unit, length)
        if not is_zero(block, at, end):
            break
        at = end
    return at
