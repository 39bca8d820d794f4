r"""Writes that go where they say: collected during a turn, stored by one thread in one go.

::

    loop      WRITE WRITE ... WRITE    payloads stay where they were received
                 \____ batch ____/
    thread    pwrite each (adjacent ones together, RWF_DSYNC for FUA), reply,
              receive the next writes, ... : a *streak*
    loop      goes on with whatever came that was not such a write

A hand-over between loop and thread costs more than a 4 KiB write. So the thread that stores a batch
keeps the connection for as long as nothing but plain writes arrives, and at most ``STREAK_S``.

Rule: while a connection is lent, only its thread touches the socket and this object; the loop
neither polls nor sends. Reads, flushes and all the rest end the streak and return to the loop.
"""

import errno as os_errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.flights import Landing
from nbdsrv.errors import DiskError
from nbdsrv.net.buffers import Buffer
from nbdsrv.net.channel import Channel
from nbdsrv.net.measures import Measures
from nbdsrv.net.reactor import RECEIVE_SIZE, Reactor
from protocol.constants import Command, Dialect
from protocol.headers import EXTENDED_REQUEST, EXTENDED_WRITE_KEY, REQUEST, WRITE_KEY
from protocol.replies import ChunkEncoder, SimpleEncoder, wire_errno
from protocol.requests import Request

__all__ = ["Streak", "Writes", "store"]

log = logging.getLogger(__name__)

MAX_VIEWS = 512
"""Buffers in one pwritev; the kernel's IOV_MAX is 1024."""
LONG = 1 << 16
"""Bytes of a request from which moving it costs more than receiving it apart from the next."""
STREAK_S = 0.02
"""Seconds a thread keeps a connection; other clients may be waiting for a thread."""
SPIN_S = 0.00005
"""Seconds it looks for the next write before it gives the connection back."""

NO_WINDOW = (0, 0, -1, 0, 0)

Write = tuple[int, int, int, int, memoryview, bool]
"""cookie, disk offset, file descriptor, file position, data, FUA."""


@dataclass(slots=True)
class Streak:
    """What a thread gives back with the connection.

    Attributes:
        unsent: replies the socket did not take.
        torn: some of them have been sent: the rest comes before all else.
        left: received bytes that begin with something else than a plain write.
        end_of_stream: the client has sent its last byte.
    """

    unsent: bytes = b""
    torn: bool = False
    left: bytes = b""
    end_of_stream: bool = False


