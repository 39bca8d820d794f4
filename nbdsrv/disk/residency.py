"""Is a range of a file in the page cache, so that sendfile cannot block?

There is no cheap system call that answers this exactly: mincore needs a mapping and lies to
non-owners, cachestat counts pages that are still being read. ``preadv2(RWF_NOWAIT)`` is exact;
reading into the same 64 KiB again and again keeps its copy in the processor's cache and costs a
fraction of sending.
"""

import os

from nbdsrv.disk.runs import NEVER, FileRun

__all__ = ["MAX_PROBE", "make_resident", "resident"]

_STRIDE = 1 << 16
_scratch = memoryview(bytearray(_STRIDE))
_iovecs = {count: [_scratch] * count for count in range(1, 65)}

MAX_PROBE = len(_iovecs) * _STRIDE
"""Bytes one probe covers (4 MiB, some 0.3 ms); larger ranges are treated as cold."""


def resident(fd: int, position: int, length: int, inline: int) -> bool:
    """Can all of the range be read now without blocking? For the event loop."""
    if inline == NEVER or length > MAX_PROBE:
        return False
    whole, rest = divmod(length, _STRIDE)
    try:
        if whole and os.preadv(fd, _iovecs[whole], position, inline) != whole * _STRIDE:
            return False
        if rest:
            part = (_scratch[:rest],)
            return os.preadv(fd, part, position + whole * _STRIDE, inline) == rest
    except OSError:
        return False
    return True


def make_resident(run: FileRun) -> None:
    """Read the range into the page cache, blocking. For worker threads; errors show later."""
    scratch = memoryview(bytearray(_STRIDE))
    done = 0
    while done < run.length:
        part = scratch[: run.length - done]
        try:
            count = os.preadv(run.fd, [part], run.position + done)
        except OSError:
            return
        if not count:
            return
        done += count
