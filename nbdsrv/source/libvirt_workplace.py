"""The directory of one backup: what QEMU needs while it runs, and what tells that it was left.

::

    /var/tmp/nbdsrv-libvirt-<token>/     ours, 0711
        lock                             locked while the process that made it lives
        domain                           UUID of the domain
        frozen                           there while the guest's file systems are frozen
        qemu/                            QEMU's, 0700: it makes these itself
            nbd                          the socket it serves on
            vda.scratch                  what the guest overwrites meanwhile

The lock goes with the process, however that ends. A directory without one is what a crash has left,
and its name tells which backup job and which checkpoint belong to it.

Rule: QEMU can write in ``qemu/`` only. A guest that broke out cannot make us believe anything.
"""

import errno as os_errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_checkpoints import token_of
from protocol.uri import MAX_SOCKET_PATH

__all__ = ["RESERVE", "Workplace", "abandoned", "base_of", "is_occupied"]

PREFIX = "nbdsrv-libvirt-"
QEMU, SOCKET, LOCK, DOMAIN, FROZEN = "qemu", "nbd", "lock", "domain", "frozen"
MAX_UUID = 64
MAKING_S = 3600
"""Seconds; making a directory takes some milliseconds."""
RESERVE = 256 << 20
"""Bytes that must stay free: where QEMU cannot keep what the guest overwrites, the guest's own
writes fail."""


