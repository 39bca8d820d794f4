"""A ``Tree`` that is a directory of this host.

::

    root fd ── openat2(path, RESOLVE_BENEATH) ──> fd     the kernel sees to it that neither ``..``
                                                         nor a link leads out of the root
    kernels before 5.6:  real path of what was opened, compared with the root's
"""

import ctypes
import errno as os_errno
import os
import platform
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from nbdsrv.errors import CorruptImage
from nbdsrv.store.store import ObjectMissing, StoreError, naming
from nbdsrv.store.tree import MAX_FILE, Node, Tree, check_path

__all__ = ["DirectoryTree"]

_OPENAT2 = 437
"""The system call's number, the same on all architectures (include/uapi/asm-generic/unistd.h)."""
_RESOLVE_BENEATH = 0x08
_RESOLVE_NO_MAGICLINKS = 0x02
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_ABSENT = frozenset({os_errno.ENOENT, os_errno.ENOTDIR})
_READ = 1 << 20


class _How(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class DirectoryTree(Tree):
    """What lies below ``root``, which may itself be a link."""

    def __init__(self, root: str) -> None:
        """Open the directory.

        Raises:
            StoreError: it is none, or cannot be read.
        """
        self.name = root
        self._lock = threading.Lock()
        try:
            self._root: int | None = os.open(root, _FLAGS | os.O_DIRECTORY)
        except OSError as error:
            number = error.errno or os_errno.EIO
            if number in _ABSENT:
                raise StoreError(f"{root}: no such directory", number) from error
            raise StoreError(f"{root}: {os.strerror(number)}", number) from error
        self._real = os.path.realpath(root)

    def entries(self, path: str = "") -> Sequence[Node]:
        found: list[Node] = []
        try:
            fd = self._open(path, os.O_DIRECTORY)
        except ObjectMissing:
            return found
        try:
            with naming(self.full(path)), os.scandir(fd) as entries:
                names = sorted(entry.name for entry in entries)
            for name in names:
                if not name.isascii() and _undecodable(name):
                    continue
                if (node := self._node(fd, path, name)) is not None:
                    found.append(node)
        finally:
            os.close(fd)
        return found

    def _node(self, directory: int, path: str, name: str) -> Node | None:
        try:
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno in _ABSENT:
                return None  # gone meanwhile
            number = error.errno or os_errno.EIO
            where = self.full(f"{path}/{name}" if path else name)
            raise StoreError(f"{where}: {os.strerror(number)}", number) from error
        if stat.S_ISLNK(info.st_mode):
            try:
                return self.find(f"{path}/{name}" if path else name)
            except (CorruptImage, StoreError):
                return None
        return _node_of(name, info)

    def find(self, path: str) -> Node | None:
        check_path(self.name, path)
        try:
            fd = self._open(path, os.O_PATH)
        except ObjectMissing:
            return None
        try:
            return _node_of(path.rpartition("/")[2], os.fstat(fd))
        finally:
            os.close(fd)

    def read(self, path: str, limit: int = MAX_FILE) -> bytes:
        with self._opened(path) as (fd, size):
            if size > limit:
                text = f"{self.full(path)}: {size} bytes, more than {limit}"
                raise StoreError(text, os_errno.EFBIG)
            return self._read(fd, path, 0, size)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        with self._opened(path) as (fd, size):
            if offset < 0 or length < 1 or offset + length > size:
                text = f"{self.full(path)}: {length} bytes at {offset}, but it has {size}"
                raise StoreError(text)
            return self._read(fd, path, offset, length)

    def open_file(self, path: str) -> int | None:
        with self._opened(path) as (fd, _):
            return os.dup(fd)

    def close(self) -> None:
        with self._lock:
            root, self._root = self._root, None
        if root is not None:
            os.close(root)

    def _read(self, fd: int, path: str, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        with naming(self.full(path)):
            while length:
                part = os.pread(fd, min(length, _READ), offset)
                if not part:
                    raise StoreError(f"{self.full(path)}: ends at {offset}, was it truncated?")
                parts.append(part)
                offset += len(part)
                length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextmanager
    def _opened(self, path: str) -> Iterator[tuple[int, int]]:
        """Descriptor and size of a regular file."""
        if not path:
            raise StoreError(f"{self.name}: is a directory", os_errno.EISDIR)
        fd = self._open(path, 0)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                what = "a directory" if stat.S_ISDIR(info.st_mode) else "no regular file"
                raise StoreError(f"{self.full(path)}: is {what}", os_errno.EISDIR)
            yield fd, info.st_size
        finally:
            os.close(fd)

    def _open(self, path: str, flags: int) -> int:
        """A descriptor of what lies at ``path``; a link is followed if it stays below the root."""
        check_path(self.name, path)
        with self._lock:  # not while it is being closed
            if self._root is None:
                raise StoreError(f"{self.name}: is closed", os_errno.EBADF)
            root = os.dup(self._root)
        try:
            try:
                if flags != os.O_PATH:  # which openat2 takes with few others
                    flags |= _FLAGS
                return self._beneath(root, path or ".", flags | os.O_CLOEXEC)
            finally:
                os.close(root)
        except OSError as error:
            number = error.errno or os_errno.EIO
            where = self.full(path)
            if number in _ABSENT:
                raise ObjectMissing(f"{where}: no such file", number) from error
            if number in {os_errno.EXDEV, os_errno.ELOOP}:
                text = f"corrupt repository: {where}: a symbolic link leads out of the repository"
                raise CorruptImage(text) from error
            raise StoreError(f"{where}: {os.strerror(number)}", number) from error

    def _beneath(self, root: int, path: str, flags: int) -> int:
        if _openat2 is not None:
            how = _How(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
            raw = os.fsencode(path)
            for _ in range(_TRIES):
                fd = int(_openat2(_OPENAT2, root, raw, ctypes.byref(how), ctypes.sizeof(how)))
                if fd >= 0:
                    return fd
                number = ctypes.get_errno()
                if number not in {os_errno.EAGAIN, os_errno.EINTR}:  # somebody renames meanwhile
                    break
            if number != os_errno.ENOSYS:
                raise OSError(number, os.strerror(number))
        fd = os.open(path, flags, dir_fd=root)
        try:
            real = os.readlink(f"/proc/self/fd/{fd}")
            if os.path.commonpath([real, self._real]) != self._real:
                raise OSError(os_errno.EXDEV, os.strerror(os_errno.EXDEV))
        except BaseException:
            os.close(fd)
            raise
        return fd


_TRIES = 100


def _system_call() -> "ctypes._NamedFuncPointer | None":
    if platform.system() != "Linux":
        return None
    with suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).syscall
        call.restype = ctypes.c_long
        call.argtypes = (
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
        )
        return call
    return None


_openat2 = _system_call()


def _node_of(name: str, info: os.stat_result) -> Node | None:
    if stat.S_ISDIR(info.st_mode):
        return Node(name, directory=True, size=0, modified=info.st_mtime)
    if stat.S_ISREG(info.st_mode):
        return Node(name, directory=False, size=info.st_size, modified=info.st_mtime)
    return None


def _undecodable(name: str) -> bool:
    return name.encode(errors="ignore").decode() != name
