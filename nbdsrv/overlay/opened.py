"""An overlay's files, open: what the Disk stands on. Made late, closed once.

::

    open    the directory, locked ── overlay.json? ──no──> nothing yet; ``make`` before a change
                                          │yes
                                     the base is the right one ── map replayed ── data file open

Rule: everything here blocks.
"""

import os
import secrets
import time
from typing import Any

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.overlay.block_map import BlockMap
from nbdsrv.overlay.description import FORMAT, Description, check_base
from nbdsrv.overlay.durability import Durability
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.journal import Record
from nbdsrv.overlay.map_file import DATA_NAME, MAP_NAME, MapFile, Replayed, read_map
from nbdsrv.overlay.pinning import pin
from nbdsrv.overlay.place import Place, data_length
from nbdsrv.overlay.recent import Recent

__all__ = ["Opened", "open_files"]


class Opened:
    """The files of one overlay, and what it says of itself.

    Attributes:
        path: of its directory.
        point: id of the restore point it is over, or "".
        states: of all blocks, as they were last.
        made: is it on the disk?
        data_fd: descriptor of the data file, -1 until it is made.
        files: through which they are changed.
        recent: states that the map does not have yet; of what is made.
    """

    def __init__(self, place: Place, description: Description, files: Files) -> None:
        """Becomes the owner of ``place``."""
        self.path = place.path
        self.files = files
        self.description = description
        point = description.base.get("point")
        self.point = point if isinstance(point, str) else ""
        self.states = BlockMap()
        self.made = False
        self.data_fd = -1
        self.recent: Recent | None = None
        self._place = place
        self._map: MapFile | None = None
        self._doubts: list[Record] = []
        self._watched: set[int] = set()

    def load(self) -> None:
        """Open what has been made before.

        Raises:
            CorruptImage, UnsupportedImage: it cannot be used.
            OSError: it cannot be opened.
        """
        self._place.settle(self.files)
        replayed = replay(self._place.path, self._place.fd, self.description)
        try:
            self.data_fd = self.files.open(self._place.fd, DATA_NAME, writable=True)
        except FileNotFoundError as error:
            raise _missing(os.path.join(self.path, DATA_NAME)) from error
        length = data_length(self.description.size)
        if os.fstat(self.data_fd).st_size < length:
            where = os.path.join(self.path, DATA_NAME)
            text = f"corrupt overlay: {where}: is shorter than the disk's {length} bytes"
            raise CorruptImage(f"{text}; was it truncated?")
        self._go_on(replayed)

    def make(self) -> None:
        """Make it. Raises OSError."""
        pin(self.description, self.path)  # before it is there: none is ever without
        self._place.make(self.files, self.description)
        self.load()

    def _go_on(self, replayed: Replayed) -> None:
        self._map = MapFile(
            self.files,
            self._place.fd,
            os.path.join(self.path, MAP_NAME),
            self.description.id_bytes,
            self.description.size,
            replayed,
        )
        self._map.open()
        self.states = replayed.states
        self._doubts, self._watched = replayed.doubts, replayed.watched
        description = self.description
        self.recent = Recent(self._place.fd, description.id_bytes, description.size)
        # Of a server that was killed, on this very boot: as good as in the map, and in it soon.
        for first, end, state in self.recent.told():
            for start, stop, old in list(self.states.stretches(first, end)):
                if old != state:
                    self.states.set(start, stop, state)
                    self._doubts.append((start, stop, state))
        self.made = True

    def durability(self, workers: Workers) -> Durability:
        """What keeps the files in order from now on; of what is made."""
        assert self._map is not None
        return Durability(
            workers,
            self.files,
            self.path,
            self.data_fd,
            self._map,
            self.states,
            self._doubts,
            self._watched,
        )

    def close(self) -> None:
        """Close all, and let go. Idempotent."""
        if self._map is not None:
            self._map.close()
        if self.recent is not None:
            self.recent.close()
        if self.data_fd >= 0:
            os.close(self.data_fd)
            self.data_fd = -1
        self._place.let_go(untouched=not self.made)


def replay(path: str, directory: int, description: Description) -> Replayed:
    """The map of an overlay in an open directory; changes nothing.

    Raises:
        CorruptImage, UnsupportedImage: it cannot be used.
        OSError: it cannot be read.
    """
    where = os.path.join(path, MAP_NAME)
    try:
        fd = Files().open(directory, MAP_NAME, writable=False)
    except FileNotFoundError as error:
        raise _missing(where) from error
    try:
        return read_map(fd, where, description.id_bytes, description.size)
    finally:
        os.close(fd)


def _missing(where: str) -> CorruptImage:
    text = f"corrupt overlay: {where} is missing; bring it back"
    return CorruptImage(f"{text}, or give it up by `nbdsrv overlay drop`")


def open_files(
    place: Place,
    base: Disk,
    identity: dict[str, Any],
    export: str,
    source: str,
    files: Files | None = None,
) -> Opened:
    """The overlay at ``place`` over ``base``, or what is needed to make one.

    Args:
        place: in our hands; the result owns it, and nobody does if this raises.
        base: open.
        identity: its ``description.identity_of``.
        export: name it is served under.
        source: the base as the operator named it.
        files: how files are changed; as usual without it.

    Raises:
        DiskError: it is over another base, damaged, or cannot be opened.
    """
    opened = None
    try:
        description = place.description()
        if description is None:
            place.check_leftovers()
            files = files or Files()
            try:
                place.check_length(files, base.size)
            except BaseException:
                place.let_go(untouched=True)
                raise
            description = Description(
                format=FORMAT,
                id=secrets.token_hex(16),
                export=export,
                source=source,
                size=base.size,
                created=time.time(),
                base=identity,
            )
            return Opened(place, description, files)
        check_base(description, base, identity, place.path)
        opened = Opened(place, description, files or Files())
        opened.load()
        pin(description, place.path)
    except OSError as error:
        _let_go(place, opened)
        raise DiskError.from_os(f"overlay {place.path}", error) from error
    except BaseException:
        _let_go(place, opened)
        raise
    return opened


def _let_go(place: Place, opened: Opened | None) -> None:
    """Leave everything as it is: what could not be opened is not removed."""
    if opened is not None:
        opened.made = True
        opened.close()
    else:
        place.let_go()
