"""A patched Page says what one that was read anew would say, in as few segments."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.formats.page import Kind, Page, Segment
from nbdsrv.formats.qcow2.writable_patch import patch

START, CLUSTERS = 1 << 20, 40
Cluster = tuple[int, int]
"""(kind, position)"""

CLUSTER = st.one_of(
    st.tuples(st.just(int(Kind.DATA)), st.integers(0, 60)),
    st.tuples(st.just(int(Kind.BLOCK)), st.integers(0, 3)),
    st.sampled_from([(int(Kind.ZERO), 0), (int(Kind.ABSENT), 0)]),
)
CHANGE = st.tuples(st.integers(0, CLUSTERS - 1), st.integers(1, CLUSTERS), CLUSTER).filter(
    lambda change: change[2][0] != Kind.BLOCK  # a block is one cluster, and none is ever made
)


def page_of(clusters: Iterable[Cluster]) -> Page:
    """Clusters of one byte each, for the arithmetic is the same."""
    return Page(START, [Segment(1, kind, position) for kind, position in clusters])


@given(st.lists(CLUSTER, min_size=CLUSTERS, max_size=CLUSTERS), st.lists(CHANGE, max_size=12))
def test_patching(clusters: list[Cluster], changes: list[tuple[int, int, Cluster]]) -> None:
    page = page_of(clusters)
    for at, count, (kind, position) in changes:
        length = min(count, CLUSTERS - at)
        patch(page, (START + at, START + at + length, kind, position, None))
        step = 1 if kind == Kind.DATA else 0
        clusters[at : at + length] = [(kind, position + step * n) for n in range(length)]
        expected = page_of(clusters)
        found = [page.stretch(index) for index in range(len(page))]
        assert found == [expected.stretch(index) for index in range(len(expected))]
