"""Where an overlay lies, and who has it.

::

    DIR/                          --overlay DIR
      vm1%2Fsda%40latest/         one overlay; the export's name, percent-encoded      flock
        overlay.json              what it is over; made last: without it there is no overlay
        data  map                 see ``overlay`` and ``map_file``
        frozen.sock               while it is served (``door``)

Whoever uses an overlay holds flock(2) on its directory; the kernel lets go when the process dies.
"""

import contextlib
import errno as os_errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from urllib.parse import quote

from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.overlay.block_map import BLOCK
from nbdsrv.overlay.description import Description, decode, encode
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.map_file import DATA_NAME, MAP_NAME, write_first_map
from nbdsrv.overlay.recent import RECENT_NAME

__all__ = [
    "DESCRIPTION_NAME",
    "DROPPED_NAME",
    "SOCKET_NAME",
    "Place",
    "data_length",
    "directory_name",
    "find_overlay",
    "in_use",
    "overlays_in",
    "owner_of",
    "read_description",
]

DESCRIPTION_NAME = "overlay.json"
DROPPED_NAME = f"{DESCRIPTION_NAME}.dropped"
OWNER_NAME = "owner"
SOCKET_NAME = "frozen.sock"
MAX_DESCRIPTION = 1 << 20
"""Bytes of overlay.json."""
MAX_NAME = 200
"""Bytes of a directory's name; a file system takes 255, an export's name may have 4096."""
LOCK_TRIES = 10
LOCK_PAUSE_S = 0.02
"""Who only looks whether an overlay is in use has it for a moment."""
PROBE_NAME = "probe"
LEFTOVERS = (
    *(DESCRIPTION_NAME, f"{DESCRIPTION_NAME}.new", MAP_NAME, "map.new", RECENT_NAME),
    *(DATA_NAME, PROBE_NAME, DROPPED_NAME),
)
"""What may lie in a directory that is no overlay, or not any more."""


def directory_name(export: str) -> str:
    """The directory of an export's overlay within DIR.

    Other exports have others; where the name does not fit, its hash makes the difference.
    """
    name = quote(export, safe="", errors="surrogateescape") or "%"
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{name[: MAX_NAME - 40]}%~{digest}"


