"""The file a writer makes: under a temporary name until it is complete, or a pipe.

::

    open ──> .disk.qcow2.XXXXXXXX.part  ── store, append ... ──> publish ──> disk.qcow2
                                                            └──> discard     (nothing)
    open ──> a pipe ── append ... ──> publish: nothing more to do

Rules:

* Until ``publish`` nothing exists under the name; what was there before stays there and whole.
* A file that a running virtual machine has open is not replaced: it would go on writing to a file
  that has no name any more.
* ``publish`` is durable: the file is synced before it is renamed, its directory after.
* Everything here blocks and is for threads, one at a time; ``store`` for any number of them.
"""

import errno as os_errno
import os
import secrets
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress

from nbdsrv.errors import DiskError
from nbdsrv.formats.image_lock import check_replaceable
from nbdsrv.formats.writeback import Writeback

__all__ = ["STANDARD_OUTPUT", "TargetFile"]

STANDARD_OUTPUT = "-"
"""The path that means standard output."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_DIRECTORY_SYNC = frozenset({os_errno.EINVAL, os_errno.ENOTSUP})
"""What FUSE and CIFS may answer, which know no such thing."""
_IOV_MAX = os.sysconf("SC_IOV_MAX")


class TargetFile:
    """A file being made.

    Attributes:
        path: its name to be, or ``-`` for standard output.
        fd: open between ``open`` and ``publish`` or ``discard``.
        position: how far ``append`` has come.
        seekable: False for a pipe, where only ``append`` is possible.
    """

    def __init__(self, path: str, *, replace: bool = False) -> None:
        """``replace``: may there be such a file already?"""
        self.path = path
        self.fd = -1
        self.position = 0
        self.seekable = path != STANDARD_OUTPUT
        self._replace = replace
        self._temporary = ""
        self._turn = threading.Lock()
        self._writeback = Writeback()

    def open(self) -> None:
        """Make the temporary file, beside where it will be.

        Raises:
            DiskError: the directory does not exist or may not be written, or there is such a file.
        """
        if not self.seekable:
            self.fd = os.dup(1)
            os.set_blocking(self.fd, True)  # a pipe may have been left otherwise by its other end
            return
        if os.path.islink(self.path):  # the file is replaced, not the link to it
            self.path = os.path.realpath(self.path)
        directory, name = os.path.split(self.path)
        self.check()
        try:
            # A name may be 255 bytes long, and ours must not be longer for being temporary.
            short = os.fsdecode(os.fsencode(name)[:200])
            temporary = os.path.join(directory, f".{short}.{secrets.token_hex(4)}.part")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            # It may be as secret as what it replaces; who may read it is settled at the end.
            self.fd = os.open(temporary, flags, 0o600 if os.path.exists(self.path) else 0o666)
        except (OSError, ValueError) as error:
            raise _unusable(self.path, error) from error
        self._temporary = temporary

    def check(self) -> None:
        """May there be such a file? ``open`` asks too; this is for asking before long work.

        Raises:
            DiskError: no.
        """
        if not self.seekable:
            return
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            if _among_devices(self.path):
                raise DiskError(f"{self.path}: no such device", os_errno.ENOENT) from None
            return
        except (OSError, ValueError) as error:
            raise _unusable(self.path, error) from error
        if not stat.S_ISREG(mode):
            raise DiskError(f"{self.path}: exists and is not a regular file")
        if not self._replace:
            raise DiskError(f"{self.path}: exists already; --force replaces it")
        check_replaceable(self.path)

    def store(self, position: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at ``position``. Any number of threads at a time."""
        view = memoryview(data)
        done = 0
        try:
            # One at a time: the kernel would let others spin for the file's lock, and two threads
            # are slower than one then. They read meanwhile.
            with self._turn:
                while done < len(view):
                    done += os.pwrite(self.fd, view[done:], position + done)
            self._writeback.stored(self.fd, done)
        except OSError as error:
            raise DiskError.from_os(f"writing {self.path}", error) from error

    def append(self, *parts: memoryview | bytes) -> None:
        """Write ``parts`` behind what has been appended before."""
        left: list[memoryview | bytes] = [part for part in parts if len(part)]
        try:
            while left:
                count = self._write_some(left[:_IOV_MAX])
                self.position += count
                self._writeback.stored(self.fd, count)
                left = _behind(left, count)
        except OSError as error:
            raise DiskError.from_os(f"writing {self._name}", error) from error

    def _write_some(self, parts: Sequence[memoryview | bytes]) -> int:
        if self.seekable:
            return os.pwritev(self.fd, parts, self.position)
        return os.writev(self.fd, parts)

    def resize(self, size: int) -> None:
        """Make the file ``size`` bytes long; what is added is a hole."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise DiskError.from_os(f"{self.path}: {size} bytes", error) from error

    def publish(self) -> None:
        """Make it durable, and visible under its name.

        Raises:
            DiskError: the disk is full or broken, or somebody has made such a file meanwhile.
        """
        try:
            if self.seekable:
                self._keep_mode()
                os.fsync(self.fd)
                self._rename()
                self._temporary = ""
                self._sync_name()
            elif stat.S_ISREG(os.fstat(self.fd).st_mode):
                os.fsync(self.fd)
            os.close(self.fd)
        except OSError as error:
            raise DiskError.from_os(self._name, error) from error
        self.fd = -1

    def _keep_mode(self) -> None:
        """A file that is replaced passes on whose it was and who may read it."""
        with suppress(OSError):
            old = os.stat(self.path)
            os.fchmod(self.fd, stat.S_IMODE(old.st_mode))
            os.fchown(self.fd, old.st_uid, old.st_gid)

    def _rename(self) -> None:
        if not self._replace:
            try:
                os.link(self._temporary, self.path)  # unlike rename, never replaces
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                self.check()
            else:
                os.unlink(self._temporary)
                return
        else:
            self.check()  # a virtual machine may have been started meanwhile
        os.rename(self._temporary, self.path)

    def _sync_name(self) -> None:
        """The name as well; whatever comes of it, the image is there."""
        try:
            directory = os.open(os.path.dirname(self.path) or ".", _DIRECTORY)
        except PermissionError:  # one may make files there, but not list them
            os.fsync(self.fd)  # Linux's file systems have the new name in the same journal
            return
        try:
            os.fsync(directory)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(directory)

    def discard(self) -> None:
        """Leave nothing behind. Idempotent; after ``publish`` it does nothing."""
        if self._temporary:
            with suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = ""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with suppress(OSError):
                os.close(fd)

    @property
    def _name(self) -> str:
        return self.path if self.seekable else "standard output"


def _among_devices(path: str) -> bool:
    """Would a file of this name lie in /dev, which is memory? It is a device with a typing error.

    What is mounted below (/dev/shm) is not meant.
    """
    try:
        devices, directory = os.stat("/dev").st_dev, os.stat(os.path.dirname(path) or ".").st_dev
        return directory == devices != os.stat("/").st_dev
    except (OSError, ValueError):
        return False


def _unusable(path: str, error: OSError | ValueError) -> DiskError:
    if isinstance(error, OSError):
        return DiskError.from_os(path, error)
    return DiskError(f"{path!r} is not a file name", os_errno.EINVAL)  # a NUL byte


def _behind(parts: list[memoryview | bytes], count: int) -> list[memoryview | bytes]:
    """What is left of ``parts`` when ``count`` bytes of them have been written."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [memoryview(part)[count:], *parts[index + 1 :]]
        count -= len(part)
    return []
