"""A repository as exports: each disk of each restore point, opened when a client asks for it.

::

    LIST    vm1/sda@latest  vm1/sda@01M8A...  vm1/sda@01M8B...       as they are at this moment
    GO      vm1/sda@latest ── select ──> Export of the point 01M8B... ── acquire() ──> PointDisk

A client may also say less, or a time (``vm1/sda@2026-11-25T10``): names are selectors.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import PointDamaged, PointMissing, RepositoryError
from nbdsrv.export.exports import Collection, Export, is_name
from nbdsrv.repository.repository import UNREAD, Point, Repository
from nbdsrv.repository.selector import LATEST, Selected, latest_with, select

__all__ = ["PointExports"]

log = logging.getLogger(__name__)

MAX_LISTED = 50_000
"""Exports shown in a listing, a few megabytes; the others can be opened all the same."""


class Covering(Protocol):
    """What lays an overlay over each export."""

    async def settle(self, prefix: str, asked: str, point: Point, disk: str) -> tuple[str, str]:
        """The export's name, however it was asked for; and its point's selector, if that is set."""

    def over(self, export: Export) -> None:
        """Make ``export`` open an overlay over what it opens."""


class PointExports(Collection):
    """The disks of a repository's points, of one group's, or of some points.

    Attributes:
        covering: lays overlays over them; None where they are served as they are.
    """

    covering: Covering | None = None

    def __init__(
        self,
        repository: Repository,
        name: str,
        *,
        prefix: str = "",
        group: str | None = None,
        only: Sequence[Point] = (),
        tls_only: bool = False,
    ) -> None:
        """Becomes the owner of ``repository``.

        Args:
            repository: open.
            name: for messages.
            prefix: of all names.
            group: None for all.
            only: these points; none for all, and what will be added.
            tls_only: never served in plain text.
        """
        self.name = name
        self.tls_only = tls_only
        self._repository = repository
        self._prefix = prefix
        self._group = group
        self._only = frozenset((point.group, point.id) for point in only)
        self._exports: WeakValueDictionary[tuple[str, str, str], Export] = WeakValueDictionary()
        self._turn = asyncio.Lock()

    async def find(self, name: str) -> Export | None:
        """The export a name selects; a selector that means nothing, or several, is none."""
        if name and f"{name}/" == self._prefix:
            asked = ""  # a repository of one disk, by the name that it was given
        elif name.startswith(self._prefix):
            asked = name[len(self._prefix) :]
        else:
            return None
        try:
            selected = await self._select(asked)
        except PointDamaged as error:
            return self._damaged(name, error)
        if selected is None or not self._serves(selected.point) or not is_name(name):
            return None
        if self.covering is not None:
            return await self._covered(self.covering, asked, selected)
        point = selected.point
        # Under the name it was asked for: clients that list show what they are told here.
        return self._export((name, point.group, point.id), selected)[0]

    async def _select(self, selector: str) -> Selected | None:
        try:
            return await select(self._repository, selector)
        except PointDamaged:
            raise
        except RepositoryError as error:
            log.info("export.unknown export=%r reason=%s", selector, error)
            return None

    def _damaged(self, name: str, error: PointDamaged) -> Export | None:
        """An export that is there and cannot be opened: whoever may have it is told why."""
        if self._only or self._group is not None or not is_name(name):
            return None  # it may be none of ours

        async def fail() -> Disk:
            raise error

        return Export(name, fail, "damaged", tls_only=self.tls_only)

    async def _covered(self, covering: Covering, asked: str, selected: Selected) -> Export:
        """One export for each overlay, of the point that it is over."""
        settle = covering.settle(self._prefix, asked, selected.point, selected.disk)
        name, pinned = await settle
        if pinned:
            found = await self._select(pinned)
            if found is None:
                text = f"the overlay of {name!r} is over {pinned}, which is not there any more"
                raise PointMissing(f"{self.name}: {text}")
            selected = found
        open_ = self._exports.get((name, "", ""))
        if open_ is not None and open_.users:
            return open_  # over whatever it was opened over, until the last client has left
        export, new = self._export((name, selected.point.group, selected.point.id), selected)
        if new:
            covering.over(export)
        self._exports[name, "", ""] = export
        return export

    def _export(self, key: tuple[str, str, str], selected: Selected) -> tuple[Export, bool]:
        """The one export there is under a key, and whether it is new."""
        export = self._exports.get(key)
        if export is not None:
            return export, False
        point = selected.point
        opener = partial(self._open, point, selected.disk)
        export = Export(key[0], opener, _described(point), tls_only=self.tls_only)
        self._exports[key] = export
        return export, True

    async def listed(self) -> Sequence[tuple[str, str]]:
        """By group; ``latest`` first, then from old to new."""
        async with self._turn:  # many who ask at once do not make many listings at once
            every = await self._repository.points(self._group)
        groups: dict[str, list[Point]] = {}
        for point in every:
            if self._serves(point):
                groups.setdefault(point.group, []).append(point)
        names: list[tuple[str, str]] = []
        for group, points in groups.items():
            for disk in dict.fromkeys(disk.name for point in points for disk in point.disks):
                latest = latest_with(points, disk)
                if latest is None:
                    continue
                if latest.disk(disk) is not None or UNREAD in latest.flags:
                    name = f"{self._prefix}{group}/{disk}@{LATEST}"
                    names.append((name, _described(latest)))
            names += [
                (self._name(point, disk.name), _described(point))
                for point in points
                for disk in point.disks
            ]
        unread = sum(UNREAD in point.flags for points in groups.values() for point in points)
        if unread:
            log.warning("exports.unread points=%d of=%d", unread, len(every))
        shown = [row for row in names if is_name(row[0])]
        if len(shown) > MAX_LISTED:
            log.warning("exports.listed shown=%d of=%d", MAX_LISTED, len(shown))
        return shown[:MAX_LISTED]

    async def close(self) -> None:
        """Close the repository; what is open of it stays so."""
        await self._repository.close()

    def _serves(self, point: Point) -> bool:
        if self._only:
            return (point.group, point.id) in self._only
        return self._group in {None, point.group}

    def _name(self, point: Point, disk: str) -> str:
        return f"{self._prefix}{point.group}/{disk}@{point.id}"

    async def _open(self, point: Point, disk: str) -> Disk:
        return await self._repository.open_disk(point, disk)


def _described(point: Point) -> str:
    flags = "".join(f", {flag}" for flag in point.flags)
    return f"restore point {point.id} of {point.stamp}{flags}"
