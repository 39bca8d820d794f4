"""What is due to be sent on one connection of ours.

::

    post(header, data) ──> |header|header|data ......|header| ──> socket   once a turn
                            '-joined-'   as it is

Rule: data is the caller's memory. Whoever takes it back early says so: what is left is then copied.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from nbdsrv.disk.watch import Watch
from nbdsrv.net.channel import Channel

__all__ = ["Outbox"]

SMALL = 1 << 12
"""Bytes of a piece below which it is joined with its neighbours rather than sent on its own."""
MAX_JOINED = 1 << 16
"""Bytes joined at a time."""


class Outbox:
    """Sends in order, when the socket takes it. Belongs to one event loop.

    Attributes:
        watch: says when a turn is over.
    """

    def __init__(self, channel: Channel, broken: Callable[[OSError], None], watch: Watch) -> None:
        """``broken`` is called when the socket is."""
        self.watch = watch
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._broken = broken
        self._pieces: deque[memoryview] = deque()
        self._due = False
        self._blocked = False
        self._closed = False

    def post(self, header: bytes, data: memoryview | None) -> None:
        """Queue; all that is queued in this turn leaves together."""
        self._pieces.append(memoryview(header))
        if data is not None:
            self._pieces.append(data)
        if not self._due and not self._blocked:
            self._due = True
            self.watch.soon(self._flush)

    def copy(self, data: memoryview) -> None:
        """The owner of ``data`` takes it back."""
        owner = data.obj
        for at, piece in enumerate(self._pieces):
            if piece.obj is owner:
                self._pieces[at] = memoryview(bytes(piece))

    def send(self) -> bool:
        """Send what the socket takes now; False if something is left."""
        pieces = self._pieces
        while pieces:
            piece = self._joined() if len(pieces[0]) < SMALL else pieces.popleft()
            count = self._channel.send(piece, more=bool(pieces))
            if count < len(piece):
                pieces.appendleft(piece[count:])
                return False
        return True

    def close(self) -> None:
        """Forget everything; before the channel is closed."""
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._channel.fileno())
            self._pieces.clear()

    def _flush(self) -> None:
        self._due = False
        if self._closed:
            return
        try:
            done = self.send()
        except OSError as error:
            self._broken(error)
            return
        if done and self._blocked:
            self._loop.remove_writer(self._channel.fileno())
        elif not done and not self._blocked:
            self._loop.add_writer(self._channel.fileno(), self._flush)
        self._blocked = not done

    def _joined(self) -> memoryview:
        """The small pieces at the head as one."""
        pieces = self._pieces
        first = pieces.popleft()
        if not pieces or len(pieces[0]) >= SMALL:
            return first
        joined = bytearray(first)
        while pieces and len(pieces[0]) < SMALL and len(joined) < MAX_JOINED:
            joined += pieces.popleft()
        return memoryview(joined)
