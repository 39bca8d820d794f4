"""Allocating, punching and zeroing ranges of a file: fallocate(2) and BLKDISCARD.

Python has only ``posix_fallocate``, which can do none of it.
"""

import ctypes
import errno as os_errno
import fcntl
import os
import struct

__all__ = ["discard_device", "punch_hole", "zero_range"]

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_BLKDISCARD = 0x1277

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Deallocate; the range reads as zeroes.

    Raises:
        OSError: EOPNOTSUPP if the file system (or device) cannot.
    """
    _call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Zero but keep allocated, without writing the zeroes where the file system can.

    Raises:
        OSError: EOPNOTSUPP if the file system (or device) cannot.
    """
    _call(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tell a block device that the range is unused; contents are undefined afterwards."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))


def _call(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != os_errno.EINTR:
            raise OSError(number, os.strerror(number))
