"""One connection to one NBD server, in transmission: many requests in flight, answers in any order.

::

    read() write() ... ── _ask ──> Outbox ──> socket
          ^                                     |
          └── InFlight, by cookie <─ _take <── _readable
                    |                            header: into scratch
                    └── caller's buffer <─────── data: straight from the socket

The wire is ``protocol.connection``'s; this moves its bytes.

Rule: a buffer is touched only while its caller waits. A caller that is cancelled leaves at once:
what still arrives for it is received into scratch, what is still to be sent of its data is copied.
"""

import asyncio
import contextlib
import errno as os_errno
import logging
import os
import select
from collections.abc import Callable, Collection
from functools import partial

from nbdsrv.disk.watch import LoopWatch, Watch
from nbdsrv.errors import DiskError
from nbdsrv.net.channel import Channel
from nbdsrv.net.client_flight import InFlight
from nbdsrv.net.client_outbox import Outbox
from nbdsrv.net.client_pending import ConnectionLost, Pending, Statuses
from protocol.answers import Answer, Data, Done, Failed, Hole, Status
from protocol.connection import ClientConnection
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.incoming import Payload
from protocol.terms import Negotiated

__all__ = ["Client", "ConnectionLost"]

log = logging.getLogger(__name__)

SCRATCH = 1 << 16
"""Bytes received at a time where headers and small answers come."""
HEADER_WINDOW = 256
"""The same while large answers are due: little of them is then copied."""
DIRECT = 1 << 12
"""Bytes of a chunk still to come that are worth a system call of their own."""
RECEIVES = 32
"""System calls before others have their turn."""
FAREWELL_S = 1.0
"""Seconds that answers nobody waits for are waited for when closing: some servers take a
connection reset badly."""


