"""``serve --overlay DIR``: exports that are written to over what they open.

::

    GO vm1/sda@latest ── DIR/vm1%2Fsda%40latest ── there? ── yes: over the point it was made over
                                │                             no: over the latest one
                          base, read-only
                                │
                            Overlay ── Door (frozen.sock), until the last client has left

An overlay is made on the disk before its first write; until then there is only a locked directory,
which goes with the last client. So looking at an export leaves nothing behind, and ``@latest``
moves on as long as nothing was written, and not any more from then on.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError, DiskError, PointMissing
from nbdsrv.export.exports import Collection, Export
from nbdsrv.export.grammar import Kind, Source
from nbdsrv.export.points import PointExports
from nbdsrv.overlay.background import Background
from nbdsrv.overlay.description import Description
from nbdsrv.overlay.door import Door
from nbdsrv.overlay.opening import open_overlay
from nbdsrv.overlay.place import directory_name, read_description
from nbdsrv.overlay.quiet import NOBODY, Traffic
from nbdsrv.overlay.recording import Recording
from nbdsrv.overlay.source import absolute, pinned
from nbdsrv.overlay.trace_place import TracePlace
from nbdsrv.repository.repository import Point

__all__ = ["Overlays", "check_coverable", "recorded"]


def check_coverable(source: Source) -> None:
    """Raises ConfigError for what no overlay can lie over."""
    if source.kind is Kind.HYPERVISOR:
        text = "a running VM has no overlay: the moment it is frozen at ends with the server"
        raise ConfigError(f"{source.text}: {text}; back it up and serve the point")


class Overlays:
    """All overlays in DIR that one server serves. Belongs to one event loop."""

    def __init__(self, directory: str, workers: Workers, traffic: Traffic = NOBODY) -> None:
        """Nothing is made yet; ``traffic`` is of the server's clients."""
        self._directory = directory
        self._traffic = traffic
        self._rates: dict[int, Rate] = {}
        self._backgrounds: set[Background] = set()
        self._workers = workers
        self._doors: set[Door] = set()

    def over(
        self,
        export: Export,
        source: Source,
        opener: Callable[[Source], Awaitable[Disk]],
        hydrate: int | None = None,
    ) -> None:
        """From now on ``export`` opens an overlay over what ``source`` names.

        Args:
            export: nobody has opened it yet.
            source: the base.
            opener: opens it, or the very point that an overlay is over; read-only.
            hydrate: bytes of the base a second that are copied into the overlay while it is in
                use, 0: as fast as it goes; None: it is not.

        Raises:
            ConfigError: nothing can lie over that.
        """
        check_coverable(source)

        async def open_base() -> Disk:
            found = await self._recorded(export.name)
            try:
                return await opener(pinned(source, found))
            except PointMissing as error:
                raise self._gone(export.name, found, error) from error

        whole = source.partition is None
        self._cover(export, open_base, absolute(source), whole=whole, hydrate=hydrate)

    def cover(self, collection: Collection, source: Source, hydrate: int | None = None) -> None:
        """Each export of a repository gets an overlay of its own.

        Raises:
            ConfigError: it is no repository.
        """
        check_coverable(source)
        if not isinstance(collection, PointExports):
            raise ConfigError(f"{source.text}: has no exports that overlays could lie over")
        collection.covering = _Covering(self, absolute(source), hydrate)

    def facts(self) -> list[dict[str, object]]:
        """Of each overlay that is open; for ``status``."""
        return [each.facts for each in self._backgrounds]

    async def close(self) -> None:
        """Let commits that are running end in an error, so that all overlays can be closed."""
        for door in list(self._doors):
            await door.close()

    async def _recorded(self, export: str) -> Description | None:
        return await self._workers.look_up(recorded, self._directory, export)

    def _gone(self, export: str, found: Description | None, error: DiskError) -> DiskError:
        """The point an overlay is over has been pruned."""
        if found is None:
            return error
        path = os.path.join(self._directory, directory_name(export))
        text = f"overlay {path} is over {found.selector}, which is gone: {error}"
        return PointMissing(text)

    def _cover(
        self,
        export: Export,
        open_base: Callable[[], Awaitable[Disk]],
        source: str,
        *,
        whole: bool = True,
        hydrate: int | None = None,
    ) -> None:
        async def open_() -> Disk:
            base = Recording(await open_base())
            directory = self._directory
            overlay = await open_overlay(base, directory, export.name, source, whole=whole)
            door = Door(overlay, export)
            try:
                await door.open()
            except BaseException:
                await overlay.close()
                raise
            place = TracePlace(base.inside, directory, source)
            background = Background(overlay, base, place, self._traffic, self._rate(hydrate))
            self._doors.add(door)
            self._backgrounds.add(background)
            overlay.companions.append(background.stop)
            overlay.companions.append(door.close)
            overlay.companions.append(self._forgetting(door, background))
            background.start()
            return overlay

        export.open = open_

    def _rate(self, hydrate: int | None) -> Rate | None:
        """What ``Background`` is told. All that have the same rate share it."""
        if hydrate is None:
            return None
        return self._rates.setdefault(hydrate, Rate(hydrate or math.inf))

    def _forgetting(self, door: Door, background: Background) -> Callable[[], Awaitable[None]]:
        async def forget() -> None:
            self._doors.discard(door)
            self._backgrounds.discard(background)
            await asyncio.sleep(0)

        return forget


class _Covering:
    """For ``PointExports``: see ``export.points.Covering``."""

    def __init__(self, overlays: Overlays, source: str, hydrate: int | None) -> None:
        self._overlays = overlays
        self._source = source
        self._hydrate = hydrate

    async def settle(self, prefix: str, asked: str, point: Point, disk: str) -> tuple[str, str]:
        """The name an export has whatever it was asked by, and the selector of its point."""
        name = f"{prefix}{point.group}/{disk}@{_said(asked, point)}"
        found = await self._overlays._recorded(name)  # noqa: SLF001 - one of two halves
        return name, found.selector if found is not None else ""

    def over(self, export: Export) -> None:
        """``export`` opens an overlay over what it opened before."""
        cover = self._overlays._cover  # noqa: SLF001 - as above
        cover(export, export.open, self._source, hydrate=self._hydrate)


def _said(asked: str, point: Point) -> str:
    """``latest``, unless the name says the point: by its id or time, or the beginning of one."""
    tail = asked.rpartition("@")[2] if "@" in asked else ""
    said = tail and (point.id.startswith(tail.upper()) or point.stamp.startswith(tail))
    return point.id if said or tail == point.id else "latest"


def recorded(directory: str, export: str) -> Description | None:
    """What the overlay of an export in DIR says of itself; None if there is none. Blocking.

    Raises:
        DiskError: it cannot be read.
    """
    path = os.path.join(directory, directory_name(export))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError.from_os(f"overlay {path}", error) from error
    try:
        return read_description(path, fd)
    finally:
        os.close(fd)
