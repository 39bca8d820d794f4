"""The locks by which QEMU's programs keep out of each other's images, and we of theirs.

::

    byte 100 + n   read-locked: I use permission n of the image
    byte 200 + n   read-locked: nobody else may use permission n

    n = 0 consistent read   1 write   2 write unchanged   3 resize

Locks belong to the open file (F_OFD_SETLK) and vanish with it. All are read locks, so everybody may
take them; whether there is a conflict is asked afterwards (F_OFD_GETLK).

The kernel knows nothing of these locks. It may use a block device itself: a file system that is
mounted, a volume group, a RAID, swap. An open with O_EXCL finds that out. Or it has a loop device
on a file, which /sys tells of.

Who writes into an image takes them. Who puts another file in its place only asks, and who only
reads it does not even ask.
"""

import contextlib
import errno as os_errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterable
from glob import glob
from weakref import WeakKeyDictionary

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile

__all__ = ["check_free", "check_replaceable", "lock_for_writing"]

USED = 100
UNSHARED = 200
READ, WRITE, RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")
_AGAINST = (UNSHARED + READ, UNSHARED + WRITE, UNSHARED + RESIZE, USED + WRITE, USED + RESIZE)
_ANOTHER = "another program has it open (a running virtual machine?)"
_NO_LOCKS = {os_errno.EINVAL, os_errno.ENOLCK, os_errno.ENOSYS, os_errno.EOPNOTSUPP}
"""What file systems answer that know no such locks; QEMU does without as well."""

_ours: WeakKeyDictionary[ImageFile, tuple[int, int]] = WeakKeyDictionary()
"""Files that are locked and that others of this process may write beside, and which they are. The
kernel does not tell its locks on one open file of ours from those of another program."""
_turn = threading.Lock()


def lock_for_writing(file: ImageFile, *, beside_ours: bool = False) -> None:
    """Take the locks of a program that writes the image, until ``file`` is closed. Blocking.

    Brings ``file.size`` up to date, for whoever had it open before may have made it longer.

    Args:
        file: open for writing.
        beside_ours: may this process write it by several files at once? All of them must say so.

    Raises:
        DiskError: EBUSY, somebody else writes it, or reads it and must not be disturbed.
    """
    try:
        info = os.fstat(file.fd)
        identity = (info.st_dev, info.st_ino)
        with _turn:
            who = _kernel_at(file.fd, file.path, info)
            taken = not _take(file.fd) and not (beside_ours and _is_ours(identity))
            if beside_ours and not taken and not who:
                _ours[file] = identity
        if not file.device:
            file.size = os.fstat(file.fd).st_size
    except OSError as error:
        raise DiskError.from_os(f"locking {file.path}", error) from error
    if taken or who:
        raise _in_use(file.path, who or _ANOTHER)


def check_replaceable(path: str) -> None:
    """May a new file take the place of the image ``path``? Takes no locks. Blocking.

    Whoever has the old one open goes on with it: what it writes is gone once it is closed, and what
    it has relied on is another the next time.

    Raises:
        DiskError: EBUSY, somebody writes it, or reads it and must not be disturbed.
    """
    who = _who_has(path)
    if who:
        hint = "and would go on with the old file; end it first, or write a file of another name"
        raise DiskError(f"{path}: {who} {hint}", os_errno.EBUSY)


def check_free(path: str) -> None:
    """May another program be told to write the file or device ``path``? Takes no locks. Blocking.

    Raises:
        DiskError: EBUSY, as above.
    """
    who = _who_has(path)
    if who:
        raise _in_use(path, who)


def _in_use(path: str, who: str) -> DiskError:
    return DiskError(f"{path}: {who}; only one may write it", os_errno.EBUSY)


def _who_has(path: str) -> str:
    """Who has a file or device open and does not want it written, in words, or ""."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # there is none, or not for us to read: it cannot be found out
        return ""
    try:
        with _turn:
            return _kernel_at(fd, path, os.fstat(fd)) or (_ANOTHER if _is_taken(fd) else "")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise DiskError.from_os(f"asking for locks on {path}", error) from error
        return ""
    finally:
        os.close(fd)


def _is_ours(identity: tuple[int, int]) -> bool:
    """Is it locked by a file of ours?

    Where it was when our locks were taken nobody else has come in, neither before that nor since.
    """
    return any(file.fd >= 0 and each == identity for file, each in _ours.items())


def _kernel_at(fd: int, path: str, info: os.stat_result) -> str:
    """How the kernel itself uses this file, this device or one of its partitions, or "".

    One call at a time: two would take each other for the kernel.
    """
    if not stat.S_ISBLK(info.st_mode):
        return _loop_on(path, info)
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == os_errno.EBUSY:
            return "this system uses it (mounted, or part of a volume group or RAID)"
    return ""


def _loop_on(path: str, info: os.stat_result) -> str:
    """The loop device that lies on this file and may write to it, in words, or ""."""
    wanted = os.fsencode(os.path.basename(os.path.realpath(path)))
    for place in glob("/sys/block/loop*/loop/backing_file"):
        device = os.path.dirname(os.path.dirname(place))
        with contextlib.suppress(OSError), open(place, "rb") as name, open(f"{device}/ro") as ro:
            found = name.read().removesuffix(b"\n")
            if os.path.basename(found) != wanted:  # its file system may hang: leave it alone
                continue
            if os.path.samestat(os.stat(found), info) and ro.read().strip() == "0":
                return f"/dev/{os.path.basename(device)} lies on it"
    return ""


def _take(fd: int) -> bool:
    """Take all locks; False if somebody else has one that speaks against it."""
    try:
        _lock(fd, [USED + READ, USED + WRITE, USED + RESIZE])
        _lock(fd, [UNSHARED + WRITE, UNSHARED + RESIZE])
        return not _is_taken(fd)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno not in {os_errno.EAGAIN, os_errno.EACCES}:
            raise
        return False


def _lock(fd: int, positions: Iterable[int]) -> None:
    for position in positions:
        wanted = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, position, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)


def _is_taken(fd: int) -> bool:
    """Has somebody else a lock that speaks against our writing?"""
    for position in _AGAINST:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, position, 1, 0)
        found = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))
        if found[0] != fcntl.F_UNLCK:
            return True
    return False
