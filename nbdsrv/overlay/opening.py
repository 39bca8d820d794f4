"""From a base and a directory to the Overlay.

::

    base, opened read-only ──> identity ──┐
    DIR/<export> ── locked ──> Opened ────┴──> Overlay      or an error, and nothing is held
"""

import os
from functools import partial

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.errors import DiskError
from nbdsrv.overlay.description import identity_of
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.opened import Opened, open_files
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.place import Place, directory_name

__all__ = ["open_overlay"]


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
    try:
        if Ability.WRITE in base.abilities:
            raise DiskError(f"{base.name} is open for writing; the base of an overlay never is")
        open_ = partial(_open, directory, base, export, source, whole=whole, files=files)
        opened = await base.workers.look_up(open_)
        return Overlay(base, opened)
    except BaseException:
        await base.close()
        raise


def _open(
    directory: str, base: Disk, export: str, source: str, *, whole: bool, files: Files | None
) -> Opened:
    path = os.path.join(os.path.abspath(directory), directory_name(export))
    place = Place.take(path, create=True)
    try:
        identity = identity_of(base, whole=whole)
    except BaseException:
        place.let_go()
        raise
    return open_files(place, base, identity, export, source, files)
