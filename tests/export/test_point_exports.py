"""A repository as exports: what is listed, what a name opens, and who shares a Disk."""

import errno
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.export.exports import Catalogue, Export
from nbdsrv.export.points import PointExports
from nbdsrv.repository.native.layout import point_key
from nbdsrv.repository.native.repository import NativeRepository
from nbdsrv.store.faulty import Failure, FaultyStore, calls
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.repository.native.building import Building


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[Workers]:
    async with running_workers() as running:
        yield running


def _names(listed: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in listed]


async def test_points_come_and_go(workers: Workers) -> None:
    build = Building.fresh()
    one = build.point("vm", {"sda": b"1", "sdb": b"2"})
    exports = PointExports(NativeRepository(build.vault, workers), "r")
    assert _names(list(await exports.listed())) == [
        "vm/sda@latest",
        "vm/sdb@latest",
        f"vm/sda@{one.id}",
        f"vm/sdb@{one.id}",
    ]
    two = build.point("vm", {"sda": b"3"})
    listed = dict(await exports.listed())
    assert f"vm/sda@{two.id}" in listed
    assert two.id in listed["vm/sda@latest"]
    assert one.id in listed["vm/sdb@latest"]
    for name in listed:
        assert await exports.find(name) is not None
    build.vault.store.delete(point_key("vm", one.id))
    assert _names(list(await exports.listed())) == ["vm/sda@latest", f"vm/sda@{two.id}"]
    assert await exports.find(f"vm/sda@{one.id}") is None
    await exports.close()


async def test_latest_is_what_it_is_when_asked(workers: Workers) -> None:
    build = Building.fresh()
    build.point("vm", {"sda": b"1"})
    exports = PointExports(NativeRepository(build.vault, workers), "r")
    before = await exports.find("vm/sda@latest")
    assert before is not None
    assert await exports.find("vm/sda@latest") is before  # clients share what is open
    disk = await before.acquire()
    build.point("vm", {"sda": b"2"})
    after = await exports.find("vm/sda@latest")
    assert after is not None
    assert after is not before
    newer = await after.acquire()
    assert (await content(disk, 0, 1), await content(newer, 0, 1)) == (b"1", b"2")
    await before.release()
    await after.release()
    await exports.close()


async def test_points_that_a_store_does_not_give_now_are_not_unknown(workers: Workers) -> None:
    """Not even where only a group is served, and what is damaged may be none of its."""
    build = Building.fresh()
    build.point("vm", {"sda": b"1"})
    two = build.point("vm", {"sda": b"2"})
    failure = Failure(calls("get", key=point_key("vm", two.id)), errno.EIO)
    store = build.vault.store = FaultyStore(build.vault.store, failures=[failure])
    store.distant = True
    exports = PointExports(NativeRepository(build.vault, workers), "r", group="vm")
    listed = dict(await exports.listed())
    assert len(listed) == 2
    assert "damaged" not in str(listed)
    assert listed["vm/sda@latest"].endswith(", unread")
    for name in ("vm/sda@latest", f"vm/sda@{two.id}"):
        with pytest.raises(DiskError, match="cannot be read now"):
            await exports.find(name)
    await exports.close()


async def test_only_what_is_meant_to_be_served(workers: Workers) -> None:
    build = Building.fresh()
    one = build.point("vm", {"sda": b"1"})
    two = build.point("vm", {"sda": b"2"})
    other = build.point("other", {"sda": b"3"})
    group = PointExports(NativeRepository(build.vault, workers), "r", group="vm", prefix="old/")
    assert _names(list(await group.listed())) == [
        "old/vm/sda@latest",
        f"old/vm/sda@{one.id}",
        f"old/vm/sda@{two.id}",
    ]
    assert await group.find(f"old/vm/sda@{one.id}") is not None
    for name in (f"vm/sda@{one.id}", f"old/other/sda@{other.id}", f"old/@{other.id}", "", "x"):
        assert await group.find(name) is None
    (point,) = [p for p in await group._repository.points("vm") if p.id == one.id]
    single = PointExports(group._repository, "r", only=[point])
    assert f"vm/sda@{two.id}" not in dict(await single.listed())
    assert await single.find("vm/sda@latest") is None
    await group.close()


async def test_beside_other_exports(workers: Workers) -> None:
    async def never() -> None:
        raise AssertionError

    build = Building.fresh()
    build.point("vm", {"sda": b"1"})
    catalogue = Catalogue()
    catalogue.add(Export("disk", never))
    catalogue.collections.append(
        PointExports(NativeRepository(build.vault, workers), "r", tls_only=True)
    )
    assert _names(await catalogue.listed(secure=False)) == ["disk"]
    assert "vm/sda@latest" in _names(await catalogue.listed(secure=True))
    found = await catalogue.find("vm/sda")
    assert found is not None
    assert found.tls_only
    assert await catalogue.find("nobody") is None


async def test_a_repository_of_one_disk_by_its_own_name(workers: Workers) -> None:
    build = Building.fresh()
    build.point("vm", {"sda": b"1"})
    exports = PointExports(NativeRepository(build.vault, workers), "r", prefix="old/")
    found = await exports.find("old")
    assert found is not None
    disk = await found.acquire()
    assert await content(disk, 0, 1) == b"1"
    await found.release()
    assert await exports.find("old/") is not None
    for name in ("", "ol", "older", "/"):
        assert await exports.find(name) is None
    build.point("other", {"sda": b"2"})
    assert await exports.find("old") is None, "which of the two?"
    await exports.close()
