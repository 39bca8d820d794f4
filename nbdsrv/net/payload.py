"""A request's payload while it is still arriving.

::

    WRITE header | payload ........................|
                 '-- have --'--- received into ----'

It is received straight into a borrowed buffer of its own, or thrown away if the request has been
refused. The refusal is sent when all of it has come: libnbd does not expect an answer to a request
it is still sending.
"""

from nbdsrv.net.buffers import Buffer
from nbdsrv.net.channel import Channel
from protocol.constants import Errno
from protocol.requests import Request

__all__ = ["Payload", "Refusal"]

Refusal = tuple[Errno, str]


class Payload:
    """``length`` bytes that belong to ``request``, ``have`` of which are here."""

    __slots__ = ("buffer", "have", "length", "refusal", "request")

    def __init__(
        self, request: Request, length: int, buffer: Buffer | None, refusal: Refusal | None = None
    ) -> None:
        """Without a buffer it is thrown away."""
        self.request = request
        self.length = length
        self.buffer = buffer
        self.refusal = refusal
        self.have = 0

    def fill(self, channel: Channel, waste: memoryview) -> bool:
        """Receive what has arrived; True once it is complete.

        Raises:
            ConnectionError: the client left in the middle.
        """
        while self.have < self.length:
            if self.buffer is not None:
                view = self.buffer.data[self.have : self.length]
            else:
                view = waste[: self.length - self.have]
            count = channel.receive_into(view)
            if count is None:
                return False
            if not count:
                raise ConnectionError("the client left in the middle of a request")
            self.have += count
        return True
