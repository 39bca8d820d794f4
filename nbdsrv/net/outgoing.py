"""What a client is still to be sent.

::

    [ bytes | view of a borrowed buffer | range of a file + tail ] ... in order

Normally empty: replies go straight from the arena to the socket. Only what the socket did not
take waits here, with whatever memory it lives in, until the client reads on; its owner reads no
further requests meanwhile, so a client that never reads holds one arena at most.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from nbdsrv.disk.residency import Residency
from nbdsrv.net.buffers import Buffer, Buffers
from nbdsrv.net.channel import Channel, PlainChannel, TlsChannel
from protocol.constants import Errno
from protocol.replies import ChunkEncoder

__all__ = ["FilePart", "Outgoing", "PromiseBrokenError"]

ZEROES = bytes(1 << 16)
GATHERED = 64
"""Pieces sent with one system call."""
FRESH = 0.05
"""Seconds for which pages found in memory are taken to have stayed there."""


class PromiseBrokenError(ConnectionError):
    """A reply's length was announced, the data could not follow, and the dialect has no remedy."""


@dataclass(slots=True)
class FilePart:
    """``length`` bytes of a file that were promised to the client in reply to ``cookie``.

    Attributes:
        residency: how warm the file is.
        checked: when the range was last known to be in memory (``monotonic``).
        encoder: ends the reply; None if it was announced as complete, or is a simple one.
        at: the request's own offset.
        name: what the file is called in messages.
    """

    fd: int
    position: int
    length: int
    residency: Residency
    checked: float
    encoder: ChunkEncoder | None
    cookie: int
    at: int
    name: str

    def tail(self) -> bytes:
        """What ends the reply when all went well."""
        if self.encoder is None:
            return b""
        return self.encoder.done(self.cookie, self.at)

    def apology(self) -> bytes:
        """What ends it, after padding, when the file turned out too short."""
        if self.encoder is None:
            raise PromiseBrokenError(f"{self.name} was truncated in the middle of a reply")
        text = f"{self.name} was truncated"
        return self.encoder.error(self.cookie, self.at, Errno.EIO, text)


Part = tuple[memoryview | bytes, Buffer | None] | FilePart


class Outgoing:
    """The queue of one client. Belongs to the loop.

    Attributes:
        parts: the queue itself; others only ask whether it is empty.
        sent: bytes that have left from here, to tell a slow reader from one that has stopped.
    """

    def __init__(
        self, channel: Channel, buffers: Buffers, warm: Callable[[FilePart], None]
    ) -> None:
        """``warm`` has a range read into memory elsewhere, then calls ``warmed``."""
        self._channel = channel
        self._buffers = buffers
        self._warm = warm
        self._warming = False
        self.sent = 0
        self.parts: deque[Part] = deque()

    def add(self, data: memoryview | bytes, owner: Buffer | None = None) -> None:
        """Queue ``data``; ``owner`` is released once it has been sent."""
        self.parts.append((data, owner))

    def add_first(self, data: bytes) -> None:
        """Queue the rest of something that has been sent in part already."""
        self.parts.appendleft((data, None))

    def add_file(self, part: FilePart) -> None:
        """Queue a range of a file."""
        self.parts.append(part)

    def flush(self) -> bool:
        """Send what the socket takes; True when nothing is left.

        Raises:
            ConnectionError: the peer is gone, or must be left.
        """
        parts = self.parts
        while parts and not self._warming:
            part = parts[0]
            if isinstance(part, FilePart):
                sent = self._send_file(part)
            elif len(parts) > 1 and isinstance(self._channel, PlainChannel):
                sent = self._send_several(self._channel)
            else:
                sent = self._send(*part)
            if not sent:
                return False
        return not parts

    def warmed(self) -> None:
        """The range given to ``warm`` is in memory, or cannot be read at all."""
        self._warming = False
        if self.parts and isinstance(part := self.parts[0], FilePart):
            part.checked = monotonic()

    @property
    def blocked(self) -> bool:
        """Is it the client's turn to read? (Otherwise nothing is left, or a file is warming.)"""
        return bool(self.parts) and not self._warming

    def drop(self) -> None:
        """Forget everything, releasing the buffers."""
        while self.parts:
            part = self.parts.popleft()
            if not isinstance(part, FilePart) and part[1] is not None:
                self._buffers.release(part[1])

    def _send(self, data: memoryview | bytes, owner: Buffer | None) -> bool:
        count = self._channel.send(data)
        self.sent += count
        if count < len(data):
            if count:
                self.parts[0] = (memoryview(data)[count:], owner)
            return False
        self.parts.popleft()
        if owner is not None:
            self._buffers.release(owner)
        return True

    def _send_several(self, channel: PlainChannel) -> bool:
        """A header with its data, many small replies: with one system call."""
        parts = self.parts
        views: list[memoryview | bytes] = []
        for part in parts:
            if isinstance(part, FilePart) or len(views) == GATHERED:
                break
            views.append(part[0])
        left = channel.send_several(views)
        self.sent += left
        if not left:
            return False
        for view in views:
            part = parts[0]
            assert not isinstance(part, FilePart)
            if left < len(view):
                parts[0] = (memoryview(view)[left:], part[1])
                return False
            left -= len(view)
            parts.popleft()
            if part[1] is not None:
                self._buffers.release(part[1])
        return True

    def _send_file(self, part: FilePart) -> bool:
        channel = self._channel
        assert not isinstance(channel, TlsChannel)
        if monotonic() - part.checked > FRESH:
            if not part.residency.resident(part.fd, part.position, part.length):
                self._warming = True
                self._warm(part)
                return False
            part.checked = monotonic()
        while part.length:
            count = channel.send_file(part.fd, part.position, part.length)
            if count is None:
                return False
            if not count:
                self._break_promise(part)
                return True
            part.position += count
            part.length -= count
            self.sent += count
        self.parts.popleft()
        if tail := part.tail():
            self.parts.appendleft((tail, None))
        return True

    def _break_promise(self, part: FilePart) -> None:
        """The file is shorter than it was a moment ago: pad what was announced, then say so."""
        apology = part.apology()
        self.parts.popleft()
        self.parts.appendleft((apology, None))
        for _ in range(part.length // len(ZEROES)):
            self.parts.appendleft((ZEROES, None))
        rest = part.length % len(ZEROES)
        if rest:
            self.parts.appendleft((ZEROES[:rest], None))
