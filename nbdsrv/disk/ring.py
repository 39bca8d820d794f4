"""Bringing parts of files into memory while nobody waits: io_uring, as far as that goes.

::

    loop                                kernel
    bring, bring, bring ── submit ───>  starts the disk's reads, and returns
                                        ... the pages are there, and copied to where nobody looks
    complete(): done(count) <─────────  (the ring's descriptor is readable)

That they are in the page cache is all that is wanted, so there is no buffer that would have to
outlive a client. A thread for it costs three times as much: being handed the interpreter, and
handing it back.

To start a read is work of the file system and the disk's driver, done on the loop. It takes
microseconds, unless the disk's queue is full: where it has taken long ``bring`` refuses for a
while, and threads do what may block.

io_uring_setup(2), io_uring_enter(2), <linux/io_uring.h>; glibc has no functions for them. What is
used here needs Linux 6.0. Before that there is no ring, nor where a container's rules or
``kernel.io_uring_disabled`` forbid it.
"""

import ctypes
import errno as os_errno
import logging
import mmap
import os
import platform
import struct
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, TypeVar

__all__ = ["LONGEST", "Ring"]

log = logging.getLogger(__name__)

ENTRIES = 128
"""Reads under way at a time, of all clients."""
LONGEST = 1 << 17
"""Bytes of one: copying them takes the loop some 10 µs."""
BATCH = 4
"""Reads begun by one system call, after which there is a look at the clock."""
STALLED_S = 0.002
"""Seconds for a batch: as long as that a loop must not stand still often."""
REST_S = 1.0
"""Seconds without reads after that."""

_MACHINES = frozenset({"x86_64", "aarch64"})
"""Tried on the first. On both the numbers below hold, and what the kernel has written before a
system call returned is seen after it."""
_SETUP, _ENTER = 425, 426
"""Numbers of the system calls, the same on every architecture."""
_COOPERATIVE, _SINGLE_ISSUER = 1 << 8, 1 << 12
"""IORING_SETUP_COOP_TASKRUN: no interrupt for a completion, since the loop comes into the kernel
soon. IORING_SETUP_SINGLE_ISSUER: all calls are one thread's."""
_FEATURES = 1 | 2
"""IORING_FEAT_SINGLE_MMAP: both queues in one map; IORING_FEAT_NODROP: no completion is lost."""
_READ = 22
"""IORING_OP_READ."""
_QUEUES, _REQUESTS = 0, 0x10000000
"""IORING_OFF_SQ_RING, IORING_OFF_SQES: where what is to be mapped begins."""
_PARAMETERS = struct.Struct("=6I16x8I8x8I8x")
"""struct io_uring_params: entries of both queues, flags, (3), features at [5]; then what lies where
in the map: of the requests [6:14], of the completions [14:22]."""
_REQUEST = struct.Struct("=BBHiQQIIQ24x")
"""struct io_uring_sqe: opcode, flags, priority, fd, offset, address, length, flags, serial."""
_COMPLETION = struct.Struct("=QiI")
"""struct io_uring_cqe: serial, result, flags."""

# A PyDLL keeps the interpreter meanwhile: see ``residency``.
_system_call = ctypes.PyDLL(None, use_errno=True).syscall
_system_call.argtypes = [
    *(ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long),
    *(ctypes.c_void_p, ctypes.c_size_t),
]
_system_call.restype = ctypes.c_long

T = TypeVar("T")


