"""``GROUP/DISK@POINT``: which disk of which restore point is meant (docs/usage.md, "SOURCE").

::

    vm1/sda@2026-11-25T10        all said
    vm1/sda                      the latest point that has it
    vm1@latest   vm1             its only disk
    sda@01M8AC   @01M8AC   ""    where one group, one disk is left

POINT is an id or the beginning of one, the beginning of its time in UTC, or ``latest``. Names may
hold ``/`` and ``@``: all ways to read the text are tried, those that say group and disk first, then
the longest group, then the longest disk; the first that leads to something counts. Where it leads
to several things, that is an error which names them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdsrv.errors import DiskError, PointDamaged, PointMissing, RepositoryError
from nbdsrv.repository.repository import UNREAD, Point, Repository

__all__ = ["LATEST", "Scope", "Selected", "latest_with", "meant", "scope_of", "select"]

LATEST = "latest"
MAX_NAMED = 10
"""Candidates an error names."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What a selector says, once it is known how it must be read. None: left out.

    Attributes:
        group: the VM.
        disk: the disk's name, or another it goes by.
        points: the points it may mean, from old to new; those of the group if none is said.
        said: does the selector say a point?
    """

    group: str | None
    disk: str | None
    points: tuple[Point, ...]
    said: bool


@dataclass(frozen=True, slots=True)
class Selected:
    """One disk of one point."""

    point: Point
    disk: str


@dataclass(frozen=True, slots=True)
class _Reading:
    group: str | None
    disk: str | None
    point: str | None


async def select(repository: Repository, selector: str) -> Selected:
    """The one disk a selector means.

    Raises:
        PointMissing: there is no such group, point or disk.
        PointDamaged: it is damaged; or it is the latest, and that is.
        RepositoryError: it may mean several, which are named.
        DiskError: the repository cannot be read.
    """
    scope = await scope_of(repository, selector)
    groups = sorted({point.group for point in scope.points})
    if len(groups) > 1 and not scope.said:
        raise _several(repository, selector, "groups", groups)
    if not scope.said:
        return _latest(repository, selector, scope)
    if len(scope.points) > 1:
        raise _several(repository, selector, "points", [_shown(each) for each in scope.points])
    (point,) = scope.points
    return Selected(point, _disk_of(repository, selector, scope, point))


async def scope_of(repository: Repository, selector: str) -> Scope:
    """How a selector must be read in this repository.

    Raises:
        PointMissing, DiskError: as ``select``.
    """
    if not selector:
        points = tuple(await repository.points())
        if not points:
            raise PointMissing(f"{repository.name}: has no restore points")
        return Scope(None, None, points, said=False)
    readings = _readings(selector)
    groups: dict[str, Sequence[Point]] = {}
    found: list[Scope] = []
    for reading in readings:
        name = reading.group
        if name is None:
            continue
        if reading.disk is None and found:
            break  # group and disk are said: nothing is left out
        if name not in groups:
            groups[name] = await repository.points(name)
        if scope := _fitting(reading, groups[name]):
            found.append(scope)
    if len(found) > 1 and found[0].disk is not None:
        names = [f"disk {each.disk!r} of {each.group!r}" for each in found]
        raise _several(repository, selector, "disks", names)
    if found:
        return found[0]
    every = await repository.points()
    for reading in readings:
        if reading.group is None and (scope := _fitting(reading, every)):
            return scope
    for reading in sorted(readings, key=_says_no_point):
        _refuse_lost(repository, reading, every)
    raise _missing(repository, selector, groups, every)


def _refuse_lost(repository: Repository, reading: _Reading, every: Sequence[Point]) -> None:
    """Raises DiskError if the disk is not listed because it, or its point, cannot be read."""
    if reading.disk is None:
        return
    if _says_no_point(reading):
        # Whether one of that group that was not given has the disk, nobody can say.
        unread = [each for each in reversed(every) if UNREAD in each.flags]
        fitting = [each for each in unread if each.group == reading.group]
    else:
        fitting = _named(reading.point or "", every)
    for point in fitting:
        if reading.group in {None, point.group} and _lost(point, reading.disk):
            raise _lost_error(point, f"{repository.name}: {reading.disk!r} at point {point.id}")


def _readings(selector: str) -> list[_Reading]:
    """All ways to read a selector: which are tried first."""
    found: list[tuple[str | None, str | None, str | None]] = []
    for at in (*_marks(selector, "@"), len(selector)):
        body = selector[:at] or None
        point = selector[at + 1 :] or None
        found += [(body, None, point), (None, body, point)]
        if body:
            found += [(body[:n], body[n + 1 :], point) for n in _marks(body, "/")]
    readings = [_Reading(*each) for each in dict.fromkeys(found) if any(each)]
    readings.sort(key=_precedence, reverse=True)
    return readings


def _says_no_point(reading: _Reading) -> bool:
    return reading.point in {None, LATEST}


def _precedence(reading: _Reading) -> tuple[bool, int, int]:
    group, disk = reading.group or "", reading.disk or ""
    return bool(group and disk), len(group), len(disk)


def _marks(text: str, mark: str) -> list[int]:
    return [at for at, letter in enumerate(text) if letter == mark]


def _fitting(reading: _Reading, points: Sequence[Point]) -> Scope | None:
    """What a reading leads to among these points; None if it leads nowhere."""
    if _says_no_point(reading):
        fitting = list(points)
        said = False
    else:
        assert reading.point is not None
        fitting = _named(reading.point, points)
        said = True
    if reading.disk is not None:
        having = [each for each in fitting if each.disk(reading.disk) is not None]
        if not having:
            return None
        # Without a point the damaged ones are kept: the latest may be among them.
        lost = [each for each in fitting if _lost(each, reading.disk)]
        fitting = having if said else [each for each in fitting if each in having or each in lost]
    if not fitting:
        return None
    if reading.group is None and reading.disk is not None and not said:
        having_groups = {each.group for each in having}
        fitting = [each for each in fitting if each.group in having_groups]
    # By its own name: it may have been selected by another, such as an id.
    group = reading.group and fitting[0].group
    return Scope(group, reading.disk, tuple(fitting), said)


def _named(text: str, points: Sequence[Point]) -> list[Point]:
    """The points an id, a snapshot's name, the beginning of an id, or of a time stands for."""
    exact = [each for each in points if each.id == text]
    exact = exact or [each for each in points if each.facts.get("snapshot") == text]
    if exact:
        return exact
    folded = text.upper()
    return [
        each
        for each in points
        if each.id.upper().startswith(folded) or each.stamp.startswith(folded)
    ]


