"""Is a range of a file in the page cache, so that sendfile cannot block?

Two ways to ask, and neither is good alone:

* ``preadv2(RWF_NOWAIT)`` into the same 64 KiB again and again: exact, but copies everything.
* ``cachestat`` (Linux 6.5): a microsecond whatever the length, but counts pages whose read is
  still under way, and needs to own the file or be able to write it.

Reads are under way where something cold has been found lately. So ``cachestat`` is believed for
files that have been warm for a while, and everything else is asked exactly.
"""

import ctypes
import os
from contextlib import suppress
from struct import Struct
from time import monotonic

__all__ = ["NEVER", "Residency", "Stored", "announce", "inline_flags", "make_resident"]

NEVER = -1
"""``Residency.inline`` of a file that can only be read where blocking is allowed."""

_MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_STRIDE = 1 << 16
_scratch = memoryview(bytearray(_STRIDE))
_iovecs = {count: [_scratch] * count for count in range(1, 65)}

MAX_PROBE = len(_iovecs) * _STRIDE
"""Bytes one exact answer covers (4 MiB, some 0.3 ms); larger ranges are treated as cold."""
WARM_S = 2.0
"""Seconds without a cold page after which no read of ours can still be under way."""

_PAGE = os.sysconf("SC_PAGESIZE")
_CACHESTAT = 451
"""The system call's number, the same on every architecture."""
_pack_range = Struct("=QQ").pack
_counts = (ctypes.c_uint64 * 5)()

# A PyDLL keeps the interpreter meanwhile: the call takes a microsecond and cannot block, while
# getting the interpreter back from threads that decode took thirty.
_syscall = ctypes.PyDLL(None).syscall
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_uint,
]
_syscall.restype = ctypes.c_long


class Residency:
    """What is known of how warm one file is. Belongs to the loop.

    Attributes:
        inline: flags for a ``preadv`` that cannot block (RWF_NOWAIT, or 0 where reading memory
            is all it takes), or ``NEVER``.
    """

    __slots__ = ("_cold_at", "_counted", "inline")

    def __init__(self, inline: int) -> None:
        self.inline = inline
        self._cold_at = -WARM_S
        self._counted = True

    @property
    def reads_ahead(self) -> bool:
        """Does ``announce`` do anything? Not in memory, nor on what cannot be read on the loop."""
        return self.inline not in {NEVER, 0}

    def cold(self) -> None:
        """Something that was wanted has not been there."""
        self._cold_at = monotonic()

    def resident(self, fd: int, position: int, length: int) -> bool:
        """Can all of the range be read now without blocking?"""
        if self.inline == NEVER:
            return False
        if self._counted and monotonic() - self._cold_at > WARM_S:
            present = self._count(fd, position, length)
        else:
            present = self._probe(fd, position, length)
        if not present:
            self.cold()
        return present

    def _count(self, fd: int, position: int, length: int) -> bool:
        """By cachestat; all pages or not."""
        begin = position // _PAGE
        pages = (position + length + _PAGE - 1) // _PAGE - begin
        if _syscall(_CACHESTAT, fd, _pack_range(begin * _PAGE, pages * _PAGE), _counts, 0):
            self._counted = False  # an older kernel, or a file that is not ours
            return self._probe(fd, position, length)
        cached: int = _counts[0]
        return cached >= pages

    def _probe(self, fd: int, position: int, length: int) -> bool:
        """By reading."""
        if length > MAX_PROBE:
            return False
        whole, rest = divmod(length, _STRIDE)
        inline = self.inline
        try:
            if whole and os.preadv(fd, _iovecs[whole], position, inline) != whole * _STRIDE:
                return False
            if rest:
                part = (_scratch[:rest],)
                return os.preadv(fd, part, position + whole * _STRIDE, inline) == rest
        except OSError:
            return False
        return True


Stored = tuple[int, int, int, Residency]
"""Descriptor, position, length and residency of bytes in a file, as a ``FileRun`` has them."""


def announce(fd: int, position: int, length: int) -> None:
    """The range will be read: the disk fetches it while others are read. For worker threads:
    finding out where it lies may block.
    """
    with suppress(OSError):
        os.posix_fadvise(fd, position, length, os.POSIX_FADV_WILLNEED)


def make_resident(fd: int, position: int, length: int) -> None:
    """Read the range into the page cache, blocking. For worker threads; errors show later."""
    scratch = memoryview(bytearray(_STRIDE))
    done = 0
    while done < length:
        part = scratch[: length - done]
        try:
            count = os.preadv(fd, [part], position + done)
        except OSError:
            return
        if not count:
            return
        done += count


def inline_flags(fd: int) -> int:
    """How this file may be read on the event loop; decided once (see ``Residency.inline``)."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return os.RWF_NOWAIT
    except OSError:
        return 0 if _filesystem_of(fd) in _MEMORY_FILESYSTEMS else NEVER
    return os.RWF_NOWAIT


def _filesystem_of(fd: int) -> str:
    """Type of the file system that holds ``fd``, from /proc/self/mountinfo; "" if unknown."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
            for line in table:
                head, _, tail = line.partition(" - ")
                if head.split()[2] == wanted:
                    return tail.split()[0]
    except OSError:
        pass  # no /proc, or no descriptor left
    return ""
