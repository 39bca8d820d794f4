"""Which meta contexts a client's queries name: to be listed, and to be selected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH, listed, selected

AVAILABLE = [
    ALLOCATION,
    "qemu:dirty-bitmap:monday",
    "qemu:dirty-bitmap:tuesday",
    ALLOCATION_DEPTH,
    "x-own:",
]
PARTS = st.sampled_from(["base", "qemu", "dirty-bitmap", "allocation", "monday", "x", ""])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(":".join)
QUERIES = st.lists(NAMES | st.sampled_from(AVAILABLE) | st.text(max_size=5), max_size=8)
CHOICES = st.lists(NAMES, max_size=6, unique=True)


@given(CHOICES, QUERIES)
def test_selected_are_exactly_the_available_ones_named_in_full(
    available: list[str], queries: list[str]
) -> None:
    chosen = selected(available, queries)
    assert set(available) & set(queries) == set(chosen.values())
    assert len(set(chosen.values())) == len(chosen)


@given(CHOICES, QUERIES)
def test_ids_are_unique_fit_the_wire_and_are_never_zero(
    available: list[str], queries: list[str]
) -> None:
    assert list(range(1, len(selected(available, queries)) + 1)) == list(
        selected(available, queries)
    )


@given(CHOICES, QUERIES, st.randoms(use_true_random=False))
def test_order_and_repetition_of_queries_change_nothing(
    available: list[str], queries: list[str], rng: st.DataObject
) -> None:
    mixed = queries * 2
    rng.shuffle(mixed)  # type: ignore[attr-defined]
    assert selected(available, queries) == selected(available, mixed)
    assert not queries or listed(available, queries) == listed(available, mixed)


@given(CHOICES)
def test_no_query_lists_all_and_selects_none(available: list[str]) -> None:
    assert available == listed(available, [])
    assert {} == selected(available, [])


@given(CHOICES, QUERIES)
def test_what_can_be_selected_by_a_query_is_listed_by_it(
    available: list[str], queries: list[str]
) -> None:
    assert set(selected(available, queries).values()) <= set(listed(available, queries))


@given(CHOICES, QUERIES)
def test_listed_are_available_in_their_order_and_once(
    available: list[str], queries: list[str]
) -> None:
    found = listed(available, queries)
    assert [name for name in available if name in found] == found


@given(CHOICES, NAMES)
def test_a_query_ending_in_a_colon_lists_everything_below_it(
    available: list[str], name: str
) -> None:
    below = [known for known in available if known.startswith(f"{name}:")]
    assert below == listed(available, [f"{name}:"])


@given(CHOICES, NAMES.filter(lambda name: not name.endswith(":")))
def test_a_query_not_ending_in_a_colon_lists_that_one_or_nothing(
    available: list[str], name: str
) -> None:
    assert [name] * (name in available) == listed(available, [name])


@pytest.mark.parametrize("query", ["x-nobody:", "x-nobody:leaf", "bas:allocation", "", ":", "base"])
def test_unknown_namespaces_are_ignored(query: str) -> None:
    assert [] == listed(AVAILABLE, [query])
    assert {} == selected(AVAILABLE, [query])
    assert {1: ALLOCATION} == selected(AVAILABLE, [query, ALLOCATION])


def test_a_wildcard_lists_and_does_not_select() -> None:
    assert AVAILABLE[1:4] == listed(AVAILABLE, ["qemu:"])
    assert AVAILABLE[1:3] == listed(AVAILABLE, ["qemu:dirty-bitmap:"])
    assert {} == selected(AVAILABLE, ["qemu:", "qemu:dirty-bitmap:", "base:"])
