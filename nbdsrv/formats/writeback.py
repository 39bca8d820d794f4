"""Having the kernel write out what has been stored, before anybody waits for it.

A copy ends with an fsync. If the kernel only begins to write then, a copy takes the time of reading
plus the time of writing; told early, it takes the longer of the two.
"""

import ctypes

__all__ = ["start_writing"]

_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    _sync_file_range.restype = ctypes.c_int


def start_writing(fd: int, offset: int, length: int) -> None:
    """Start writing this range to the disk; may wait while the disk's queue is full.

    A mere hint: makes nothing durable, and says nothing where it is not possible (a pipe, musl).
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)
