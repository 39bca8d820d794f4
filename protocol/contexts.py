"""Meta contexts: which of the available ones do a client's queries name?

proto.md, "Metadata querying" and NBD_OPT_LIST/SET_META_CONTEXT:

======================  ==================================  ============================
query                   LIST                                SET
======================  ==================================  ============================
none at all             every context                       none
``ns:`` / ``ns:part:``  every context that begins with it   none
``ns:leaf``             that one                            that one
unknown namespace       ignored                             ignored
======================  ==================================  ============================

Several queries for the same context select it once (nbdkit answers twice with one id).
"""

from collections.abc import Sequence

__all__ = ["ALLOCATION", "ALLOCATION_DEPTH", "listed", "selected"]

ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
"""QEMU's: 0 unallocated, 1 in the image itself, 2 and more in a backing image."""


def selected(available: Sequence[str], queries: Sequence[str]) -> dict[int, str]:
    """What SET_META_CONTEXT chooses: context id to name, ids from 1, in order of availability."""
    wanted = set(queries)
    names = [name for name in available if name in wanted]
    return dict(enumerate(names, start=1))


def listed(available: Sequence[str], queries: Sequence[str]) -> list[str]:
    """What LIST_META_CONTEXT shows."""
    if not queries:
        return list(available)
    return [name for name in available if any(_matches(query, name) for query in queries)]


def _matches(query: str, name: str) -> bool:
    return query == name or (query.endswith(":") and name.startswith(query))
