"""GROUP/DISK@POINT: every part left out, names with slashes and at signs, and what is ambiguous."""

from collections.abc import Sequence

import pytest

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import PointMissing, RepositoryError
from nbdsrv.repository.repository import DiskFacts, Point, Repository
from nbdsrv.repository.selector import scope_of, select


class Shelf(Repository):
    """Points in a list."""

    name = "shelf"
    kind = "test"

    def __init__(self, *points: Point) -> None:
        self._points = points
        self.asked: list[str | None] = []

    async def points(self, group: str | None = None) -> Sequence[Point]:
        self.asked.append(group)
        return [point for point in self._points if group in {None, point.group}]

    async def open_disk(self, point: Point, name: str) -> Disk:
        raise AssertionError("only names are looked at here")

    async def close(self) -> None:
        pass


def point(id_: str, group: str, *disks: str, hour: int = 0, flags: tuple[str, ...] = ()) -> Point:
    created = 1_795_600_800 + hour * 3600  # 2026-11-25T10:00:00Z
    return Point(id_, group, created, tuple(DiskFacts(each, 1) for each in disks), flags=flags)


MANY = (
    point("01AAX", "vm1", "sda", "sdb"),
    point("01AAY", "vm1", "sda", "sdb", hour=1),
    point("01AB", "vm1", "sda", hour=2),
    point("01BA", "vm2", "root", hour=1),
    point("01BB", "vm2", "root", hour=30),
    point("01CA", "a/b", "c@d", hour=3),
    point("01CB", "a", "b/c", hour=3),
    point("01D", "vm1/sda", "x", hour=4),
)


@pytest.mark.parametrize(
    ("selector", "id_", "disk"),
    [
        ("vm1/sda@latest", "01AB", "sda"),
        ("vm1", "01AB", "sda"),  # its latest point has one disk only
        ("vm1@01AB", "01AB", "sda"),
        ("vm1/sdb", "01AAY", "sdb"),  # the latest that has it
        ("vm1/sdb@01AAX", "01AAX", "sdb"),
        ("vm1/sdb@01aax", "01AAX", "sdb"),
        ("vm1/sda@2026-11-25T11", "01AAY", "sda"),
        ("vm1/sda@2026-11-25t12:00", "01AB", "sda"),
        ("vm2", "01BB", "root"),
        ("vm2@2026-11-26", "01BB", "root"),
        ("root", "01BB", "root"),
        ("root@01BA", "01BA", "root"),
        ("@01BA", "01BA", "root"),
        ("sdb", "01AAY", "sdb"),
        ("vm1/sda", "01AB", "sda"),  # group and disk are said: not the group of that name
        ("a/b", "01CA", "c@d"),
        ("a/b/c", "01CB", "b/c"),
        ("a/b/c@d", "01CA", "c@d"),
        ("a/b/c@d@latest", "01CA", "c@d"),
        ("a/b/c@01CB", "01CB", "b/c"),
        ("vm1/sda/x", "01D", "x"),
    ],
)
async def test_what_is_meant(selector: str, id_: str, disk: str) -> None:
    selected = await select(Shelf(*MANY), selector)
    assert (selected.point.id, selected.disk) == (id_, disk)


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        ("", "several groups: a, a/b, vm1, vm1/sda, vm2"),
        ("vm1@01AAX", "several disks: vm1/sda, vm1/sdb"),
        ("vm1@01AA", "several points: vm1@01AAX"),
        ("vm1/sdb@2026-11-25", "several points: vm1@01AAX (2026-11-25T10:00:00Z), vm1@01AAY"),
        ("@2026-11-25T11", "several points: vm1@01AAY"),
    ],
)
async def test_ambiguity_names_the_candidates(selector: str, says: str) -> None:
    with pytest.raises(RepositoryError, match="say which") as refused:
        await select(Shelf(*MANY), selector)
    assert not isinstance(refused.value, PointMissing)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        ("vm3", "the groups are a, a/b, vm1"),
        ("vm2/sda", "no such point or disk of 'vm2'; its disks are root"),
        ("vm2@2025", "its points vm2@01BA"),
        ("@", "no such group"),
        ("@@//", "no such group"),
    ],
)
async def test_what_is_missing_is_said(selector: str, says: str) -> None:
    with pytest.raises(PointMissing) as refused:
        await select(Shelf(*MANY), selector)
    assert says in str(refused.value)


async def test_an_empty_repository() -> None:
    for selector in ("", "vm1"):
        with pytest.raises(PointMissing, match="no restore points"):
            await select(Shelf(), selector)


async def test_one_disk_needs_no_selector() -> None:
    selected = await select(Shelf(point("01A", "vm", "sda")), "")
    assert (selected.point.id, selected.disk) == ("01A", "sda")


async def test_latest_is_never_silently_an_older_one() -> None:
    shelf = Shelf(point("01A", "vm", "sda"), point("01B", "vm", flags=("damaged",)))
    for selector in ("vm/sda", "vm", "", "vm/sda@latest", "sda"):
        with pytest.raises(RepositoryError, match="01B, is damaged"):
            await select(shelf, selector)
    with pytest.raises(RepositoryError, match="01B is damaged"):
        await select(shelf, "vm@01B")
    assert (await select(shelf, "vm/sda@01A")).point.id == "01A"


async def test_only_the_group_is_asked_for() -> None:
    shelf = Shelf(*MANY)
    await select(shelf, "vm2/root@latest")
    assert None not in shelf.asked


async def test_scopes() -> None:
    shelf = Shelf(*MANY)
    scope = await scope_of(shelf, "vm1")
    assert (scope.group, scope.disk, scope.said) == ("vm1", None, False)
    assert [each.id for each in scope.points] == ["01AAX", "01AAY", "01AB"]
    scope = await scope_of(shelf, "vm1@01AAX")
    assert (scope.group, scope.disk, scope.said) == ("vm1", None, True)
    scope = await scope_of(shelf, "")
    assert len(scope.points) == len(MANY)


async def test_a_name_that_two_disks_have() -> None:
    shelf = Shelf(point("01A", "a", "b/c"), point("01B", "a/b", "c"))
    with pytest.raises(RepositoryError, match="disk 'c' of 'a/b', disk 'b/c' of 'a'; say which"):
        await select(shelf, "a/b/c@latest")
    assert (await select(shelf, "a/b/c@01A")).disk == "b/c"
    assert (await select(shelf, "a/b/c@01B")).disk == "c"