class Writes:
    """One client's overwrites.

    Attributes:
        lent: a thread has the connection.
        recalled: set it to have the connection back soon.
        received: bytes threads took from the socket.
        sent: bytes they gave to it.
        stored: writes carried out.
    """

    def __init__(
        self,
        disk: Disk,
        reactor: Reactor,
        channel: Channel,
        encoder: SimpleEncoder | ChunkEncoder,
        dialect: Dialect,
        returned: Callable[[Streak | None, BaseException | None], None],
        failed: Callable[[Request, DiskError], None],
        measures: Measures,
    ) -> None:
        """``returned`` is called on the loop when a thread is done with the connection, and before
        that ``failed`` with every write that the disk has not taken.
        """
        self._disk = disk
        self._reactor = reactor
        self._channel = channel
        self._encoder = encoder
        self._returned = returned
        self._failed = failed
        extended = dialect is Dialect.EXTENDED
        self._frame = EXTENDED_REQUEST if extended else REQUEST
        self._key = EXTENDED_WRITE_KEY if extended else WRITE_KEY
        self._window = NO_WINDOW
        self._landing = disk.landing
        self._clock: Disk | Landing = disk.landing or disk
        self._epoch = self._clock.epoch
        self._writes: list[Write] = []
        self._owners: list[Buffer] = []
        self.lent = False
        self.recalled = False
        self._mute = False
        self._ticket = 0
        self._measures = measures
        self._lent_at = 0.0
        self._waits: list[tuple[float, int]] = []
        self._failures: list[tuple[Request, DiskError]] = []
        self.received = 0
        self.sent = 0
        self.stored = 0

    @property
    def header_size(self) -> int:
        """Bytes of a request in front of its payload."""
        return self._frame.size

    @property
    def pending(self) -> bool:
        """Has anything been collected?"""
        return bool(self._writes)

    def serve(self, rx: memoryview, at: int, end: int) -> int:
        """Take plain writes within the window from ``rx[at:]`` whose payloads are complete.

        Returns:
            Where it stopped, at the first request that is anything else.
        """
        if self._epoch != self._clock.epoch:
            self._epoch = self._clock.epoch
            self._window = NO_WINDOW
        start, stop, fd, shift, mask = self._window
        unpack_from, size, write_key = self._frame.unpack_from, self._frame.size, self._key
        append = self._writes.append
        while end - at >= size:
            key, cookie, offset, length = unpack_from(rx, at)
            data = at + size
            after = data + length
            if key != write_key or after > end or not length:
                break
            if offset < start or offset + length > stop or (mask and (offset | length) & mask):
                break
            append((cookie, offset, fd, offset + shift, rx[data:after], False))
            at = after
        return at

    def place(self, offset: int, length: int) -> bool:
        """May this write be ``add``-ed? Otherwise only ``Disk.write`` will do."""
        start, stop, _, _, mask = self._window
        inside = start <= offset and offset + length <= stop and not (offset | length) & mask
        if inside and self._epoch == self._clock.epoch:
            return True
        landing = self._landing
        if landing is not None and not (offset | length) & (landing.unit - 1):
            placed = landing.place(offset, length)
            if placed is not None:
                start, run = placed
                self._epoch = landing.epoch
                shift = run.position - start
                self._window = (start, start + run.length, run.fd, shift, landing.unit - 1)
                return True
        found = self._disk.place(offset, length)
        if found is None:
            return False
        self._epoch = self._clock.epoch
        self._window = (offset, offset + found.length, found.fd, found.position - offset, 0)
        return True

    def add(
        self, cookie: int, offset: int, data: memoryview, owner: Buffer | None, *, durable: bool
    ) -> None:
        """One write more. Without ``owner`` its data lies in the reactor's receive buffer."""
        _, _, fd, shift, _ = self._window
        self._writes.append((cookie, offset, fd, offset + shift, data, durable))
        if owner is not None:
            self._owners.append(owner)

    def lend(self, at: int, end: int, *, alone: bool, mute: bool) -> None:
        """Have a thread store what was collected, and go on with the connection.

        Args:
            at: where in the reactor's receive buffer the bytes not yet looked at begin,
            end: and where they end.
            alone: receive nothing: the loop already has bytes that come next.
            mute: send nothing either: something else has been sent in part.
        """
        reactor = self._reactor
        buffer = reactor.receive
        reactor.renew_receive()
        self._owners.append(buffer)
        self.lent = True
        self.recalled = alone or mute
        self._mute = mute
        self._lent_at = perf_counter()
        if self._landing is not None:
            self._ticket = self._landing.begin()
        reactor.remove(self._channel.fileno())
        reactor.workers.submit(self._streak, buffer.data, at, end, done=self._done)

    def drop(self) -> None:
        """Forget what was collected: the client is gone."""
        self._writes.clear()
        for owner in self._owners:
            self._reactor.buffers.release(owner)
        self._owners.clear()

    def _done(self, streak: Streak | None, error: BaseException | None) -> None:
        self.lent = False
        if self._landing is not None:
            self._landing.end(self._ticket)
        self.drop()
        for wait in self._waits:  # here: the export's measures belong to the loop
            self._measures.writes.add(*wait)
        self._waits.clear()
        for failure in self._failures:  # so do they, and the log's count of what it was told
            self._failed(*failure)
        self._failures.clear()
        self._returned(streak, error)

    # --- in a thread ------------------------------------------------------

    def _streak(self, rx: memoryview, at: int, end: int) -> Streak:
        """Store, reply, receive, until something else than a plain write has come."""
        send, ends, began = self._channel.send, perf_counter() + STREAK_S, self._lent_at
        while True:
            count = len(self._writes)
            replies = self._store()
            sent = 0 if self._mute else send(replies)
            self.stored += count
            self.sent += sent
            now = perf_counter()
            self._waits.append((now - began, count))
            streak = Streak(unsent=replies[sent:], torn=sent > 0)
            if not streak.unsent and not self.recalled and now < ends:
                at, end = self._receive(rx, at, end, streak)
                began = perf_counter()
                if self._writes:
                    continue
            streak.left = bytes(rx[at:end])
            return streak

    def _receive(self, rx: memoryview, at: int, end: int, streak: Streak) -> tuple[int, int]:
        """Collect writes that begin at ``rx[at:end]`` and go on in the socket.

        Returns:
            Where the bytes not looked at begin and where they end.
        """
        receive_into = self._channel.receive_into
        ends = perf_counter() + SPIN_S
        while True:
            at = self.serve(rx, at, end)
            if self._writes:
                return at, end
            wanted = self._wanted(rx, at, end)
            if not wanted:
                return at, end
            if at + wanted > RECEIVE_SIZE or at == end:
                rx[: end - at] = rx[at:end]
                at, end = 0, end - at
            # Of what follows a long write only the header: the rest would have to be moved.
            room = at + wanted + self._frame.size if wanted > LONG else RECEIVE_SIZE
            while (count := receive_into(rx[end:room])) is None:
                if perf_counter() > ends:
                    return at, end
            if not count:
                streak.end_of_stream = True
                return at, end
            end += count
            self.received += count

    def _wanted(self, rx: memoryview, at: int, end: int) -> int:
        """Bytes of the incomplete plain write that begins ``rx[at:end]``; 0 if it is none."""
        size = self._frame.size
        if end - at < size:
            return size
        key, _, offset, length = self._frame.unpack_from(rx, at)
        start, stop, _, _, mask = self._window
        plain = key == self._key and start <= offset and offset + length <= stop
        plain = plain and not (offset | length) & mask
        return size + length if plain and 0 < length <= RECEIVE_SIZE - size else 0

    def _store(self) -> bytes:
        """Store what was collected; returns all replies."""
        writes = self._writes
        failures = store(writes)
        if self._landing is not None:  # before anybody is told that it is done
            done_well = [w for i, w in enumerate(writes) if i not in failures]
            try:
                self._landing.land([(w[1], len(w[4])) for w in done_well])
            except OSError as error:
                failures = dict.fromkeys(range(len(writes)), error)
        if failures:
            replies = [self._reply(write, failures.get(i)) for i, write in enumerate(writes)]
        else:
            done = self._encoder.done
            replies = [done(write[0], write[1]) for write in writes]
        writes.clear()
        return b"".join(replies)

    def _reply(self, write: Write, failure: OSError | None) -> bytes:
        cookie, offset, _, _, data, _ = write
        if failure is None:
            return self._encoder.done(cookie, offset)
        request = Request(Command.WRITE, 0, cookie, offset, len(data))
        reason = f"{self._disk.name}: {failure.strerror}"
        self._failures.append((request, DiskError(reason, failure.errno or os_errno.EIO)))
        text = f"writing {os.path.basename(self._disk.name)}: {failure.strerror}"
        return self._encoder.error(cookie, offset, wire_errno(failure.errno), text)