def latest_with(points: Sequence[Point], disk: str | None) -> Point | None:
    """The newest point that has the disk, or a newer one that cannot be read and might have it.

    Args:
        points: of one group, from old to new.
        disk: None for any point.
    """
    for point in reversed(points):
        if disk is None or _lost(point, disk) or point.disk(disk) is not None:
            return point
    return None


def meant(scope: Scope, selector: str) -> Sequence[Point]:
    """The points a selector means: all it may, and where it says ``@latest`` each group's newest.

    Args:
        scope: what ``scope_of`` says of it.
        selector: it.
    """
    if scope.said or not selector.endswith(f"@{LATEST}"):
        return scope.points
    groups = dict.fromkeys(point.group for point in scope.points)
    newest = (
        latest_with([point for point in scope.points if point.group == group], scope.disk)
        for group in groups
    )
    return [point for point in newest if point is not None]


def _latest(repository: Repository, selector: str, scope: Scope) -> Selected:
    point = latest_with(scope.points, scope.disk)
    assert point is not None
    if _lost(point, scope.disk):
        what = f"{repository.name}: the latest point of {point.group!r}, {point.id},"
        if UNREAD in point.flags:
            raise _lost_error(point, what)
        text = f"{what} is damaged"
        raise PointDamaged(f"{text}; name an older one with @POINT, `nbdsrv ls` shows them")
    return Selected(point, _disk_of(repository, selector, scope, point))


def _disk_of(repository: Repository, selector: str, scope: Scope, point: Point) -> str:
    """The disk by its name, whatever the selector calls it."""
    if scope.disk is None:
        return _only_disk(repository, selector, point)
    found = point.disk(scope.disk)
    return found.name if found is not None else scope.disk


def _bad(point: Point) -> bool:
    return "damaged" in point.flags or UNREAD in point.flags


def _lost_error(point: Point, what: str) -> DiskError:
    """Why it is not to be had: an outage is no damage, and may be over the next time."""
    reason = point.facts.get("reason", "it cannot be read")
    if UNREAD in point.flags:
        return DiskError(f"{what} cannot be read now: {reason}")
    return PointDamaged(f"{what} is damaged: {reason}")


def _lost(point: Point, disk: str | None) -> bool:
    """Can it not be read, or not that disk of it, which it then does not list?"""
    if _bad(point):
        return True
    partly = "partial" in point.flags and "reason" in point.facts
    return disk is not None and partly and point.disk(disk) is None


def _only_disk(repository: Repository, selector: str, point: Point) -> str:
    if _bad(point):
        raise _lost_error(point, f"{repository.name}: point {point.id}")
    if len(point.disks) != 1:
        names = [f"{point.group}/{disk.name}" for disk in point.disks]
        raise _several(repository, selector, "disks", names)
    return point.disks[0].name


def _shown(point: Point) -> str:
    return f"{point.group}@{point.id} ({point.stamp})"


def _several(
    repository: Repository, selector: str, what: str, names: Sequence[str]
) -> RepositoryError:
    where = f"{repository.name}#{selector}" if selector else repository.name
    if not names:
        return PointMissing(f"{where}: the point has no {what}")
    return RepositoryError(f"{where}: may mean several {what}: {_list(names)}; say which")


def _missing(
    repository: Repository,
    selector: str,
    groups: dict[str, Sequence[Point]],
    every: Sequence[Point],
) -> PointMissing:
    """Says how far the selector leads."""
    where = f"{repository.name}#{selector}"
    for group in sorted(groups, key=len, reverse=True):
        points = groups[group]
        if points:
            disks = sorted({disk.name for point in points for disk in point.disks})
            stamps = f"{_shown(points[0])} to {_shown(points[-1])}"
            text = f"{where}: no such point or disk of {group!r}"
            return PointMissing(f"{text}; its disks are {_list(disks)}, its points {stamps}")
    names = sorted({point.group for point in every})
    if not names:
        return PointMissing(f"{where}: the repository has no restore points")
    return PointMissing(f"{where}: no such group, point or disk; the groups are {_list(names)}")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown or "none"