class Workplace:
    """One backup's directory. All methods block for a moment only.

    Attributes:
        token: names the backup.
        path: the directory.
    """

    def __init__(self, path: Path, token: str, lock: int) -> None:
        self.path = path
        self.token = token
        self._lock = lock

    @classmethod
    def make(cls, base: str, token: str, domain: str, owner: tuple[int, int] | None) -> "Workplace":
        """Make and lock it.

        Args:
            base: directory that it is made in.
            token: of the backup.
            domain: UUID.
            owner: (uid, gid) of QEMU, or None for ourselves.

        Raises:
            SourceError: it cannot be made, or not be given to QEMU's user.
        """
        final = Path(base) / (PREFIX + token)
        if len(os.fsencode(final / QEMU / SOCKET)) > MAX_SOCKET_PATH:
            raise SourceError(f"{base}: too long a path for a Unix socket in it", os_errno.EINVAL)
        # Under another name until it is locked, or it would be taken for one that was left.
        making = final.with_name(f".{final.name}")
        lock = -1
        try:
            making.mkdir(mode=0o700)
            lock = os.open(making / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (making / DOMAIN).write_text(domain, "ascii")
            (making / QEMU).mkdir(mode=0o700)
            if owner is not None and owner[0] != os.geteuid():
                os.chown(making / QEMU, *owner)
            making.chmod(0o711)
            making.rename(final)
        except OSError as error:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(making, ignore_errors=True)
            if error.errno == os_errno.EPERM:
                text = f"QEMU runs as user {owner[0] if owner else '?'}, and only root can give it"
                raise SourceError(f"{final}: {text} a directory: run this as root") from error
            raise SourceError.from_os(f"{final}", error) from error
        return cls(final, token, lock)

    @property
    def socket(self) -> str:
        """Where QEMU is to serve."""
        return str(self.path / QEMU / SOCKET)

    def scratch(self, disk: str) -> str:
        """Where QEMU is to keep what is overwritten of a disk."""
        return str(self.path / QEMU / f"{disk.replace('/', '_')}.scratch")

    def note_frozen(self) -> None:
        """The guest's file systems are about to be frozen.

        Raises:
            SourceError: it cannot be noted: they must not be frozen.
        """
        try:
            os.close(os.open(self.path / FROZEN, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise SourceError.from_os(f"{self.path / FROZEN}", error) from error

    def note_thawed(self) -> None:
        """They are not frozen any more."""
        with suppress(OSError):  # thawing once more does no harm
            (self.path / FROZEN).unlink()

    @property
    def is_frozen(self) -> bool:
        """Has whoever was here left the guest frozen?"""
        return (self.path / FROZEN).exists()

    def check_room(self, wanted: int) -> None:
        """Is there any room to begin with?

        Args:
            wanted: bytes that QEMU can need at most.

        Raises:
            SourceError: there is less than that, and less than twice what must stay free.
        """
        free, least = self.free(), min(wanted, 2 * RESERVE)
        if free < least:
            text = (
                f"{self.path.parent}: {free >> 20} MiB are free, and {least >> 20} needed at least"
            )
            raise SourceError(f"{text}; choose another ?scratch=", os_errno.ENOSPC)

    def free(self) -> int:
        """Bytes that QEMU can still write here.

        Raises:
            SourceError: the file system does not tell.
        """
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise SourceError.from_os(f"{self.path}", error) from error
        return found.f_bavail * found.f_frsize

    @property
    def is_empty(self) -> bool:
        """Is all that QEMU had gone? Then only the note is left that a backup was not confirmed."""
        return not (self.path / QEMU).exists()

    def clear(self) -> None:
        """Remove what QEMU had, and leave the rest as a note that there is work left.

        Raises:
            SourceError: something cannot be removed.
        """
        self._remove(self.path / QEMU)

    def leave(self) -> None:
        """Give the lock up. Idempotent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def remove(self) -> None:
        """Remove it with all that is in it, and give the lock up.

        Raises:
            SourceError: something cannot be removed.
        """
        try:
            self._remove(self.path / QEMU)
            self._remove(self.path)
        finally:
            self.leave()

    def _remove(self, path: Path) -> None:
        try:
            shutil.rmtree(path, onerror=_unless_gone)
        except OSError as error:
            raise SourceError(f"removing {path}: {error}", error.errno or os_errno.EIO) from error


def _unless_gone(_: object, __: object, info: tuple[object, BaseException, object]) -> None:
    """What libvirtd removes at the same time need not be removed by us."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


@contextmanager
def abandoned(base: str, domain: str) -> Iterator[list[Workplace]]:
    """The directories that dead processes left of backups of a domain, locked for us.

    Those that are not removed in the block stay as they were.

    Args:
        base: where they are made.
        domain: UUID.
    """
    found: list[Workplace] = []
    _remove_unfinished(base)
    try:
        for path in sorted(Path(base).glob(f"{PREFIX}*")):
            place = _taken_over(path)
            if place is not None:
                found.append(place)
        mine = [place for place in found if _domain_of(place.path) == domain]
        for place in found:
            if place not in mine:
                place.leave()
        found = mine
        yield list(found)
    finally:
        for place in found:
            place.leave()


def _remove_unfinished(base: str) -> None:
    """What was being made when its maker died, and nobody was told of yet."""
    for path in Path(base).glob(f".{PREFIX}*"):
        with suppress(OSError):
            status = path.lstat()
            age = time.time() - status.st_mtime
            if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode) and age > MAKING_S:
                shutil.rmtree(path)


def base_of(path: str) -> str:
    """Where the directory stands that a socket or scratch file of ours is in; "" if in none."""
    home = Path(path).parent.parent
    return str(home.parent) if home.name.startswith(PREFIX) and token_of(home.name) else ""


def is_occupied(base: str, token: str) -> bool:
    """Does the process that made this backup's directory live?"""
    path = Path(base) / (PREFIX + token)
    lock = _lock_of(path)
    if lock is None:
        return False
    try:
        return not _is_free(lock)
    finally:
        os.close(lock)


def _taken_over(path: Path) -> Workplace | None:
    token = token_of(path.name)
    if token is None or path.name != PREFIX + token:
        return None
    lock = _lock_of(path)
    if lock is None:
        return None
    if not _is_free(lock):
        os.close(lock)
        return None
    return Workplace(path, token, lock)


def _lock_of(path: Path) -> int | None:
    """The lock of a directory that we made; everybody can make directories in /var/tmp."""
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        return os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _domain_of(path: Path) -> str:
    try:
        with (path / DOMAIN).open("rb") as file:
            return file.read(MAX_UUID).decode("ascii", "replace")
    except OSError:
        return ""
