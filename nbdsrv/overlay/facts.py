"""What an overlay on the disk is and holds, without opening it for use.

::

    overlay.json ── map, replayed ── data's blocks ── flock, asked ──> OverlayFacts

Nothing is changed, not even a torn journal: the overlay may be in use.
"""

import os
from dataclasses import dataclass

from nbdsrv.errors import CorruptImage, DiskError, PointMissing
from nbdsrv.overlay.block_map import BLOCK_BITS
from nbdsrv.overlay.description import Description
from nbdsrv.overlay.map_file import DATA_NAME, MAP_NAME
from nbdsrv.overlay.opened import replay
from nbdsrv.overlay.place import DROPPED_NAME, in_use, owner_of, read_description
from nbdsrv.overlay.states import COPIED, DATA, ZERO

__all__ = ["OverlayFacts", "overlay_facts"]

TRIES = 3
"""Times the map is read: it may be renewed meanwhile."""


@dataclass(frozen=True, slots=True)
class OverlayFacts:
    """One overlay, as far as it has been flushed.

    Attributes:
        path: of its directory.
        description: what it says of itself.
        dirty_bytes: that are not the base's any more, zeroes included.
        zero_bytes: of these, that are zeroes and stored nowhere.
        copied_bytes: that were copied from the base.
        disk_bytes: that its files take.
        in_use: has somebody got it?
        pid: who, if that is known; 0 otherwise.
    """

    path: str
    description: Description
    dirty_bytes: int
    zero_bytes: int
    copied_bytes: int
    disk_bytes: int
    in_use: bool
    pid: int


def overlay_facts(path: str, *, mine: bool = False, damaged_too: bool = False) -> OverlayFacts:
    """What there is at ``path``. Blocking.

    Args:
        path: of the overlay's directory.
        mine: it is the caller who has it.
        damaged_too: count nothing where the map is damaged, instead of raising.

    Raises:
        CorruptImage, UnsupportedImage: it is damaged, or of a later version.
        DiskError: it is no overlay, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError.from_os(f"overlay {path}", error) from error
    try:
        description = read_description(path, fd)
        if description is None and os.path.lexists(os.path.join(path, DROPPED_NAME)):
            text = f"{path}: was dropped, but not to the end; `nbdsrv overlay drop` goes on"
            raise CorruptImage(text)
        if description is None:
            raise PointMissing(f"{path}: is no overlay; `nbdsrv overlay ls DIR` shows them")
        counts = _counts(path, fd, description, damaged_too=damaged_too)
        taken = sum(_taken(fd, name) for name in (DATA_NAME, MAP_NAME))
        used = not mine and in_use(path)
        return OverlayFacts(
            path=path,
            description=description,
            dirty_bytes=min((counts[DATA] + counts[ZERO]) << BLOCK_BITS, description.size),
            zero_bytes=min(counts[ZERO] << BLOCK_BITS, description.size),
            copied_bytes=min(counts[COPIED] << BLOCK_BITS, description.size),
            disk_bytes=taken,
            in_use=used,
            pid=owner_of(path) if used else 0,
        )
    except OSError as error:
        raise DiskError.from_os(f"overlay {path}", error) from error
    finally:
        os.close(fd)


def _counts(path: str, fd: int, description: Description, *, damaged_too: bool) -> list[int]:
    for attempt in range(1, TRIES + 1):
        try:
            return replay(path, fd, description).states.counts
        except CorruptImage:
            if attempt < TRIES:
                continue
            if damaged_too:
                return [0] * (COPIED + 1)
            raise
    raise AssertionError("unreachable")


def _taken(fd: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=fd).st_blocks * 512
    except FileNotFoundError:
        return 0