class Ring:
    """Reads by io_uring. Belongs to the loop, and to the thread that has made it."""

    def __init__(self, fd: int, given: bytes) -> None:
        """``fd``, and the parameters as the kernel has given them; see ``make``."""
        requests, completions, *_ = numbers = _PARAMETERS.unpack(given)
        asked_at, done_at = numbers[6:14], numbers[14:22]
        self._fd = fd
        size = max(asked_at[6] + 4 * requests, done_at[5] + _COMPLETION.size * completions)
        self._queues = mmap.mmap(fd, size, offset=_QUEUES)
        self._requests = mmap.mmap(fd, requests * _REQUEST.size, offset=_REQUESTS)
        words = self._words = memoryview(self._queues).cast("I")
        self._tail_at, self._done_head_at, self._done_tail_at = (
            at // 4 for at in (asked_at[1], done_at[0], done_at[1])
        )
        self._mask, self._done_mask, self._done_at = requests - 1, completions - 1, done_at[5]
        for number in range(requests):  # the n-th place of the order is always request n's
            words[asked_at[6] // 4 + number] = number
        self._tail = self._head = self._serial = 0
        self._queued: list[int] = []
        self._reading: dict[int, tuple[Callable[[Any, int], None], Any]] = {}
        self._nowhere = mmap.mmap(-1, LONGEST)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._nowhere))
        self._rests_until = 0.0

    @classmethod
    def make(cls) -> "Ring | None":
        """A ring, or None where the kernel has none for us."""
        if platform.machine() not in _MACHINES:
            return None
        memory = ctypes.create_string_buffer(_PARAMETERS.size)
        struct.pack_into("=3I", memory, 0, 0, 0, _COOPERATIVE | _SINGLE_ISSUER)
        fd = _system_call(_SETUP, ENTRIES, ctypes.addressof(memory), 0, 0, None, 0)
        if fd < 0:
            log.info("ring.none reason=%s", os.strerror(ctypes.get_errno()))
            return None
        with suppress(OSError, ValueError):  # no memory that may be mapped
            if _PARAMETERS.unpack(memory.raw)[5] & _FEATURES == _FEATURES:
                return cls(fd, memory.raw)
        os.close(fd)
        return None

    def fileno(self) -> int:
        """Readable when ``complete`` has something to do."""
        return self._fd

    @property
    def in_flight(self) -> int:
        """Reads whose ``done`` has not been called."""
        return len(self._reading)

    @property
    def queued(self) -> int:
        """Those of them that ``submit`` has not begun."""
        return len(self._queued)

    def bring(
        self, fd: int, position: int, length: int, done: Callable[[T, int], None], what: T
    ) -> bool:
        """Have that range of a file brought into memory, once ``submit`` has been called.

        Args:
            fd: stays open until ``done`` has been called.
            position: bytes from the file's beginning.
            length: bytes.
            done: is told ``what``, and how many bytes there were, or a negated errno.
            what: it is for.

        Returns:
            False: not now; or never, for it is longer than ``LONGEST``.
        """
        if length > LONGEST or len(self._reading) >= ENTRIES or perf_counter() < self._rests_until:
            return False
        serial = self._serial = self._serial + 1
        self._reading[serial] = (done, what)
        at = (self._tail & self._mask) * _REQUEST.size
        where = (fd, position, self._address, length)
        _REQUEST.pack_into(self._requests, at, _READ, 0, 0, *where, 0, serial)
        self._tail = self._tail + 1 & 0xFFFFFFFF
        self._queued.append(serial)
        return True

    def submit(self) -> None:
        """Begin what ``bring`` was told of; calls ``done`` for what cannot be begun now."""
        queued = self._queued
        while queued:
            began = perf_counter()
            self._words[self._tail_at] = self._tail
            count = _system_call(_ENTER, self._fd, min(len(queued), BATCH), 0, 0, None, 0)
            if count <= 0:
                self._withdraw(ctypes.get_errno() if count else os_errno.EAGAIN)
                return
            del queued[:count]
            now = perf_counter()
            if now - began > STALLED_S:
                log.debug("ring.stalled seconds=%.4f", now - began)
                self._rests_until = now + REST_S
                self._withdraw(os_errno.EAGAIN)
                return

    def complete(self) -> None:
        """Call ``done`` for what has been read."""
        words, queues = self._words, self._queues
        while (head := self._head) != words[self._done_tail_at]:
            place = self._done_at + (head & self._done_mask) * _COMPLETION.size
            serial, result, _ = _COMPLETION.unpack_from(queues, place)
            self._head = words[self._done_head_at] = head + 1 & 0xFFFFFFFF
            self._end(serial, result)

    def close(self) -> None:
        """No more reads. Where some still go is never given back: the kernel writes there."""
        if self._reading:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._nowhere))
        self._reading.clear()
        self._queued.clear()
        self._words.release()
        self._queues.close()
        self._requests.close()
        os.close(self._fd)

    def _withdraw(self, errno: int) -> None:
        """The kernel has not looked at these yet."""
        queued, self._queued = self._queued, []
        self._tail = self._tail - len(queued) & 0xFFFFFFFF
        self._words[self._tail_at] = self._tail
        for serial in queued:
            self._end(serial, -errno)

    def _end(self, serial: int, result: int) -> None:
        done, what = self._reading.pop(serial)
        try:
            done(what, result)
        except Exception:  # the others' results are not to be lost with it
            log.exception("ring.bug in %r", done)