class Client:
    """A connection. Belongs to one event loop; its methods may run concurrently.

    All raise DiskError with the server's errno and words when it refuses, ConnectionLost when the
    connection dies first. Any may be cancelled; the request is then carried out or not.

    Attributes:
        terms: what the handshake agreed on.
        name: the URI, for messages.
        lost: why the connection is dead, or None.
        unflushed: for its user: has it carried changes no flush has covered?
        on_lost: called once when it dies, not when it is closed.
        on_closed: called once when its socket is closed, for whatever reason.
    """

    def __init__(self, channel: Channel, terms: Negotiated, name: str, *, request_s: float) -> None:
        """Becomes the owner of the channel, whose handshake is complete."""
        self.terms = terms
        self.name = name
        self.lost: str | None = None
        self.unflushed = False
        self.on_lost: Callable[[], None] = lambda: None
        self.on_closed: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._connection = ClientConnection(terms)
        self._request_s = request_s
        self._flight = InFlight(request_s, self._overdue)
        self._watch: Watch = LoopWatch()
        self._outbox = Outbox(channel, self._broken, self._watch)
        self._closed = False
        self._scratch = memoryview(bytearray(SCRATCH))
        self._watch.add(channel.fileno(), self, select.EPOLLIN)

    def watch_by(self, watch: Watch) -> None:
        """Let ``watch``, of the same event loop, tell of answers from now on."""
        fd = self._channel.fileno()
        if watch is self._watch or self.lost is not None or fd < 0:
            return
        self._watch.remove(fd)
        self._watch = self._outbox.watch = watch
        watch.add(fd, self, select.EPOLLIN)
        if self._channel.pending():
            watch.soon(self.resume)

    @property
    def load(self) -> int:
        """Requests that have no answer yet."""
        return self._flight.load

    @property
    def usable(self) -> bool:
        """May requests still be sent?"""
        return self.lost is None and not self._closed and not self._connection.leaving

    # --- requests ------------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, at most ``terms.blocks.maximum`` bytes."""
        length = len(buffer)
        pending = self._pend("reading", offset, length)
        pending.buffer = buffer
        await self._ask(pending, length, partial(self._connection.read, offset, length))

    def start_read(self, offset: int, buffer: memoryview) -> Pending | None:
        """The same, only begun: ``await self.answer(...)`` or ``abandon`` it.

        Returns None, and does nothing, if it would have to wait for others' answers.
        """
        length = len(buffer)
        if self._full(length):
            return None
        pending = self._pend("reading", offset, length)
        pending.buffer = buffer
        self._send(pending, length, partial(self._connection.read, offset, length))
        return pending

    def begin_read(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        """The same for nobody who waits: ``done`` is called once, by the loop, never from within,
        with whether ``buffer`` is filled. What was the matter if not, ``read`` tells.

        Returns False, and does nothing, if it would have to wait or cannot be asked for.
        """
        length = len(buffer)
        if self.lost is not None or self._closed or self._full(length):
            return False
        try:
            cookie, header = self._connection.read(offset, length)
        except LocalProtocolError:
            return False
        pending = Pending("reading", offset, length, None, done)
        pending.buffer = buffer
        self._sent(cookie, header, pending, length)
        return True

    async def answer(self, pending: Pending) -> None:
        """The end of a request's answer. Raises what the request does; may be cancelled."""
        assert pending.answered is not None
        try:
            await pending.answered
        except asyncio.CancelledError:
            self.abandon(pending)
            raise

    async def write(self, offset: int, data: memoryview) -> None:
        """Store ``data``, at most ``terms.blocks.maximum`` bytes."""
        length = len(data)
        pending = self._pend("writing", offset, length)
        pending.data = data
        await self._ask(pending, length, partial(self._connection.write, offset, length))

    async def flush(self) -> None:
        """All writes that have been answered are durable."""
        await self._ask(self._pend("flushing", 0, 0), 0, self._connection.flush)

    async def trim(self, offset: int, length: int) -> None:
        """The range is no longer needed."""
        make = partial(self._connection.trim, offset, length)
        await self._ask(self._pend("trimming", offset, length), 0, make)

    async def cache(self, offset: int, length: int) -> None:
        """The range will be read soon."""
        make = partial(self._connection.cache, offset, length)
        await self._ask(self._pend("caching", offset, length), 0, make)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool) -> None:
        """Make the range read as zeroes."""
        wishes = {"no_hole": no_hole, "fast": fast}
        make = partial(self._connection.write_zeroes, offset, length, **wishes)
        await self._ask(self._pend("zeroing", offset, length), 0, make)

    async def block_status(
        self, offset: int, length: int, contexts: Collection[int] | None = None
    ) -> Statuses:
        """(length, flags) pairs from ``offset`` on by context id; may end early or late."""
        pending = self._pend("mapping", offset, length)
        make = partial(self._connection.block_status, offset, length, contexts=contexts)
        await self._ask(pending, 0, make)
        return pending.statuses

    def _pend(self, verb: str, offset: int, length: int) -> Pending:
        return Pending(verb, offset, length, self._loop.create_future())

    async def _ask(
        self, pending: Pending, moved: int, make: Callable[[], tuple[int, bytes]]
    ) -> None:
        """Send one request and wait for the end of its answer."""
        while self._full(moved):
            await self._flight.room()
        self._send(pending, moved, make)
        await self.answer(pending)

    def _send(self, pending: Pending, moved: int, make: Callable[[], tuple[int, bytes]]) -> None:
        cookie, header = self._made(pending, make)
        self._sent(cookie, header, pending, moved)

    def _sent(self, cookie: int, header: bytes, pending: Pending, moved: int) -> None:
        self._flight.add(cookie, pending, moved)
        self._outbox.post(header, pending.data)

    def _made(self, pending: Pending, make: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
        if self._closed:
            raise DiskError(f"{self.name} is closed", os_errno.EBADF, pending.offset)
        if self.lost is not None:
            raise ConnectionLost(self.lost, os_errno.ECONNRESET, pending.offset)
        try:
            return make()
        except LocalProtocolError as error:
            text = f"{self.name}: {error}"
            if self._connection.leaving:
                raise ConnectionLost(text, os_errno.ESHUTDOWN, pending.offset) from error
            raise DiskError(text, os_errno.EINVAL, pending.offset) from error

    def _full(self, moved: int) -> bool:
        return self._flight.is_full(moved) and self.usable

    def abandon(self, pending: Pending) -> None:
        """Whoever asked has gone and takes its memory along."""
        pending.buffer = None
        if pending.data is not None:
            self._outbox.copy(pending.data)
        if pending.answered is None:
            return
        if pending.answered.done() and not pending.answered.cancelled():
            pending.answered.exception()  # seen: nobody wants it any more
        else:
            pending.answered.cancel()

    def _overdue(self, pending: Pending) -> None:
        text = f"no answer within {self._request_s:g} s ({pending.what})"
        self._lose(text, os_errno.ETIMEDOUT)

    # --- receiving -----------------------------------------------------------------------

    def on_events(self, events: int) -> None:
        """For ``Watch``: there is something to receive, or nothing will ever come again."""
        del events
        try:
            self._readable()
        except Exception as error:  # whoever watches has others to tell
            log.exception("client.bug")
            self._lose(f"a fault of nbdsrv: {error}", os_errno.EIO)

    def resume(self) -> None:
        """For ``Watch``: go on."""
        self.on_events(0)

    def _readable(self) -> None:
        try:
            for _ in range(RECEIVES):
                if not self._receive():
                    return
        except RemoteProtocolError as error:
            for answer in self._connection.salvaged:
                self._take(answer)
            self._lose(str(error), os_errno.EPROTO)
        except OSError as error:
            self._broken(error)
        else:
            if (
                self.lost is None and self._channel.pending()
            ):  # of which polling the socket knows nothing
                self._watch.soon(self.resume)

    def _receive(self) -> bool:
        """One system call's worth; False if there is nothing more now.

        A stream that gives less than it was asked for is empty: no call to hear that.
        """
        if self.lost is not None or self._channel.fileno() < 0:
            return False
        payload = self._connection.payload
        if payload is not None and payload.length >= DIRECT:
            return self._receive_payload(payload)
        view = self._scratch
        if self._flight.bulky:
            view = view[: HEADER_WINDOW + (payload.length if payload is not None else 0)]
        count = self._channel.receive_into(view)
        if not count:
            return self._nothing(count)
        for answer in self._connection.receive_data(view[:count]):
            self._take(answer)
        return count == len(view)

    def _receive_payload(self, payload: Payload) -> bool:
        pending = self._flight[payload.cookie]
        if pending.buffer is None:
            view = self._scratch[: payload.length]
        else:
            at = payload.offset - pending.offset
            view = pending.buffer[at : at + payload.length]
        count = self._channel.receive_into(view)
        if not count:
            return self._nothing(count)
        pending.arrived(payload.offset, count)
        for answer in self._connection.payload_received(count):
            self._take(answer)
        return count == len(view)

    def _nothing(self, count: int | None) -> bool:
        if count is not None:
            self._connection.eof()
            self._lose("the server closed the connection", os_errno.ECONNRESET)
        return False

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, Done):
            self._flight.done(answer.cookie).settle(self.name, answer.failure)
            return
        pending = self._flight[answer.cookie]
        if isinstance(answer, Data):
            pending.take(answer.offset, answer.data)
        elif isinstance(answer, Hole):
            pending.take_zeroes(answer.offset, answer.length)
        elif isinstance(answer, Status):
            pending.statuses[answer.context_id] = answer.extents
        elif isinstance(answer, Failed):
            pending.fail(answer)

    # --- the end -------------------------------------------------------------------------

    def _broken(self, error: OSError) -> None:
        reason = os.strerror(error.errno) if error.errno else str(error)
        self._lose(reason, error.errno or os_errno.ECONNRESET)

    def _lose(self, why: str, errno: int) -> None:
        """The connection is dead: so is every request on it."""
        if self.lost is not None:
            return
        self.lost = f"{self.name}: {why}"
        self._release()
        self._flight.lose(self.lost, errno)
        if not self._closed:
            self.on_lost()

    def _release(self) -> None:
        fd = self._channel.fileno()
        if fd >= 0:
            self._watch.remove(fd)
            self._outbox.close()
            self._channel.close()
        self.on_closed()

    async def finish(self) -> None:
        """Wait until everything that was asked has been answered or has failed."""
        await self._flight.finish()

    async def close(self) -> None:
        """Say goodbye and close; who still waits for an answer gets an error. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for pending in self._flight:
            pending.lose(f"{self.name} was closed", os_errno.EBADF)
            self.abandon(pending)
        self._flight.wake_all()
        try:
            if self._flight:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await self._flight.answered()
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        if self.lost is not None:
            return
        with contextlib.suppress(ProtocolError, OSError):
            self._outbox.post(self._connection.disconnect(), None)
            self._outbox.send()
        self._lose("closed", os_errno.EBADF)