def data_length(size: int) -> int:
    """Bytes of the data file of a disk: whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Place:
    """The directory of one overlay, in our hands. Its methods block.

    Attributes:
        path: of the directory.
        fd: its descriptor, which holds the lock.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def take(cls, path: str, *, create: bool) -> "Place":
        """Open the directory and lock it; make it first, if ``create``.

        Raises:
            DiskError: it is in use (EBUSY), or it cannot be opened.
        """
        try:
            while True:
                if create:
                    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path, 0o700)
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    _lock(fd)
                    if _same(path, fd):
                        place = cls(path, fd)
                        place._sign()
                        return place
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)  # removed by the one who had it before: once more
        except BlockingIOError:
            owner = owner_of(path)
            who = f" by process {owner}" if owner else ""
            hint = "stop that server, or serve another --overlay"
            if owner == os.getpid():
                who += ", this server"
                hint = "wait until its clients have left, or end them: `nbdsrv status --drop ID`"
            text = f"overlay {path} is in use{who}; {hint}"
            raise DiskError(text, os_errno.EBUSY) from None
        except OSError as error:
            raise DiskError.from_os(f"overlay {path}", error) from error

    def _sign(self) -> None:
        """Say who has it, for people."""
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(OWNER_NAME, flags, 0o600, dir_fd=self.fd)
            os.write(fd, f"{os.getpid()}\n".encode())
            os.close(fd)

    def description(self) -> Description | None:
        """What the overlay says of itself; None if there is none here.

        Raises:
            CorruptImage, UnsupportedImage: nothing that can be used.
            DiskError: it cannot be read.
        """
        return read_description(self.path, self.fd)

    def make(self, files: Files, description: Description) -> None:
        """Make the overlay: complete, or not there at all. Durable after ``settle``.

        Raises:
            OSError: it cannot be made.
        """
        self.clear(files)
        size = description.size
        data = files.create(self.fd, DATA_NAME)
        try:
            files.truncate(data, data_length(size))
            files.sync(data)
        finally:
            os.close(data)
        write_first_map(files, self.fd, description.id_bytes, size)
        new = files.create(self.fd, f"{DESCRIPTION_NAME}.new")
        try:
            files.write(new, [encode(description)], 0)
            files.sync(new)
        finally:
            os.close(new)
        files.sync(self.fd)
        files.rename(self.fd, f"{DESCRIPTION_NAME}.new", DESCRIPTION_NAME)

    def settle(self, files: Files) -> None:
        """Make the names that lead to the overlay durable: who made it may have been killed.

        Raises:
            OSError: that cannot be promised.
        """
        files.sync(self.fd)
        above = os.path.dirname(self.path)
        for path in (above, f"{above}/.."):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except PermissionError:
                continue  # whose it is has made what lies in it
            try:
                files.sync(fd)
            finally:
                os.close(fd)

    def check_length(self, files: Files, size: int) -> None:
        """Can there be a data file for a disk of ``size`` bytes? Later the guest would be told.

        Raises:
            DiskError: none that long (EFBIG).
            OSError: no file at all.
        """
        length = data_length(size)
        probe = files.create(self.fd, PROBE_NAME)
        try:
            files.truncate(probe, length)
        except OSError as error:
            if error.errno != os_errno.EFBIG:
                raise
            what = f"overlay {self.path}: no file may have {length} bytes there, as the disk has"
            hint = "serve --overlay on another file system: XFS and Btrfs take files of 8 EiB"
            raise DiskError(f"{what}; {hint}", os_errno.EFBIG) from error
        finally:
            os.close(probe)
            files.unlink(self.fd, PROBE_NAME)

    def check_leftovers(self) -> None:
        """Is what lies in a directory without overlay.json of an overlay that never was?

        Raises:
            CorruptImage: it holds data: somebody has lost the description of it.
            OSError: it cannot be looked at.
        """
        try:
            held = os.stat(DATA_NAME, dir_fd=self.fd).st_blocks
            if held and not os.path.lexists(os.path.join(self.path, DROPPED_NAME)):
                where = os.path.join(self.path, DESCRIPTION_NAME)
                text = f"corrupt overlay: {where} is missing, and there is data beside it"
                raise CorruptImage(f"{text}; bring it back, or remove the directory")
        except FileNotFoundError:
            pass

    def clear(self, files: Files) -> None:
        """Remove what is in the way of a new overlay. Raises OSError."""
        for name in LEFTOVERS:
            with contextlib.suppress(FileNotFoundError):
                files.unlink(self.fd, name)

    def take_back(self) -> None:
        """Have a description again where ``remove`` was cut short. Raises OSError."""
        if not os.path.lexists(os.path.join(self.path, DESCRIPTION_NAME)):
            Files().rename(self.fd, DROPPED_NAME, DESCRIPTION_NAME)

    def remove(self) -> None:
        """Remove the overlay, in our hands as it is. Raises OSError.

        Its description goes first, so that half an overlay is none.
        """
        files = Files()
        with contextlib.suppress(FileNotFoundError):
            files.rename(self.fd, DESCRIPTION_NAME, DROPPED_NAME)
            files.sync(self.fd)
        self.clear(files)
        for name in (SOCKET_NAME, OWNER_NAME):
            with contextlib.suppress(FileNotFoundError):
                files.unlink(self.fd, name)
        os.rmdir(self.path)

    def let_go(self, *, untouched: bool = False) -> None:
        """Unlock. A directory that never became an overlay is removed. Idempotent."""
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):
            if untouched:
                self.remove()
            else:
                os.unlink(OWNER_NAME, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = -1


def _lock(fd: int) -> None:
    """Raises BlockingIOError if somebody else goes on having it."""
    for patience in range(LOCK_TRIES, 0, -1):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if patience == 1:
                raise
            time.sleep(LOCK_PAUSE_S)
        else:
            return


def _same(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def read_description(path: str, fd: int) -> Description | None:
    """overlay.json of an open directory; None if it is not there.

    Raises:
        CorruptImage, UnsupportedImage: nothing that can be used.
        DiskError: it cannot be read.
    """
    where = os.path.join(path, DESCRIPTION_NAME)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(DESCRIPTION_NAME, flags, dir_fd=fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError.from_os(where, error) from error
    try:
        return decode(os.read(file, MAX_DESCRIPTION), where)
    except OSError as error:
        raise DiskError.from_os(where, error) from error
    finally:
        os.close(file)


def in_use(path: str) -> bool:
    """Has somebody got this overlay? Blocking, but not for long."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: two who only ask must not find each other.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def owner_of(path: str) -> int:
    """The process that has the overlay, as it says; 0 if that is not known."""
    try:
        with open(os.path.join(path, OWNER_NAME), encoding="ascii") as file:
            text = file.read(20).strip()
    except (OSError, UnicodeDecodeError):
        return 0
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def overlays_in(directory: str) -> Iterator[str]:
    """Paths of the overlays in DIR, by name.

    Raises:
        DiskError: there is no such directory.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise DiskError.from_os(directory, error) from error
    for name in names:
        path = os.path.join(directory, name)
        if _is_overlay(path):
            yield path


def _is_overlay(path: str) -> bool:
    """Is there one at ``path``, or what is left of one that was dropped?"""
    names = (DESCRIPTION_NAME, DROPPED_NAME)
    return any(os.path.lexists(os.path.join(path, name)) for name in names)


def find_overlay(text: str) -> str:
    """The directory of the overlay ``DIR/NAME``; NAME may be the export's, as it is.

    Raises:
        DiskError: there is none.
    """
    path = text.rstrip("/") or text
    if _is_overlay(path):
        return path
    at = path.find("/", 1)
    while at > 0:
        candidate = os.path.join(path[:at], directory_name(path[at + 1 :]))
        if _is_overlay(candidate):
            return candidate
        at = path.find("/", at + 1)
    raise DiskError(f"{text}: no such overlay; `nbdsrv overlay ls DIR` shows them", os_errno.ENOENT)
