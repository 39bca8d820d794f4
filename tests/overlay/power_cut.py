"""What a power cut leaves: the file operations of an overlay, written down and replayed in part.

::

    recorded   create write write sync write punch write syncdir rename ...
    cut here   ----------------------------------^
    kept       all that was synced; of the rest  any writes, whole or some of their 512-byte
                                                 sectors, any punches and truncations, and of
                                                 the names (a journal keeps their order) the first n
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdsrv.overlay.files import Files

__all__ = ["Killed", "Operation", "RecordingFiles", "Unsynced", "leave"]

SECTOR = 512


@dataclass(frozen=True)
class Operation:
    """One, on an inode or (inode 0) on the directory's names."""

    kind: str
    inode: int = 0
    position: int = 0
    data: bytes = b""
    length: int = 0
    names: tuple[str, ...] = ()


class Unsynced(Files):
    """For what is only looked at: nothing is waited for."""

    def sync_data(self, fd: int) -> None:
        """Not at all."""

    def sync(self, fd: int) -> None:
        """Not at all."""


class Killed(Exception):
    """Whoever is told so must let go of what it has."""


@dataclass
class RecordingFiles(Files):
    """Does it, and writes it down before. One overlay's directory only."""

    log: list[Operation] = field(default_factory=list)
    killed_at: int | None = None
    """Operations after which the process is no more: nothing is done or written down."""

    _numbers: dict[int, int] = field(default_factory=dict)

    def _note(self, operation: Operation) -> None:
        if self.killed_at is not None and len(self.log) >= self.killed_at:
            raise Killed
        self.log.append(operation)

    def _inode(self, fd: int) -> int:
        """Of our own: the file system gives the number of a removed file to the next one."""
        return self._numbers[os.fstat(fd).st_ino]

    def create(self, directory: int, name: str) -> int:
        number = len(self.log) + 1
        if name in os.listdir(directory):
            old = os.stat(name, dir_fd=directory).st_ino
            self._note(Operation("truncate", self._numbers[old]))
            return super().create(directory, name)
        self._note(Operation("create", names=(name,), length=number))
        fd = super().create(directory, name)
        self._numbers[os.fstat(fd).st_ino] = number
        return fd

    def write(self, fd: int, views: Sequence[memoryview | bytes], position: int) -> None:
        data = b"".join(bytes(view) for view in views)
        self._note(Operation("write", self._inode(fd), position, data))
        super().write(fd, views, position)

    def punch(self, fd: int, position: int, length: int) -> None:
        self._note(Operation("punch", self._inode(fd), position, length=length))
        super().punch(fd, position, length)

    def truncate(self, fd: int, length: int) -> None:
        self._note(Operation("truncate", self._inode(fd), length=length))
        super().truncate(fd, length)

    def sync_data(self, fd: int) -> None:
        self._note(Operation("sync", self._inode(fd)))
        super().sync_data(fd)

    def sync(self, fd: int) -> None:
        directory = os.path.isdir(f"/proc/self/fd/{fd}")
        self._note(Operation("sync", 0 if directory else self._inode(fd)))
        super().sync(fd)

    def rename(self, directory: int, old: str, new: str) -> None:
        self._note(Operation("rename", names=(old, new)))
        super().rename(directory, old, new)

    def unlink(self, directory: int, name: str) -> None:
        os.stat(name, dir_fd=directory)
        self._note(Operation("unlink", names=(name,)))
        super().unlink(directory, name)


def leave(log: Sequence[Operation], cut: int, chance: random.Random, directory: Path) -> None:
    """Put into ``directory`` what may be there if the power fails after ``cut`` operations."""
    done = log[:cut]
    synced: dict[int, int] = {}
    for at, operation in enumerate(done):
        if operation.kind == "sync":
            synced[operation.inode] = at
    keep_all, keep_none = chance.random() < 0.15, chance.random() < 0.15
    files: dict[int, bytearray] = {}
    names: dict[str, int] = {}
    # The names are journalled: what is there of them is a beginning.
    pending = [
        at
        for at, each in enumerate(done)
        if not each.inode and each.kind != "sync" and at > synced.get(0, -1)
    ]
    last_name = cut if keep_all else (chance.choice([*pending, cut]) if pending else cut)
    if keep_none and pending:
        last_name = pending[0]
    for at, operation in enumerate(done):
        if operation.kind == "sync":
            continue
        if not operation.inode:
            if at <= synced.get(0, -1) or at < last_name:
                _rename(names, operation)
            continue
        durable = at <= synced.get(operation.inode, -1)
        content = files.setdefault(operation.inode, bytearray())
        if durable or keep_all:
            _apply(content, operation, None)
        elif not keep_none and chance.random() < 0.6:
            _apply(content, operation, chance)
    directory.mkdir(parents=True)
    for name, inode in names.items():
        _store(directory / name, files.get(inode, bytearray()))


def _rename(names: dict[str, int], operation: Operation) -> None:
    if operation.kind == "create":
        names[operation.names[0]] = operation.length
    elif operation.kind == "rename":
        old, new = operation.names
        names[new] = names.pop(old)
    else:
        names.pop(operation.names[0], None)


def _apply(content: bytearray, operation: Operation, torn: random.Random | None) -> None:
    position = operation.position
    if operation.kind == "truncate":
        if operation.length < len(content):
            del content[operation.length :]
        else:
            content.extend(bytes(operation.length - len(content)))
        return
    data = operation.data if operation.kind == "write" else bytes(operation.length)
    end = position + len(data)
    if operation.kind == "punch":
        end = min(end, len(content))
    elif end > len(content):
        content.extend(bytes(end - len(content)))
    at = position
    while at < end:
        upto = min((at // SECTOR + 1) * SECTOR, end)
        if torn is None or torn.random() < 0.7:
            content[at:upto] = data[at - position : upto - position]
        at = upto


def _store(path: Path, content: bytearray) -> None:
    """Sparse: an overlay that was never written to has no blocks."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), 4096):
            part = bytes(content[at : at + 4096])
            if any(part):
                os.pwrite(file.fileno(), part, at)
