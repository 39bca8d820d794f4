"""Every store passes the same checks, and behaves as a dict would."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.faulty import FaultyStore
from nbdsrv.store.memory import MemoryStore
from nbdsrv.store.s3 import S3Store
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import ObjectMissing, Store
from tests.store.buckets import Service
from tests.store.check_store import CHECKS, check_store

KINDS = ("directory", "memory", "faulty", "s3")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    match request.param:
        case "directory":
            store: Store = DirectoryStore(str(tmp_path / "made" / "here"))
        case "memory":
            store = MemoryStore()
        case "faulty":
            store = FaultyStore(MemoryStore())
        case _:
            store = request.getfixturevalue("s3")
    yield store
    store.close()
    store.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract(store: Store, check: Callable[[Store], None]) -> None:
    check(store)
    assert list(store.list("")) == []


def test_all_of_it_in_a_row() -> None:
    check_store(MemoryStore())


def test_an_object_as_large_as_packs_get(store: Store) -> None:
    data = bytes(range(256)) * (33 << 12)
    assert store.put_new("packs/large", data)
    assert store.get("packs/large") == data
    assert bytes(store.get_range("packs/large", (33 << 20) - 7, 7)) == data[-7:]


_keys = st.sampled_from(["a", "b/a", "b/b", "b/c/d", "b-/x", "c%41"])
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put_new"), _keys, st.binary(max_size=40)),
        st.tuples(st.just("put"), _keys, st.binary(max_size=40)),
        st.tuples(st.just("delete"), _keys, st.just(b"")),
    ),
    max_size=12,
)


def follow(store: Store, steps: list[tuple[str, str, bytes]]) -> None:
    model: dict[str, bytes] = {}
    for method, key, data in steps:
        if method == "put_new":
            assert store.put_new(key, data) is (key not in model)
            model.setdefault(key, data)
        elif method == "put":
            store.put(key, data)
            model[key] = data
        else:
            store.delete(key)
            model.pop(key, None)
        if key in model:
            assert store.get(key) == model[key]
        else:
            with pytest.raises(ObjectMissing):
                store.get(key)
    for prefix in ("", "b/", "b/c/", "b-/"):
        expected = [(key, len(model[key])) for key in sorted(model) if key.startswith(prefix)]
        assert [(row.key, row.size) for row in store.list(prefix)] == expected
    for key in model:
        store.delete(key)


_shared = [HealthCheck.function_scoped_fixture]  # each example leaves the store empty


@given(_steps)
@settings(suppress_health_check=_shared, max_examples=60)
def test_a_directory_is_a_dict(tmp_path: Path, steps: list[tuple[str, str, bytes]]) -> None:
    follow(DirectoryStore(str(tmp_path / "store")), steps)


@given(_steps)
def test_so_is_memory_with_or_without_the_double(steps: list[tuple[str, str, bytes]]) -> None:
    follow(MemoryStore(), steps)
    follow(FaultyStore(MemoryStore()), steps)


@given(_steps)
@settings(suppress_health_check=_shared, max_examples=25)
def test_so_is_a_bucket(s3: S3Store, steps: list[tuple[str, str, bytes]]) -> None:
    follow(s3, steps)


def test_prefixes_of_one_bucket_do_not_see_each_other(
    service: Service, bucket: str, options: S3Options
) -> None:
    whole, one, other = (S3Store(bucket, prefix, options) for prefix in ("", "one", "one-more"))
    one.put_new("a", b"1")
    other.put_new("a", b"2")
    service.client.put_object(Bucket=bucket, Key="one/not a key", Body=b"")
    service.client.put_object(Bucket=bucket, Key="one/.hidden/a", Body=b"")
    assert one.get("a") == b"1"
    assert [row.key for row in one.list("")] == ["a"]
    assert [row.key for row in whole.list("")] == ["one-more/a", "one/a"]
    assert [row.key for row in whole.list("one/")] == ["one/a"]
    assert one.name == f"s3://{bucket}/one"
    assert one.distant


def test_folders_of_other_tools_do_no_harm(service: Service, bucket: str, s3: S3Store) -> None:
    for key in ("", "packs/", "packs/0f/"):
        service.client.put_object(Bucket=bucket, Key=f"some/prefix/{key}", Body=b"")
    for key in ("packs-1", "packs/0f-2", "packs/0f/a"):
        s3.put_new(key, b"x")
    found = [row.key for row in s3.list("") if row.size]
    assert found == ["packs-1", "packs/0f-2", "packs/0f/a"]
