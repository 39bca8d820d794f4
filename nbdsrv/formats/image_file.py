"""One file an image is made of, or a part of one: opened, bounded, read exactly.

::

    descriptor  |.......|=========== ImageFile ===========|......|
                        ^ base                            ^ base + size
                        0         positions               size

A member of an archive (OVA, XVA) is an ImageFile with a base; nothing below has to know.

Rule: formats read their metadata through here only. A position or length that comes from the file
is bounded by ``read`` against the file's size, and a fault is a CorruptImage that says where.
"""

import errno as os_errno
import fcntl
import os
import stat
import struct

from nbdsrv.disk.residency import Residency, inline_flags
from nbdsrv.disk.runs import FileRun
from nbdsrv.errors import CorruptImage, DiskError

__all__ = ["MAX_METADATA", "ImageFile", "open_image_file"]

MAX_METADATA = 32 << 20
"""Bytes of metadata read in one go; nothing any format needs at once is larger."""
_BLKROGET = 0x125E


class ImageFile:
    """An open file. Its methods block unless they say otherwise; any thread may call them.

    Attributes:
        path: for messages and for finding what lies beside it.
        fd: descriptor; positions in it are ``base`` + ours.
        base: bytes.
        size: bytes that belong to it, when it was opened or last grown.
        device: is it a block device?
        writable: was it opened for writing?
        residency: how warm it is, for ``FileRun``.
    """

    __slots__ = ("__weakref__", "base", "device", "fd", "path", "residency", "size", "writable")

    def __init__(
        self, path: str, fd: int, *, size: int, base: int = 0, device: bool, writable: bool
    ) -> None:
        self.path = path
        self.fd = fd
        self.base = base
        self.size = size
        self.device = device
        self.writable = writable
        self.residency = Residency(inline_flags(fd))

    @classmethod
    def from_descriptor(cls, path: str, fd: int) -> "ImageFile":
        """A regular file that is open for reading; becomes the owner of ``fd``, also if it raises.

        Args:
            path: for messages.
            fd: its descriptor.

        Raises:
            DiskError: the descriptor cannot be asked.
        """
        try:
            return cls(path, fd, size=os.fstat(fd).st_size, device=False, writable=False)
        except OSError as error:
            os.close(fd)
            raise DiskError.from_os(path, error) from error

    def part(self, base: int, size: int, name: str) -> "ImageFile":
        """A range of this file as a file of its own, with its own descriptor.

        Raises:
            CorruptImage: the range is not within the file.
        """
        if base < 0 or size < 0 or base + size > self.size:
            raise self.corrupt(base, f"{name} of {size} bytes reaches beyond the end")
        path = f"{self.path}#{name}"
        try:
            fd = os.dup(self.fd)
        except OSError as error:
            raise DiskError.from_os(path, error) from error
        try:
            return ImageFile(
                path,
                fd,
                size=size,
                base=self.base + base,
                device=self.device,
                writable=self.writable,
            )
        except BaseException:
            os.close(fd)
            raise

    def read(self, position: int, length: int, what: str) -> bytes:
        """Exactly ``length`` bytes; ``what`` names them in the error.

        Raises:
            CorruptImage: the file ends before, or the length makes no sense.
            DiskError: the operating system refuses.
        """
        if not 0 <= length <= MAX_METADATA:
            raise self.corrupt(position, f"{what} of {length} bytes")
        if position < 0 or position + length > self.size:
            raise self.corrupt(position, f"{what} lies beyond the end of the file ({self.size})")
        data = bytearray()
        while len(data) < length:
            try:
                more = os.pread(self.fd, length - len(data), self.base + position + len(data))
            except OSError as error:
                raise DiskError.from_os(f"reading {self.path}", error) from error
            if not more:
                raise self.corrupt(position + len(data), f"the file ends within {what}")
            if len(more) == length:
                return more
            data += more
        return bytes(data)

    def read_up_to(self, position: int, length: int) -> bytes:
        """At most ``length`` bytes, less at the end of the file; for looking at what it is."""
        length = max(0, min(length, self.size - position))
        return self.read(position, length, "data") if length else b""

    def run(self, position: int, length: int) -> FileRun:
        """Guest data that lies here as it is. Never blocks."""
        return FileRun(self.fd, self.base + position, length, self.residency)

    def corrupt(self, position: int, what: str) -> CorruptImage:
        """The error to raise: ``corrupt image: FILE at OFFSET: what``."""
        return CorruptImage(f"corrupt image: {self.path} at {position}: {what}")

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def open_image_file(path: str, *, writable: bool = False) -> ImageFile:
    """Open a regular file or block device; read-only unless ``writable``, and then really so.

    Blocking.

    Raises:
        DiskError: missing, no permission, a directory, not a disk at all.
    """
    # O_NONBLOCK: opening a FIFO by mistake must not wait for its other end.
    mode = os.O_RDWR if writable else os.O_RDONLY
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DiskError.from_os(path, error) from error
    except ValueError as error:  # a NUL byte, from inside an image
        raise DiskError(f"{path!r} is not a file name", os_errno.EINVAL) from error
    try:
        info = os.fstat(fd)
        device = stat.S_ISBLK(info.st_mode)
        if stat.S_ISDIR(info.st_mode):
            raise DiskError(f"{path}: is a directory, not a disk image", os_errno.EISDIR)
        if not device and not stat.S_ISREG(info.st_mode):
            raise DiskError(f"{path}: neither a regular file nor a block device", os_errno.EINVAL)
        if device and writable and _is_read_only(fd):
            raise DiskError(f"{path}: the device is read-only", os_errno.EROFS)
        size = os.lseek(fd, 0, os.SEEK_END) if device else info.st_size
        return ImageFile(path, fd, size=size, device=device, writable=writable)
    except OSError as error:
        os.close(fd)
        raise DiskError.from_os(path, error) from error
    except BaseException:
        os.close(fd)
        raise


def _is_read_only(fd: int) -> bool:
    """Is it a device that may be opened for writing, and then refuses each write?"""
    (flag,) = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    return bool(flag)
