"""A server's side of the handshake, cut into pieces: greeting, option replies, terms.

::

    greeting     NBDMAGIC:8 IHAVEOPT:8 flags:2             18 bytes
    oldstyle     NBDMAGIC:8 cliserv:8 size:8 flags:4 0:124  152
    replies      header:20 data
    EXPORT_NAME  size:8 flags:2, and 124 zeroes unless agreed otherwise

Source: proto.md, "Handshake". Whatever is cut short waits for more; what is wrong is found with
the first byte that makes it so, before anything behind it is waited for.
"""

from protocol.constants import (
    IHAVEOPT,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
)
from protocol.errors import RemoteProtocolError
from protocol.handshake import option_replies
from protocol.handshake.client_states import ASKS, Input, Signal, State, signal_of
from protocol.structs import EXPORT_NAME_ZEROES, Greeting

__all__ = ["EXPORT_NAME_SIZE", "ServerInput"]

GREETING_SIZE = 18
OLDSTYLE_SIZE = 152
EXPORT_NAME_SIZE = 10
GREETING_MAGIC = NBDMAGIC.to_bytes(8, "big")
REPLY_MAGIC = OPTION_REPLY_MAGIC.to_bytes(8, "big")


class ServerInput:
    """The buffer of what a server has sent and nobody has looked at yet."""

    def __init__(self) -> None:
        self.no_zeroes = False
        self._buffer = bytearray()
        self._header: option_replies.Header | None = None

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append what was received."""
        self._buffer += data

    def take(self, state: State) -> Input | None:
        """The next complete thing the server said, read as ``state`` has it.

        Raises:
            RemoteProtocolError: it cannot be that.
        """
        if state is State.GREETING:
            return self._take_greeting()
        if state is State.EXPORT_NAME:
            size = EXPORT_NAME_SIZE + (0 if self.no_zeroes else EXPORT_NAME_ZEROES)
            return signalled(Signal.EXPORT, self._take_bytes(size))
        if state in ASKS:
            return self._take_reply(state)
        if state is State.ENDED:
            self._buffer.clear()
        if self._buffer:
            return Input(Signal.UNASKED, data=bytes(self._buffer[:16]))
        return None

    def _take_greeting(self) -> Input | None:
        head = bytes(self._buffer[:16])
        if not GREETING_MAGIC.startswith(head[:8]):
            raise RemoteProtocolError(f"not an NBD server: it begins {head!r}")
        if len(head) < 16:
            return None
        style = int.from_bytes(head[8:], "big")
        if style == OLDSTYLE_MAGIC:
            return signalled(Signal.OLDSTYLE, self._take_bytes(OLDSTYLE_SIZE))
        if style != IHAVEOPT:
            raise RemoteProtocolError(f"no known handshake: the server begins {head!r}")
        data = self._take_bytes(GREETING_SIZE)
        if data is None:
            return None
        fixed = Greeting.parse(data).flags & HandshakeFlag.FIXED_NEWSTYLE
        return Input(Signal.FIXED if fixed else Signal.NEWSTYLE, data=data)

    def _take_reply(self, state: State) -> Input | None:
        if self._header is None:
            head = bytes(self._buffer[:8])
            if not REPLY_MAGIC.startswith(head):
                raise RemoteProtocolError(f"option reply with wrong magic, it begins {head!r}")
            data = self._take_bytes(option_replies.HEADER_SIZE)
            if data is None:
                return None
            self._header = option_replies.header(data, ASKS[state])
        data = self._take_bytes(self._header.length)
        if data is None:
            return None
        reply, self._header = self._header.reply, None
        return Input(signal_of(reply), reply, data)

    def _take_bytes(self, size: int) -> bytes | None:
        if len(self._buffer) < size:
            return None
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def signalled(signal: Signal, data: bytes | None) -> Input | None:
    return None if data is None else Input(signal, data=data)
