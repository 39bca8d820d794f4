"""From a base and a directory to the Overlay.

::

    base, opened read-only ──> identity ──┐
    DIR/<export> ── locked ──> Opened ────┴──> Overlay      or an error, and nothing is held

A directory that was given another name since, or is reached by a link, is the overlay that it is:
what it was made for by name (``export``) may be another one by now.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.errors import DiskError, PointMissing
from nbdsrv.overlay.description import identity_of
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.opened import Opened, open_files
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.place import Place, directory_name

__all__ = ["open_overlay", "reopen_overlay"]


async def open_overlay(
    base: Disk,
    directory: str,
    export: str,
    source: str,
    *,
    whole: bool = True,
    files: Files | None = None,
) -> Overlay:
    """The overlay of an export in DIR, over ``base``; the one that is there, or a new one.

    Args:
        base: read-only; closed with the overlay, or if this raises.
        directory: DIR, made when it is needed.
        export: its name.
        source: the base as the operator named it, for people.
        whole: is the base all of what its facts speak of, and not a partition?
        files: how files are changed; as usual without it.

    Raises:
        DiskError: it is in use, over another base, damaged, or cannot be opened.
    """
    return await _opened(base, partial(_open, directory, base, export, source, whole, files))


async def reopen_overlay(base: Disk, path: str, *, whole: bool = True) -> Overlay:
    """The overlay that lies at ``path``, whatever its directory is called by now.

    Args:
        base: read-only; closed with the overlay, or if this raises.
        path: of its directory.
        whole: is the base all of what its facts speak of, and not a partition?

    Raises:
        DiskError: there is none, it is in use, over another base, damaged, or cannot be opened.
    """
    return await _opened(base, partial(_reopen, path, base, whole))


async def _opened(base: Disk, open_: Callable[[], Opened]) -> Overlay:
    try:
        if Ability.WRITE in base.abilities:
            raise DiskError(f"{base.name} is open for writing; the base of an overlay never is")
        opened = await base.workers.look_up(open_)
        return Overlay(base, opened)
    except BaseException:
        await base.close()
        raise


def _open(
    directory: str,
    base: Disk,
    export: str,
    source: str,
    whole: bool,  # noqa: FBT001
    files: Files | None,
) -> Opened:
    path = os.path.join(os.path.abspath(directory), directory_name(export))
    place = Place.take(path, create=True)
    return open_files(place, base, _identity(place, base, whole), export, source, files)


def _reopen(path: str, base: Disk, whole: bool) -> Opened:  # noqa: FBT001
    place = Place.take(os.path.abspath(path), create=False)
    identity = _identity(place, base, whole)
    try:
        found = place.description()
        if found is None:
            raise PointMissing(f"{path}: is no overlay; `nbdsrv overlay ls DIR` shows them")
    except BaseException:
        place.let_go()
        raise
    return open_files(place, base, identity, found.export, found.source)


def _identity(place: Place, base: Disk, whole: bool) -> dict[str, Any]:  # noqa: FBT001
    try:
        return identity_of(base, whole=whole)
    except BaseException:
        place.let_go()
        raise
