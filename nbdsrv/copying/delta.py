"""What differs between a piece of the disk and the backing disk's bytes at the same place.

::

    source    |aaaa|bbbb|0000|0000|cccc|
    backing   |aaaa|xxxx|yyyy|0000|cccc|
    spans          |data|zero|                  the rest is left out
"""

from collections.abc import Iterator

from nbdsrv.copying.zeroes import is_zero

__all__ = ["differences"]


def differences(
    block: bytearray, below: bytearray, length: int, unit: int
) -> list[tuple[int, int, bool]]:
    """(start, length, is zero) of the units that differ, neighbours alike merged.

    Both buffers begin at the same offset of the disk, a multiple of ``unit``.
    """
    if block[:length] == below[:length]:
        return []
    merged: list[tuple[int, int, bool]] = []
    for start, span, zero in _differing(block, below, length, unit):
        if merged and merged[-1][2] == zero and sum(merged[-1][:2]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + span, zero)
        else:
            merged.append((start, span, zero))
    return merged


def _differing(
    block: bytearray, below: bytearray, length: int, unit: int
) -> Iterator[tuple[int, int, bool]]:
    for start in range(0, length, unit):
        end = min(start + unit, length)
        if block[start:end] != below[start:end]:
            yield start, end - start, is_zero(block, start, end)
