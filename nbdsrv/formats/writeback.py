"""Having the kernel write out what has been stored, before anybody waits for it.

::

    stored    |====64 MiB====|====64 MiB====|==...        fsync
    written            |====64 MiB====|====64 MiB====|==..|

A copy ends with an fsync. If the kernel only begins to write then, a copy takes the time of copying
plus the time of writing; told early, it takes the longer of the two.
"""

import ctypes

__all__ = ["Writeback"]

STEP = 64 << 20
"""Bytes stored between two reminders. More often, and the disk's queue is full when one is given,
which then waits."""

_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    _sync_file_range.restype = ctypes.c_int


class Writeback:
    """Of one file. Any thread may call it: a reminder more or less does not matter."""

    __slots__ = ("_stored",)

    def __init__(self) -> None:
        self._stored = 0

    def stored(self, fd: int, length: int) -> None:
        """So many bytes more have been stored. A mere hint: makes nothing durable, never fails."""
        self._stored += length
        if self._stored >= STEP and _sync_file_range is not None:
            self._stored = 0
            _sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)  # 0 bytes: all of the file