def store(writes: Sequence[Write]) -> dict[int, OSError]:
    """Perform ``writes`` in order, blocking. For worker threads.

    Returns:
        The failures by index. Writes stored together fail together: the disk does not say
        which of them it was.
    """
    failures: dict[int, OSError] = {}
    pwrite = os.pwrite
    at, count = 0, len(writes)
    while at < count:
        _, _, fd, position, data, durable = writes[at]
        after = at + 1
        if durable or (after < count and writes[after][3] == position + len(data)):
            after = _adjacent(writes, at)
        try:
            if after > at + 1 or durable or pwrite(fd, data, position) != len(data):
                _store_exactly(writes[at:after])
        except OSError as error:
            failures |= dict.fromkeys(range(at, after), error)
        at = after
    return failures


def _adjacent(writes: Sequence[Write], at: int) -> int:
    """The end of the longest stretch from ``at`` that one pwritev can store."""
    _, _, fd, position, data, durable = writes[at]
    position += len(data)
    end = at + 1
    while end < len(writes) and end - at < MAX_VIEWS:
        _, _, next_fd, next_position, data, next_durable = writes[end]
        if (next_fd, next_position, next_durable) != (fd, position, durable):
            break
        position += len(data)
        end += 1
    return end


def _store_exactly(writes: Sequence[Write]) -> None:
    _, _, fd, position, _, durable = writes[0]
    flags = os.RWF_DSYNC if durable else 0
    views = [write[4] for write in writes]
    while views:
        count = os.pwritev(fd, views, position, flags)
        position += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
