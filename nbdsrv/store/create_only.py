"""Giving a finished file its name, if nothing has that name: one call that decides.

::

    link(temporary, name)                           every file system with hard links, NFS too
    renameat2(temporary, name, RENAME_NOREPLACE)    exFAT, some FUSE, where there are none

A plain rename replaces and an O_EXCL open shows an unfinished file, so there is no third way.
"""

import ctypes
import errno as os_errno
import os

__all__ = ["link_or_rename"]

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_LINKS = frozenset(
    {os_errno.EPERM, os_errno.ENOTSUP, os_errno.EMLINK, os_errno.ENOSYS, os_errno.EINVAL}
)


def link_or_rename(temporary: str, path: str) -> bool:
    """Give ``temporary`` the name ``path`` as well, or instead.

    Returns:
        False if there is something of that name; it is not touched.

    Raises:
        OSError: EOPNOTSUPP if the file system can do neither.
    """
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and is told of its own success.
        return os.stat(temporary, follow_symlinks=False).st_nlink > 1
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    return _rename_no_replace(temporary, path)


def _rename_no_replace(temporary: str, path: str) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    number = os_errno.ENOSYS
    if call is not None:
        source, target = os.fsencode(temporary), os.fsencode(path)
        if call(_AT_FDCWD, source, _AT_FDCWD, target, ctypes.c_uint(_RENAME_NOREPLACE)) == 0:
            return True
        number = ctypes.get_errno()
    if number == os_errno.EEXIST:
        return False
    if number in {os_errno.ENOSYS, os_errno.EINVAL}:
        number = os_errno.ENOTSUP
    raise OSError(number, os.strerror(number), path)
