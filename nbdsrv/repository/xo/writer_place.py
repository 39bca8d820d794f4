"""Writing files into a Xen Orchestra repository: nothing is there before it is durable.

::

    new file     blocks/0/17            written, synced; its name counts for nothing yet
    publish      .nbdsrv-<random>.tmp ── synced ── renamed ──> 20260102T020304Z.json
    settle       directories, the innermost first: now their names are durable too

Rule: whatever is made here goes through ``step``, one call before each change. A test stops there
and looks at what a crash would have left.
"""

import errno as os_errno
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress

from nbdsrv.errors import CorruptImage
from nbdsrv.store.store import StoreError, naming
from nbdsrv.store.tree import check_path

__all__ = ["TEMPORARY", "Place", "is_temporary"]

TEMPORARY = ".nbdsrv-"
_ENDING = ".tmp"
_NO_SYNC = frozenset({os_errno.EINVAL, os_errno.ENOTSUP})
Step = Callable[[str, str], None]
Data = bytes | bytearray | memoryview


def is_temporary(name: str) -> bool:
    """Is it a file of ours that never came to its name?"""
    return name.startswith(TEMPORARY) and name.endswith(_ENDING)


class Place:
    """The repository's directory. Thread-safe; all methods block.

    All paths are relative to it; all raise StoreError.

    Attributes:
        root: the directory.
    """

    def __init__(self, root: str, step: Step = lambda _, __: None) -> None:
        """``step`` is called with (what, path) before each change."""
        self.root = root
        self._step = step

    def full(self, path: str) -> str:
        """The path for the system, and for messages."""
        check_path(self.root, path)
        return os.path.join(self.root, path)

    def make_directory(self, path: str) -> list[str]:
        """Make it, and those above it.

        Returns:
            What was made, and what its names stand in; to be settled.
        """
        made: list[str] = []
        missing: list[str] = []
        at = path
        while at and not os.path.isdir(self.full(at)):
            missing.append(at)
            at = at.rpartition("/")[0]
        self._beneath(at)
        for each in reversed(missing):
            with naming(self.full(each)):
                self._step("mkdir", each)
                with suppress(FileExistsError):
                    os.mkdir(self.full(each))
            made += [each, each.rpartition("/")[0]]
        return list(dict.fromkeys(made))

    def _beneath(self, path: str) -> None:
        """Raises CorruptImage if a link leads out: nothing is written elsewhere."""
        root = os.path.realpath(self.root)
        if os.path.commonpath([root, os.path.realpath(self.full(path))]) != root:
            text = f"corrupt repository: {self.full(path)}: a symbolic link leads out of it"
            raise CorruptImage(text)

    def create(self, path: str) -> int:
        """A new file, open for writing: the descriptor is the caller's."""
        with naming(self.full(path)):
            self._step("create", path)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            return os.open(self.full(path), flags, 0o666)

    def write_new(self, path: str, *parts: Data) -> None:
        """A new file, durable but for its name."""
        fd = self.create(path)
        try:
            self.append(fd, path, 0, *parts)
            self.sync(fd, path)
        finally:
            os.close(fd)

    def append(self, fd: int, path: str, position: int, *parts: Data) -> int:
        """Write ``parts`` at ``position``; what is behind them."""
        with naming(self.full(path)):
            self._step("write", path)
            for part in parts:
                view, done = memoryview(part), 0
                while done < len(view):
                    done += os.pwrite(fd, view[done:], position + done)
                position += done
        return position

    def sync(self, fd: int, path: str) -> None:
        """Its content is durable."""
        with naming(self.full(path)):
            self._step("sync", path)
            os.fdatasync(fd)

    def publish(self, path: str, data: Data) -> None:
        """A file that is there whole or not at all, under its name durably. Replaces."""
        directory = path.rpartition("/")[0]
        temporary = self.temporary(directory)
        try:
            self.write_new(temporary, data)
            self.rename(temporary, path)
        except StoreError:
            self.remove(temporary)
            raise
        self.settle([directory])

    def temporary(self, directory: str) -> str:
        """A new name in it that nobody minds."""
        return f"{directory}/{TEMPORARY}{secrets.token_hex(8)}{_ENDING}"

    def rename(self, old: str, new: str) -> None:
        """Replaces ``new``."""
        with naming(self.full(new)):
            self._step("rename", new)
            os.rename(self.full(old), self.full(new))

    def settle(self, directories: list[str]) -> None:
        """The names in these directories are durable."""
        for each in sorted(directories, key=len, reverse=True):
            with naming(self.full(each)):
                self._step("settle", each)
                fd = os.open(self.full(each), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                except OSError as error:
                    if error.errno not in _NO_SYNC:
                        raise
                finally:
                    os.close(fd)

    def remove(self, path: str) -> None:
        """A file that may be gone already."""
        with naming(self.full(path)), suppress(FileNotFoundError):
            self._step("remove", path)
            os.unlink(self.full(path))

    def remove_tree(self, path: str) -> None:
        """A directory with all that is in it; links in it are not followed."""
        with naming(self.full(path)), suppress(FileNotFoundError):
            self._step("remove", path)
            shutil.rmtree(self.full(path))
