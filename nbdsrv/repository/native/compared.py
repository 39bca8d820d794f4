"""What of a map is not as in another one, page by page and then in whole units of bytes.

::

    map    |page|page| 0  |page|        content as in the base's page: not even read
    base   |page|page|page|page|
            SAME DATA ZERO DATA ...     a state for each chunk
    runs   |SAME|---DATA---|ZERO|       units of several chunks have one state: DATA if they differ

Ids of both maps must mean the same: they are of one repository, or of two with the same ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.native.hashing import ID_SIZE, ZERO_ID
from nbdsrv.repository.native.slots import Page, Root
from nbdsrv.repository.native.vault import Vault

__all__ = ["Base", "ComparedPage", "State", "compared", "runs"]


class State(IntEnum):
    """What a chunk is, compared with the base."""

    SAME = 0
    ZERO = 1
    DATA = 2


class Base(NamedTuple):
    """A map that another is compared with."""

    vault: Vault
    root: Root


class ComparedPage(NamedTuple):
    """One page.

    Attributes:
        number: of the page.
        page: None if all its chunks are SAME or all are ZERO.
        states: one ``State`` a chunk.
    """

    number: int
    page: Page | None
    states: bytes


def compared(vault: Vault, root: Root, base: Base | None) -> Iterator[ComparedPage]:
    """All pages of a map. Blocking.

    Args:
        vault: where it lies.
        root: of the map.
        base: None: nothing is SAME. So it is where a page of the base is damaged.

    Raises:
        CorruptImage: a page of the map itself is damaged.
    """
    if base is not None and (base.root.chunk_size, base.root.page_slots) != (
        root.chunk_size,
        root.page_slots,
    ):
        base = None
    for number in range(len(root)):
        count, content = root.slots_of(number), root.content(number)
        if base is not None and base.root.content(number) == content:
            yield ComparedPage(number, None, bytes([State.SAME]) * count)
        elif content == ZERO_ID:
            yield ComparedPage(number, None, bytes([State.ZERO]) * count)
        else:
            page = vault.page(root, number)
            yield ComparedPage(number, page, _states(page, _base_page(base, number)))


def _base_page(base: Base | None, number: int) -> Page | None:
    try:
        return base.vault.page(base.root, number) if base is not None else None
    except CorruptImage:
        return None


def _states(page: Page, before: Page | None) -> bytes:
    ids, old = page.ids(), before.ids() if before is not None else b""
    states = bytearray()
    for at in range(0, len(ids), ID_SIZE):
        id_ = ids[at : at + ID_SIZE]
        if id_ == old[at : at + ID_SIZE]:
            states.append(State.SAME)
        else:
            states.append(State.ZERO if id_ == ZERO_ID else State.DATA)
    return bytes(states)


def runs(states: Sequence[int], per_unit: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, state) of equal neighbours, in chunks.

    Args:
        states: of chunks, the first of which begins a unit.
        per_unit: chunks of a unit; the last unit may have fewer.
    """
    begin, before = 0, -1
    for at in range(0, len(states), per_unit):
        state = _state(states[at : at + per_unit])
        if state != before:
            if before >= 0:
                yield begin, at, before
            begin, before = at, state
    if before >= 0:
        yield begin, len(states), before


def _state(states: Iterable[int]) -> int:
    """Of a unit: as in the base, zeroes, or anything else, which is read as a whole."""
    kinds = set(states)
    return kinds.pop() if len(kinds) == 1 else State.DATA
