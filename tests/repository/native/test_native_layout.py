"""Keys: only what we would make ourselves is taken for ours."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv import ulid as ulid_module
from nbdsrv.repository.native import layout
from nbdsrv.store.keys import is_key

NAME = bytes(range(32))
ULID = "01HF000000ABCDEFGHJKMNPQRS"


def test_ulids_ascend_within_a_millisecond_and_when_the_clock_steps_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([2_000_000_000, 2_000_000_000, 1_000_000_000, 2_000_000_001])
    monkeypatch.setattr(ulid_module.time, "time_ns", lambda: next(times) * 10**9)
    monkeypatch.setattr(ulid_module, "_clock", ulid_module._Clock())
    made = [layout.new_ulid() for _ in range(4)]
    assert sorted(set(made)) == made
    assert 2_000_000_000.0 == layout.ulid_time(made[0]) == layout.ulid_time(made[2])
    assert 2_000_000_001.0 == layout.ulid_time(made[3])


def test_a_ulid_is_behind_one_of_a_clock_that_is_ahead() -> None:
    ahead = "7ZZZZZZZZZ" + "0" * 16
    behind = {ulid_module.new_ulid(ahead) for _ in range(9)}
    assert len(behind) == 9
    assert all(ahead < each for each in behind)
    assert ulid_module.new_ulid() < ahead


def test_ulids_of_threads_are_all_different() -> None:
    made: list[list[str]] = [[] for _ in range(4)]

    def make(into: list[str]) -> None:
        into.extend(layout.new_ulid() for _ in range(500))

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2000 == len({ulid for into in made for ulid in into})
    assert all(sorted(into) == into for into in made)


def test_a_ulid_tells_when_it_was_made() -> None:
    ulid = layout.new_ulid()
    assert 26 == len(ulid)
    assert abs(layout.ulid_time(ulid) - time.time()) < 60
    assert ulid == layout.ulid_of(layout.index_key(ulid))
    # The example of the ULID specification.
    assert 1_469_918_176.385 == layout.ulid_time("01ARYZ6S41TSV4RRFFQ69G5FAV")


def test_a_pack_is_known_by_its_key() -> None:
    assert NAME == layout.pack_of(layout.pack_key(NAME))
    assert NAME == layout.pack_of(layout.meta_key(NAME))


@pytest.mark.parametrize(
    "key",
    [
        f"packs/00/{NAME.hex()}",
        f"packs/00/{NAME.hex().upper()}.pk",
        f"packs/01/{NAME.hex()}.pk",
        f"packs/{NAME.hex()}.pk",
        f"packs/00/{NAME.hex()}.pk.pk",
        f"packs/00/{' ' * 64}.pk",
        f"packs/00/{NAME.hex()[:-1]}g.pk",
        f"others/00/{NAME.hex()}.pk",
        "packs/README",
    ],
)
def test_a_file_somebody_put_there_is_no_pack(key: str) -> None:
    assert layout.pack_of(key) is None


@given(st.text(min_size=1, max_size=80))
def test_any_group_has_a_key_and_comes_back_from_it(group: str) -> None:
    try:
        key = layout.point_key(group, ULID)
    except ValueError:
        return  # too long once it is quoted
    assert is_key(key)
    assert group == layout.group_of(key)
    assert ULID == layout.ulid_of(key)
    assert key.startswith(layout.point_prefix(group))


@pytest.mark.parametrize("group", ["", "x" * 201, "é" * 40, "\ud800"])
def test_what_is_no_group(group: str) -> None:
    with pytest.raises(ValueError, match=r"group|surrogates"):
        layout.point_prefix(group)


def test_groups_that_would_be_other_directories() -> None:
    assert layout.point_prefix("..") == "points/%2E./"
    assert layout.point_prefix("a/b") == "points/a%2Fb/"
    assert layout.point_prefix("~a") == "points/%7Ea/"


@pytest.mark.parametrize(
    "key",
    [
        f"points/vm/{ULID}",
        f"points/vm/{ULID}-copy.pt",
        f"points/vm/{ULID}.pt.pt",
        f"points/%76m/{ULID}.pt",  # "vm" spelt in another way
        f"points/%ff/{ULID}.pt",
        f"points/vm/x/{ULID}.pt",
        f"elsewhere/vm/{ULID}.pt",
        "points/vm/latest.pt",
        f"points//{ULID}.pt",
    ],
)
def test_a_key_we_would_not_make_is_no_points(key: str) -> None:
    assert layout.group_of(key) is None
