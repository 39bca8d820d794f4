"""A request of ours that awaits its answer, and where the answer goes.

::

    Data, Hole  ──> buffer      the caller's own; None once the caller has gone
    Status      ──> statuses
    Failed      ──> bad         the lowest offset anything failed at
    Done        ──> settle()    wakes the caller, or calls it
"""

import asyncio
import logging
import os
from collections.abc import Callable

from nbdsrv.errors import DiskError
from protocol.answers import Failed
from protocol.constants import Errno

__all__ = ["ConnectionLost", "Pending"]

log = logging.getLogger(__name__)

ZEROES = bytes(1 << 16)

Statuses = dict[int, tuple[tuple[int, int], ...]]


class ConnectionLost(DiskError):
    """The connection died before the answer came: whether the request was carried out is unknown.

    For a read: another connection may be asked.
    """


class Pending:
    """One request in flight.

    Attributes:
        verb: for messages.
        offset: bytes, where the request begins.
        length: bytes.
        answered: done when the answer is complete; of a request that somebody waits for.
        expires: when the answer is overdue, on the loop's clock.
        moved: bytes it counts for while it is in flight.
        buffer: what a READ fills, as long as somebody waits for it.
        data: what a WRITE sends.
        good: everything before this offset has arrived.
        bad: the lowest offset the server named an error for.
        statuses: extents by context id.
    """

    __slots__ = (
        *("_done", "answered", "bad", "buffer", "data", "expires", "good", "length", "moved"),
        *("offset", "statuses", "verb"),
    )

    def __init__(
        self,
        verb: str,
        offset: int,
        length: int,
        answered: "asyncio.Future[None] | None",
        done: Callable[[bool], None] | None = None,
    ) -> None:
        """``done`` in place of ``answered``: called once with whether all went well."""
        self.verb = verb
        self.offset = offset
        self.length = length
        self.answered = answered
        self.expires = 0.0
        self.moved = 0
        self.buffer: memoryview | None = None
        self.data: memoryview | None = None
        self.good = offset
        self.bad: int | None = None
        self.statuses: Statuses = {}
        self._done = done

    @property
    def what(self) -> str:
        """For messages."""
        return f"{self.verb} {self.length} bytes at {self.offset}" if self.length else self.verb

    def take(self, offset: int, data: memoryview) -> None:
        """Bytes of the answer; the protocol has checked that they are within the request."""
        length = len(data)
        if self.buffer is not None:
            at = offset - self.offset
            self.buffer[at : at + length] = data
        self.arrived(offset, length)

    def take_zeroes(self, offset: int, length: int) -> None:
        """The same for a hole."""
        if self.buffer is not None:
            at = offset - self.offset
            end = at + length
            while at < end:
                count = min(len(ZEROES), end - at)
                self.buffer[at : at + count] = ZEROES[:count]
                at += count
        self.arrived(offset, length)

    def arrived(self, offset: int, length: int) -> None:
        """Bytes are in the buffer. What comes out of order counts for nothing if there is an error
        later; servers send in order.
        """
        if offset == self.good:
            self.good += length

    def fail(self, failure: Failed) -> None:
        """An error chunk with a place in it."""
        if failure.offset is not None:
            self.bad = failure.offset if self.bad is None else min(self.bad, failure.offset)

    def settle(self, name: str, failure: Failed | None) -> None:
        """The answer is complete."""
        if self.answered is None:
            self._call(good=failure is None)
        elif self.answered.done():
            return  # nobody waits any more
        elif failure is None:
            self.answered.set_result(None)
        else:
            self.answered.set_exception(self._error(name, failure))

    def lose(self, text: str, errno: int) -> None:
        """There will be no answer."""
        if self.answered is None:
            self._call(good=False)
        elif not self.answered.done():
            self.answered.set_exception(ConnectionLost(text, errno, self.offset))

    def _call(self, *, good: bool) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        try:
            done(good)
        except Exception:
            # A mistake made by one who reads is not to be felt by the others on this connection.
            log.exception("client.bug in the answer to %s", self.what)

    def _error(self, name: str, failure: Failed) -> DiskError:
        """What the server said, with how far the data is good if it is known at all."""
        offset = self.offset
        if self.bad is not None and self.buffer is not None:
            offset = min(self.good, self.bad)
        number = int(failure.errno)
        text = f"{name}: {self.what}: the server says: {failure.text or os.strerror(number)}"
        if failure.errno is Errno.ESHUTDOWN:
            return ConnectionLost(text, number, offset)
        return DiskError(text, number, offset)
