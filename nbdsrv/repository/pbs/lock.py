"""The etiquette of a live datastore: who reads a snapshot holds a shared lock on its directory.

::

    reader   flock(<snapshot>/, LOCK_SH | LOCK_NB) ... reads ... close
    prune    flock(<snapshot>/, LOCK_EX)            waits or gives up: the snapshot stays, and its
                                                    chunks with it

Nothing is written for it. Where a file system knows no locks, or the datastore is no directory of
this host, there is none. (Proxmox Backup Server 4 locks files under /run instead, which are not
ours to make: there, what is pruned while it is read fails once its chunks are collected.)
"""

import errno as os_errno
import fcntl
import os

from nbdsrv.errors import PointMissing, RepositoryError
from nbdsrv.store.directory_tree import DirectoryTree
from nbdsrv.store.tree import Tree

__all__ = ["hold", "release"]


def hold(tree: Tree, path: str) -> int | None:
    """Take the shared lock of a snapshot; None where there is none to be had. Blocking, briefly.

    Raises:
        RepositoryError: somebody holds it exclusively: it is being written or removed.
        PointMissing: it is gone.
    """
    if not isinstance(tree, DirectoryTree):
        return None
    where = tree.full(path)
    try:
        fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise PointMissing(f"{where}: has been removed", os_errno.ENOENT) from error
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        text = f"{where}: is being written or removed right now; try again later"
        raise RepositoryError(text, os_errno.EBUSY) from error
    except OSError:  # ENOLCK, EBADF, EOPNOTSUPP: a file system without
        os.close(fd)
        return None
    return fd


def release(lock: int | None) -> None:
    """Give it back."""
    if lock is not None:
        os.close(lock)
