"""What a disk of a point can be compared with: the same disk in the other points of its group.

::

    others    point 1 | point 2 | ... | point 300        from old to new
    announced                     |<--- the newest --->|  as meta contexts, the newest first;
                                                          all are answered for
"""

from collections.abc import Iterable

from nbdsrv.repository.repository import CHANGED_SINCE
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

__all__ = ["CHANGED", "MAX_ANNOUNCED", "MAX_OTHERS", "UNCHANGED", "announced"]

UNCHANGED = 0
CHANGED = 1
MAX_ANNOUNCED = 256
"""Of the ``changed-since`` contexts, the newest points' are announced; all are answered for."""
MAX_OTHERS = 4
"""Indexes, maps ... of other points that a disk keeps for comparing."""


def announced(others: Iterable[str]) -> tuple[str, ...]:
    """The meta contexts of a disk that can be compared with ``others``.

    Args:
        others: ids of points, from old to new.
    """
    newest = list(others)[: -MAX_ANNOUNCED - 1 : -1]
    return (ALLOCATION, ALLOCATION_DEPTH, *(CHANGED_SINCE + each for each in newest))
