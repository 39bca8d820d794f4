"""What can go wrong on the wire, and whose fault it is.

::

    ProtocolError
    ├── LocalProtocolError     we were asked to send something illegal: a bug in the caller
    └── RemoteProtocolError    the peer broke a rule; the connection cannot go on
        └── Refused            the peer said no, politely (an option's error reply)

A request that is merely wrong (out of range, unknown flag) is not an exception: it is
answered with an error value and the stream goes on.
"""

from protocol.constants import Option, Reply

__all__ = ["LocalProtocolError", "ProtocolError", "Refused", "RemoteProtocolError"]


class ProtocolError(Exception):
    """Base of this package's errors."""


class LocalProtocolError(ProtocolError):
    """The caller asked for something the protocol forbids in this state."""


class RemoteProtocolError(ProtocolError):
    """The peer violated the protocol. Close the connection; nothing it sends can be trusted."""


class Refused(RemoteProtocolError):
    """A server answered an option with an error reply.

    Attributes:
        option: what had been asked for.
        reply: the error, or the plain number if the specification does not know it.
        text: the server's own words, possibly empty.
    """

    def __init__(self, option: Option, reply: int, text: str) -> None:
        name = Reply(reply).name if reply in set(Reply) else f"error {reply:#x}"
        super().__init__(f"server refused {option.name}: {name}" + (f": {text}" if text else ""))
        self.option = option
        self.reply = reply
        self.text = text
