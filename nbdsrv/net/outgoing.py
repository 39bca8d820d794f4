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

from nbdsrv.disk.residency import resident
from nbdsrv.net.buffers import Buffer, Buffers
from nbdsrv.net.channel import Channel, TlsChannel

__all__ = ["FilePart", "Outgoing", "PromiseBrokenError"]

ZEROES = bytes(1 << 16)
FRESH = 0.05
"""Seconds for which pages found in memory are taken to have stayed there."""


class PromiseBrokenError(ConnectionError):
    """A reply's length was announced, the data could not follow, and the dialect has no remedy."""


@dataclass(slots=True)
class FilePart:
    """``length`` bytes of a file that were promised to the client.

    Attributes:
        inline: flags for reading it without blocking (see ``FileRun``).
        checked: when it was last known to be in memory (``monotonic``).
        tail: what ends the reply when all went well.
        apology: what ends it, after padding, when the file turned out too short; None if the
            dialect has no way to say so.
    """

    fd: int
    position: int
    length: int
    inline: int
    checked: float
    tail: bytes
    apology: bytes | None


Part = tuple[memoryview | bytes, Buffer | None] | FilePart


class Outgoing:
    """The queue of one client. Belongs to the loop."""

    def __init__(
        self, channel: Channel, buffers: Buffers, warm: Callable[[FilePart], None]
    ) -> None:
        """``warm`` has a range read into memory elsewhere, then calls ``warmed``."""
        self._channel = channel
        self._buffers = buffers
        self._warm = warm
        self._warming = False
        self._parts: deque[Part] = deque()

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, data: memoryview | bytes, owner: Buffer | None = None) -> None:
        """Queue ``data``; ``owner`` is released once it has been sent."""
        self._parts.append((data, owner))

    def add_file(self, part: FilePart) -> None:
        """Queue a range of a file."""
        self._parts.append(part)

    def send_now(self, part: FilePart) -> bool:
        """Send a range of a file, nothing else being due; True if all but its tail is out.

        Otherwise the rest, tail included, is queued.
        """
        channel = self._channel
        assert not isinstance(channel, TlsChannel)
        while part.length:
            count = channel.send_file(part.fd, part.position, part.length)
            if not count:
                self._parts.append(part)
                if count is not None:
                    self.flush()
                return False
            part.position += count
            part.length -= count
        return True

    def flush(self) -> bool:
        """Send what the socket takes; True when nothing is left.

        Raises:
            ConnectionError: the peer is gone, or must be left.
        """
        parts = self._parts
        while parts and not self._warming:
            part = parts[0]
            sent = self._send_file(part) if isinstance(part, FilePart) else self._send(*part)
            if not sent:
                return False
        return not parts

    def warmed(self) -> None:
        """The range given to ``warm`` is in memory, or cannot be read at all."""
        self._warming = False
        if self._parts and isinstance(part := self._parts[0], FilePart):
            part.checked = monotonic()

    @property
    def blocked(self) -> bool:
        """Is it the client's turn to read? (Otherwise nothing is left, or a file is warming.)"""
        return bool(self._parts) and not self._warming

    def drop(self) -> None:
        """Forget everything, releasing the buffers."""
        while self._parts:
            part = self._parts.popleft()
            if not isinstance(part, FilePart) and part[1] is not None:
                self._buffers.release(part[1])

    def _send(self, data: memoryview | bytes, owner: Buffer | None) -> bool:
        count = self._channel.send(data)
        if count < len(data):
            if count:
                self._parts[0] = (memoryview(data)[count:], owner)
            return False
        self._parts.popleft()
        if owner is not None:
            self._buffers.release(owner)
        return True

    def _send_file(self, part: FilePart) -> bool:
        channel = self._channel
        assert not isinstance(channel, TlsChannel)
        if monotonic() - part.checked > FRESH:
            if not resident(part.fd, part.position, part.length, part.inline):
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
        self._parts.popleft()
        if part.tail:
            self._parts.appendleft((part.tail, None))
        return True

    def _break_promise(self, part: FilePart) -> None:
        """The file is shorter than it was a moment ago: pad what was announced, then say so."""
        if part.apology is None:
            raise PromiseBrokenError("the image was truncated in the middle of a reply")
        self._parts.popleft()
        self._parts.appendleft((part.apology, None))
        for _ in range(part.length // len(ZEROES)):
            self._parts.appendleft((ZEROES, None))
        rest = part.length % len(ZEROES)
        if rest:
            self._parts.appendleft((ZEROES[:rest], None))
