"""Objects as files of a directory, on any file system that keeps what it has synced.

::

    put_new:  .tmp/PID-RANDOM ── write, fdatasync ── link ──> packs/0f/0fa9...  ── fsync packs/0f
                    └────────────── unlink                       (EEXIST: it is there already)
    put:      .tmp/PID-RANDOM ── write, fdatasync ── rename ──> leases/01HX...  ── fsync leases

Rules:

* A name appears when its bytes are durable, never before: kill -9 leaves whole objects, and
  temporaries, which the first put of a later writer removes when they are a day old.
* A directory is synced after a name has been put into it, and its parents once per store: they may
  be another writer's that has not come to that yet.
* Who only reads writes nothing: read-only mounts and immutable files are fine.
* What is put is as open to others as the root is, within the umask; a root that is made here is
  its owner's alone.
"""

import errno as os_errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nbdsrv.store.create_only import link_or_rename
from nbdsrv.store.keys import check_key, check_prefix, is_key
from nbdsrv.store.store import MAX_OBJECT, Data, ObjectMissing, Store, Stored, StoreError, naming

__all__ = ["DirectoryStore"]

TEMPORARIES = ".tmp"
LEFT_OVER_S = 24 * 3600
"""A temporary of that age belongs to nobody any more: a put takes seconds, at worst minutes."""

_TEMPORARY = re.compile(r"[0-9]+-[0-9a-f]{16}")
_ABSENT = frozenset({os_errno.ENOENT, os_errno.ENOTDIR, os_errno.EISDIR, os_errno.ELOOP})
_NO_DIRECTORY_SYNC = frozenset({os_errno.EINVAL, os_errno.ENOTSUP})


