"""Who claims which bytes of the image file, so that nobody claims what belongs to somebody else.

::

    tables    |L1|......|L2|...........      never guest data
    entries   ....|== a ==|.|= b =|....
                          ^^  conflict: a reaches into an L2 table

Two entries may share a cluster when neither says that it is its only user (no COPIED).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.qcow2.faults import Fault, fault_key

__all__ = ["Claim", "conflicts", "without_conflicts"]

_DATA, _BLOCK = int(Kind.DATA), int(Kind.BLOCK)


class Claim(NamedTuple):
    """Bytes of the image file, and whether others may use them too."""

    start: int
    end: int
    shared: bool = False


def conflicts(claims: Iterable[Claim]) -> list[tuple[int, int]]:
    """Ranges (start, end) that are claimed twice, ascending."""
    found: list[tuple[int, int]] = []
    reach, reach_shared = 0, True
    for start, end, shared in sorted(claims):
        if start < reach and not (shared and reach_shared):
            found.append((start, min(end, reach)))
        if end > reach:
            reach, reach_shared = end, shared
    return found


def without_conflicts(
    segments: Iterable[Segment], doubtful: Sequence[tuple[int, int]], cluster: int
) -> list[Segment]:
    """The segments with every cluster that lies in a doubtful range made a fault."""
    clusters = {
        at for start, end in doubtful for at in range(start // cluster * cluster, end, cluster)
    }
    kept: list[Segment] = []
    for segment in segments:
        # An external data file holds no tables, and every cluster of it has its own place.
        if segment.kind != _DATA or segment.file is not None:
            kept.append(segment)
            continue
        at, end = segment.position, segment.position + segment.length
        while at < end:
            first = at // cluster * cluster
            span = min(first + cluster, end) - at
            if first in clusters:
                kept.append(Segment(span, _BLOCK, fault_key(first, Fault.OVERLAP)))
            else:
                kept.append(Segment(span, _DATA, at))
            at += span
    return kept
