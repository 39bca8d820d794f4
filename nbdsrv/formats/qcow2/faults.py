"""Broken L1 and L2 entries, each as a number that a Segment can carry.

::

    key of a BLOCK   >= 0   descriptor of a compressed cluster
                      < 0   -1 - (position of what is broken << 4 | Fault)

Rule: a broken entry costs its own clusters, never its neighbours. Its Segment is a BLOCK, and
reading that is a CorruptImage that says where the entry stands.
"""

from enum import IntEnum

__all__ = ["Fault", "fault_key", "fault_of"]


class Fault(IntEnum):
    """What is wrong with an L1 or L2 entry."""

    L1_RESERVED = 0
    L1_UNALIGNED = 1
    L1_OUTSIDE = 2
    RESERVED = 3
    UNALIGNED = 4
    OUTSIDE = 5
    OVERLAP = 6
    VERSION = 7
    DATA_FILE = 8
    SUBCLUSTERS = 9


FAULT_TEXTS = {
    Fault.L1_RESERVED: "an L1 entry with reserved bits set",
    Fault.L1_UNALIGNED: "an L1 entry to an unaligned L2 table",
    Fault.L1_OUTSIDE: "an L1 entry to an L2 table outside the file",
    Fault.RESERVED: "an L2 entry with reserved bits set",
    Fault.UNALIGNED: "an L2 entry to an unaligned cluster",
    Fault.OUTSIDE: "an L2 entry to a cluster outside the file",
    Fault.OVERLAP: "a cluster that two entries claim, or an entry and a table",
    Fault.VERSION: "a zero cluster, which version 2 does not have",
    Fault.DATA_FILE: "an L2 entry that contradicts the external data file",
    Fault.SUBCLUSTERS: "an L2 entry whose subclusters contradict it",
}
_FAULT_BITS = 4


def fault_key(position: int, fault: Fault) -> int:
    """The key of a BLOCK that cannot be read because of the entry at ``position``."""
    return -1 - (position << _FAULT_BITS | fault)


def fault_of(key: int) -> tuple[int, str]:
    """Position of the entry, and what is wrong with it."""
    code = -1 - key
    return code >> _FAULT_BITS, FAULT_TEXTS[Fault(code & ((1 << _FAULT_BITS) - 1))]
