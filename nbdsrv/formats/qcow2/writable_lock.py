"""The locks by which QEMU's programs keep out of each other's images, and we of theirs.

::

    byte 100 + n   read-locked: I use permission n of the image
    byte 200 + n   read-locked: nobody else may use permission n

    n = 0 consistent read   1 write   2 write unchanged   3 resize

Locks belong to the open file (F_OFD_SETLK) and vanish with it. All are read locks, so everybody may
take them; whether there is a conflict is asked afterwards (F_OFD_GETLK).
"""

import errno as os_errno
import fcntl
import os
import struct
from collections.abc import Iterable

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile

__all__ = ["lock_for_writing"]

USED = 100
UNSHARED = 200
READ, WRITE, RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")
_NO_LOCKS = {os_errno.EINVAL, os_errno.ENOLCK, os_errno.ENOSYS, os_errno.EOPNOTSUPP}
"""What file systems answer that know no such locks; QEMU does without as well."""


def lock_for_writing(file: ImageFile) -> None:
    """Take the locks of a program that writes the image, until ``file`` is closed. Blocking.

    Raises:
        DiskError: EBUSY, somebody else writes it, or reads it and must not be disturbed.
    """
    try:
        _lock(file.fd, [USED + READ, USED + WRITE, USED + RESIZE])
        _lock(file.fd, [UNSHARED + WRITE, UNSHARED + RESIZE])
        taken = _taken(file.fd, [UNSHARED + READ, UNSHARED + WRITE, UNSHARED + RESIZE])
        taken = taken or _taken(file.fd, [USED + WRITE, USED + RESIZE])
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        if error.errno not in {os_errno.EAGAIN, os_errno.EACCES}:
            raise DiskError.from_os(f"locking {file.path}", error) from error
        taken = True
    if taken:
        text = f"{file.path}: another program has it open (a running virtual machine?)"
        raise DiskError(text, os_errno.EBUSY)


def _lock(fd: int, positions: Iterable[int]) -> None:
    for position in positions:
        wanted = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, position, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)


def _taken(fd: int, positions: Iterable[int]) -> bool:
    """Has somebody else locked one of them?"""
    for position in positions:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, position, 1, 0)
        found = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))
        if found[0] != fcntl.F_UNLCK:
            return True
    return False
