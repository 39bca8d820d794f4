"""The private directory that one VM's backup and its QEMU share.

::

    /var/tmp/nbdsrv-qemu-<hash of the monitor's address>/      0700, locked while a backup runs
        nbd.sock              the exports
        0.qcow2 1.qcow2       what the guest overwrites is kept there first, a file a disk
        frozen                there while the guest's file systems may be frozen

The name is the same from run to run, so that what a killed one left is found. Everything blocks.
"""

import contextlib
import errno as os_errno
import fcntl
import hashlib
import os
import re
import stat

from nbdsrv.source.hypervisor import SourceError

__all__ = ["Scratch"]

MAX_SOCKET_PATH = 107
RESERVE = 256 << 20
"""Bytes that must stay free. The guest's own writes fail once no more can be kept."""
_FLEECE = re.compile(r"[0-9]+\.qcow2")
_NAME = re.compile(r"nbdsrv-qemu-[0-9a-f]{12}")
_FROZEN = "frozen"
_SOCKET = "nbd.sock"


class Scratch:
    """The directory, from ``open`` to ``close``.

    Attributes:
        path: of it.
    """

    def __init__(self, base: str, monitor: str) -> None:
        """``base``: where; ``monitor``: the path of its socket, or what else tells the VM."""
        monitor = os.path.realpath(monitor)
        key = hashlib.sha256(monitor.encode(errors="surrogateescape")).hexdigest()[:12]
        self.path = os.path.join(os.path.abspath(base), f"nbdsrv-qemu-{key}")
        self._fd: int | None = None
        self._owner: tuple[int, int] | None = None

    @property
    def socket(self) -> str:
        """Path of the NBD socket in it."""
        return os.path.join(self.path, _SOCKET)

    @property
    def marker(self) -> str:
        """Path of the file that says that a guest may be frozen."""
        return os.path.join(self.path, _FROZEN)

    def open(self, owner: tuple[int, int] | None) -> None:
        """Make the directory if it is not there, and lock it.

        Args:
            owner: user and group QEMU runs as, if it is known.

        Raises:
            SourceError: it cannot be used, or another backup of this VM is running.
        """
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            text = f"{self.socket}: too long for a socket; choose a shorter ?scratch="
            raise SourceError(text, os_errno.ENAMETOOLONG)
        self._owner = owner
        try:
            while self._fd is None:
                self._fd = self._locked(owner)
        except OSError as error:
            raise SourceError.from_os(self.path, error) from error

    def _locked(self, owner: tuple[int, int] | None) -> int | None:
        """The directory's descriptor; None if it was removed meanwhile."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(self.path)):
                raise
            return None
        try:
            self._check(fd, owner)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(self.path, follow_symlinks=False)
        except BlockingIOError:
            os.close(fd)
            text = f"{self.path} is locked: another backup of this VM is running"
            raise SourceError(text, os_errno.EBUSY) from None
        except FileNotFoundError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        if (there.st_dev, there.st_ino) != _place(fd):
            os.close(fd)
            return None
        return fd

    def _check(self, fd: int, owner: tuple[int, int] | None) -> None:
        """Nobody but us and QEMU may have a say in it."""
        found = os.fstat(fd)
        ours = os.geteuid()
        trusted = {ours} if owner is None else {ours, owner[0]}
        if found.st_uid not in trusted or stat.S_IMODE(found.st_mode) & 0o077:
            text = f"{self.path} is not private to us; remove it, or choose another ?scratch="
            raise SourceError(text, os_errno.EPERM)
        if owner is not None and found.st_uid != owner[0]:
            if ours != 0:
                text = f"QEMU runs as user {owner[0]} and cannot use {self.path}"
                raise SourceError(f"{text}: run as that user, or as root", os_errno.EPERM)
            os.fchown(fd, *owner)

    def beside(self, file: str) -> "Scratch | None":
        """The directory of a run that was told another ``?scratch=`` or monitor; opened.

        Args:
            file: in it, as QEMU names it.

        Returns:
            None if that is this one, or none of ours, or not there any more.

        Raises:
            SourceError: as ``open``; most of all, that the other run is still at it.
        """
        path = os.path.dirname(file)
        if _NAME.fullmatch(os.path.basename(path)) is None:
            return None
        try:
            if os.path.samefile(path, self.path):
                return None
        except OSError:
            return None
        other = Scratch(os.path.dirname(path), "")
        other.path = path
        other.open(self._owner)
        return other

    def fleece(self, number: int) -> str:
        """Path of the file for disk ``number``; it does not exist yet."""
        return os.path.join(self.path, f"{number}.qcow2")

    def free(self) -> int:
        """Bytes the file system has for QEMU.

        Raises:
            SourceError: the directory is gone.
        """
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise SourceError.from_os(self.path, error) from error
        return found.f_bavail * found.f_frsize

    def check_room(self) -> None:
        """Is there any room to begin with?

        Raises:
            SourceError: less than twice what must stay free.
        """
        if (free := self.free()) < 2 * RESERVE:
            text = (
                f"{self.path}: {free >> 20} MiB are free, and {2 * RESERVE >> 20} needed at least"
            )
            raise SourceError(f"{text}; choose another ?scratch=", os_errno.ENOSPC)

    def room(self) -> int:
        """Bytes before less is free than must stay so; negative after."""
        return self.free() - RESERVE

    def mark_frozen(self, agent: str) -> None:
        """A guest's file systems are about to be frozen, by the agent at that socket.

        Raises:
            SourceError: that cannot be noted down.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(self.marker, flags, 0o600), "wb") as file:
                file.write(os.fsencode(os.path.abspath(agent)))
        except OSError as error:
            raise SourceError.from_os(self.marker, error) from error

    def frozen_by(self) -> str:
        """The socket of the agent that may have frozen them; "" if that was not noted down."""
        try:
            fd = os.open(self.marker, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                return os.fsdecode(file.read(MAX_SOCKET_PATH))
        except OSError:
            return ""

    def protect_socket(self) -> None:
        """Nobody but us may connect to it.

        Where QEMU runs as another user the directory is its: what stands at that name there might
        be a link to anything. The directory itself keeps others out then.
        """
        if self._fd is not None and os.fstat(self._fd).st_uid == os.geteuid():
            with contextlib.suppress(OSError):
                os.chmod(self.socket, 0o600)

    def mark_thawed(self) -> None:
        """They no longer are."""
        _unlink(self.marker)

    def is_marked(self) -> bool:
        """May they be?"""
        return os.path.lexists(self.marker)

    def sweep(self) -> list[str]:
        """Remove the files that QEMU no longer uses; their paths."""
        try:
            names = [name for name in sorted(os.listdir(self.path)) if _FLEECE.fullmatch(name)]
        except OSError:  # somebody else has removed the directory
            return []
        return [path for path in (os.path.join(self.path, each) for each in names) if _unlink(path)]

    def sweep_socket(self) -> list[str]:
        """The same for the socket, once nobody listens there."""
        return [self.socket] if _unlink(self.socket) else []

    def close(self) -> None:
        """Remove the directory if nothing is left in it, and unlock it. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)
            os.close(fd)


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _place(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
