"""How replies leave: built side by side in the arena, sent once, queued only if they must be.

::

    arena  | reply | reply | reply |........|      Outgoing  [what the socket did not take]
           '------- used --------'
"""

from collections.abc import Callable

from nbdsrv.net.channel import Channel, TlsChannel
from nbdsrv.net.outgoing import FilePart, Outgoing
from nbdsrv.net.reactor import ARENA_SIZE, Reactor

__all__ = ["Sender"]


class Sender:
    """One client's way out. The arena is the reactor's: it is empty between turns.

    Attributes:
        used: bytes of the arena that hold replies not sent yet.
        out: what waits for the client to read.
        sent: bytes that went straight to the socket; ``out`` counts its own.
    """

    __slots__ = ("_channel", "_reactor", "out", "sent", "used")

    def __init__(
        self, reactor: Reactor, channel: Channel, warm: Callable[[FilePart], None]
    ) -> None:
        self._reactor = reactor
        self._channel = channel
        self.out = Outgoing(channel, reactor.buffers, warm)
        self.used = 0
        self.sent = 0

    @property
    def arena(self) -> memoryview:
        """Where replies are built."""
        return self._reactor.arena.data

    def emit(self, data: bytes) -> None:
        """A reply built elsewhere joins those in the arena."""
        if not self.make_room(len(data)):
            self.push()  # what is in the arena was there first
            self.out.add(data)
            return
        used = self.used
        self.arena[used : used + len(data)] = data
        self.used = used + len(data)

    def make_room(self, length: int) -> bool:
        """See to ``length`` free bytes in the arena; False if the socket is full."""
        if self.used + length > ARENA_SIZE:
            self.push()
        return not self.out.parts

    def push(self, *, more: bool = False) -> bool:
        """Send the arena; False if the client must read first. ``more`` follows at once.

        Raises:
            ConnectionError: the client is gone.
        """
        used, self.used = self.used, 0
        if not used:
            return not self.out.parts
        reactor = self._reactor
        view = reactor.arena.data[:used]
        sent = 0
        if not self.out.parts:
            sent = self._channel.send(view, more=more)
            self.sent += sent
            if sent == used:
                return True
        # Copied, not kept: a client that does not read pins what it is owed, not a whole arena.
        rest = used - sent
        buffer = reactor.buffers.borrow(rest)
        buffer.data[:rest] = view[sent:]
        self.out.add(buffer.view(rest), buffer)
        return False

    def send_file(self, fd: int, position: int, length: int) -> int:
        """Send what is in the arena, then the file's range; returns the bytes of it sent.

        Plain sockets only: TLS has to see the bytes. Less than ``length`` means that the caller
        must queue the rest in ``out`` at once.
        """
        channel = self._channel
        assert not isinstance(channel, TlsChannel)
        sent = 0
        if self.push(more=True):
            while sent < length:
                count = channel.send_file(fd, position + sent, length - sent)
                if not count:
                    break
                sent += count
            self.sent += sent
        return sent