class DirectoryStore(Store):
    """The files below ``path``, which need not exist before the first put.

    Any number of processes, on any number of hosts, may use one directory at a time.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self._temporaries = os.path.join(path, TEMPORARIES)
        self._lock = threading.Lock()
        self._prepared = False
        self._synced: set[str] = set()  # directories whose own names are durable
        self._mode = 0o700

    def put_new(self, key: str, data: Data) -> bool:
        path = self._path(key)
        with naming(path):
            if os.path.lexists(path):  # spares the writing; the link below is what decides
                _sync_directory(os.path.dirname(path))
                return False
            with self._temporary(data) as temporary:
                directory = self._directory_of(path)
                created = link_or_rename(temporary, path)
            # Also if it was there: whoever made it may not have come to that, and ours may be
            # the next object to refer to it.
            _sync_directory(directory)
            return created

    def put(self, key: str, data: Data) -> None:
        path = self._path(key)
        with naming(path), self._temporary(data) as temporary:
            directory = self._directory_of(path)
            os.rename(temporary, path)
            _sync_directory(directory)

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        path = self._path(key)
        with naming(path), _opened(path) as (fd, size):
            if size > limit:
                raise StoreError(f"{path}: {size} bytes, more than {limit}", os_errno.EFBIG)
            return _read(fd, path, 0, size)

    def get_range(self, key: str, offset: int, length: int) -> Data:
        path = self._path(key)
        with naming(path), _opened(path) as (fd, size):
            if offset < 0 or length < 1 or offset + length > size:
                raise StoreError(f"{path}: {length} bytes at {offset}, but it has {size}")
            return _read(fd, path, offset, length)

    def open_file(self, key: str) -> int | None:
        path = self._path(key)
        with naming(path), _opened(path) as (fd, _):
            return os.dup(fd)

    def list(self, prefix: str) -> Iterator[Stored]:
        check_prefix(self.name, prefix)
        return self._listing(prefix)

    def delete(self, key: str) -> None:
        # Not synced: after a power cut the object may be there again, whole, as if this had not
        # been called; and whoever deletes it would do so again.
        path = self._path(key)
        with naming(path):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return

    def _path(self, key: str) -> str:
        check_key(self.name, key)
        return os.path.join(self.name, key)

    def _listing(self, prefix: str) -> Iterator[Stored]:
        directory = os.path.join(self.name, prefix)
        with naming(directory):
            try:
                with os.scandir(directory) as entries:
                    # As keys are ordered: a/b behind a-b, so a directory counts with its slash.
                    found = sorted(
                        (f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name)
                        for entry in entries
                        if is_key(entry.name)
                    )
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in found:
            key = prefix + name
            if name.endswith("/"):
                yield from self._listing(key)
                continue
            path = os.path.join(self.name, key)
            with naming(path):
                try:
                    info = os.stat(path, follow_symlinks=False)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # deleted meanwhile
            if stat.S_ISREG(info.st_mode):
                yield Stored(key, info.st_size, info.st_mtime)

    @contextmanager
    def _temporary(self, data: Data) -> Iterator[str]:
        """A temporary file with ``data``, durable but for its name; gone afterwards."""
        self._prepare()
        path = os.path.join(self._temporaries, f"{os.getpid()}-{secrets.token_hex(8)}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, self._mode & 0o666)
        except FileNotFoundError:  # somebody has tidied up
            self._make_directory(self._temporaries)
            fd = os.open(path, flags, self._mode & 0o666)
        try:
            try:
                _write(fd, data)
                os.fdatasync(fd)
                if not self._prepared:
                    self._remove_left_over(os.fstat(fd).st_mtime)
            finally:
                os.close(fd)
            yield path
        finally:
            with suppress(FileNotFoundError):  # renamed
                os.unlink(path)

    def _prepare(self) -> None:
        """Before the first put: make the root if need be, and a place for temporaries."""
        with self._lock:
            if self._prepared:
                return
            try:
                self._mode = stat.S_IMODE(os.stat(self.name).st_mode) & 0o777
            except FileNotFoundError:
                _make_root(self.name)
            self._make_directory(self._temporaries)

    def _remove_left_over(self, now: float) -> None:
        """Temporaries of writers that were killed. ``now``: the file system's own clock."""
        self._prepared = True
        with suppress(OSError), os.scandir(self._temporaries) as entries:
            for entry in entries:
                with suppress(OSError):
                    if (
                        _TEMPORARY.fullmatch(entry.name)
                        and entry.is_file(follow_symlinks=False)
                        and now - entry.stat(follow_symlinks=False).st_mtime > LEFT_OVER_S
                    ):
                        os.unlink(entry.path)

    def _directory_of(self, path: str) -> str:
        """The directory for a file of ours: made if need be, and durable itself."""
        directory = os.path.dirname(path)
        with self._lock:
            # Asked each time: somebody may have removed what was empty.
            if directory not in self._synced or not os.path.isdir(directory):
                self._make_and_sync(directory)
        return directory

    def _make_and_sync(self, directory: str) -> None:
        if len(directory) <= len(self.name):
            return  # the root: durable when it was made
        parent = os.path.dirname(directory)
        self._make_and_sync(parent)
        self._make_directory(directory)
        _sync_directory(parent)
        self._synced.add(directory)

    def _make_directory(self, path: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(path, self._mode | 0o700)


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of an object."""
    try:
        # O_NONBLOCK: what is no object of ours may be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            raise ObjectMissing(f"{path}: no such object", os_errno.ENOENT) from error
        raise
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ObjectMissing(f"{path}: not a file, so no object", os_errno.ENOENT)
        yield fd, info.st_size
    finally:
        os.close(fd)


def _read(fd: int, path: str, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]  # interrupted, or more than the kernel reads at a time
    done = len(data)
    while parts[-1] and done < length:
        parts.append(os.pread(fd, length - done, offset + done))
        done += len(parts[-1])
    if done < length:
        raise StoreError(f"{path}: ends at {offset + done} while it is being read")
    return b"".join(parts)


def _write(fd: int, data: Data) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _make_root(path: str) -> None:
    """The directory and its parents, each durable in its own parent."""
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        _make_root(parent)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    _sync_directory(parent)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:  # FUSE and CIFS may know no such thing
            raise
    finally:
        os.close(fd)
