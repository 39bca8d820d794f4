"""Wanted chunks, against a plain set of them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.repository.native.wanted import Wanted

DEEDS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 8), st.integers(0, 8)), max_size=20
)


@given(deeds=DEEDS)
def test_as_a_set(deeds: list[tuple[bool, int, int, int]]) -> None:
    wanted, model = Wanted(10, 8, 395), set[int]()
    for add, page, one, other in deeds:
        start, stop = min(one, other), max(one, other)
        chunks = {page * 8 + n for n in range(start, stop)}
        if add:
            wanted.add(page, start, stop)
            model |= chunks
        else:
            wanted.discard(page, start, stop)
            model -= chunks
    found = list(wanted.ranges())
    inside = {n for at, span in found for n in range(at, at + span)}
    assert inside == {n for n in range(395) if n // 10 in model}
    assert bool(wanted) == bool(model)
    assert all(a + b < c for (a, b), (c, _) in pairwise(found))
