"""One at a time: who freezes a VM first removes what a crashed backup left, and must not take the
work of a living one for that.

::

    nbdsrv backup  ── flock ──> /run/user/0/nbdsrv/5d41....lock       held until it has thawed
    nbdsrv serve   ── flock ──✗ "is being backed up by process 4711"

The kernel lets go of the lock of a process that was killed. It is known on this host only: of two
hosts that back up the same VM the hypervisor refuses one, if it can.
"""

import errno as os_errno
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from nbdsrv.source.hypervisor import SourceError

__all__ = ["lock_directory", "turn"]


@contextmanager
def turn(place: str) -> Iterator[None]:
    """Be the only one on this host who freezes a VM, until the end of the block.

    Args:
        place: of the hypervisor, and which VM of it.

    Raises:
        SourceError: somebody else is at it; names the process. Or no lock can be had.
    """
    name = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:32]
    directory = lock_directory()
    path = os.path.join(directory, f"{name}.lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SourceError(f"{path}: {os.strerror(error.errno or 0)}") from error
    try:
        _lock(fd, place)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, place: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
        who = f"process {holder}" if holder.isdigit() else "another process"
        text = f"{place}: {who} of nbdsrv has frozen this VM; wait until it has ended"
        raise SourceError(text, os_errno.EBUSY) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)


def lock_directory() -> str:
    """A directory of ours; made if it is not there.

    Raises:
        SourceError: it cannot be made, or belongs to somebody else.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        path = os.path.join(runtime, "nbdsrv")
    else:
        path = os.path.join(tempfile.gettempdir(), f"nbdsrv-{os.geteuid()}")
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise SourceError(f"{path}: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SourceError(f"{path}: is not a directory of this user; set XDG_RUNTIME_DIR")
    return path
