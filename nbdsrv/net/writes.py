r"""Writes that go where they say: collected during a turn, stored by one thread in one go.

::

    turn      WRITE WRITE ... WRITE    payloads stay where they were received
                 \____ batch ____/
    thread    pwritev(adjacent together), RWF_DSYNC for FUA
    loop      all replies in one send, buffers given back

One hand-over for a whole batch is what makes threads affordable for 4 KiB writes.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from nbdsrv.disk.runs import FileRun
from nbdsrv.net.buffers import Buffer

__all__ = ["Write", "WriteBatch", "store"]

MAX_VIEWS = 512
"""Buffers in one pwritev; the kernel's IOV_MAX is 1024."""


class Write(NamedTuple):
    """One WRITE request; ``data`` is valid until the batch's owners are released."""

    cookie: int
    offset: int
    run: FileRun
    data: memoryview
    durable: bool


class WriteBatch:
    """Writes and the buffers their payloads live in."""

    __slots__ = ("length", "owners", "writes")

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.owners: list[Buffer] = []
        self.length = 0

    def add(self, write: Write) -> None:
        """Append; the buffer behind ``write.data`` must become one of ``owners``."""
        self.writes.append(write)
        self.length += write.run.length


def store(writes: Sequence[Write]) -> list[OSError | None]:
    """Perform ``writes`` in order, blocking; one result for each. For worker threads."""
    results: list[OSError | None] = []
    at = 0
    while at < len(writes):
        group = _adjacent(writes, at)
        first = writes[at]
        flags = os.RWF_DSYNC if first.durable else 0
        try:
            _pwritev_exactly(first.run, [write.data for write in group], flags)
            results += [None] * len(group)
        except OSError as error:
            # A group fails as a whole: its members were not distinguishable to the disk.
            results += [error] * len(group)
        at += len(group)
    return results


def _adjacent(writes: Sequence[Write], at: int) -> Sequence[Write]:
    """The longest stretch from ``at`` that one pwritev can store."""
    first = writes[at]
    position = first.run.position + first.run.length
    end = at + 1
    while end < len(writes) and end - at < MAX_VIEWS:
        write = writes[end]
        if write.run.fd != first.run.fd or write.run.position != position:
            break
        if write.durable != first.durable:
            break
        position += write.run.length
        end += 1
    return writes[at:end]


def _pwritev_exactly(run: FileRun, views: list[memoryview], flags: int) -> None:
    position = run.position
    while views:
        count = os.pwritev(run.fd, views, position, flags)
        position += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
