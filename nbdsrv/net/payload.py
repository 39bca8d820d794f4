"""Payloads: received into buffers of their own, then acted on.

::

    WRITE header | payload ........................|
                 '-- have --'--- received into ----'

It is received straight into a borrowed buffer of its own, or thrown away if the request has been
refused. The refusal is sent when all of it has come: libnbd does not expect an answer to a request
it is still sending.
"""

from collections.abc import Callable

from nbdsrv.net.buffers import Buffer
from nbdsrv.net.channel import Channel
from nbdsrv.net.reactor import RECEIVE_SIZE, Reactor
from nbdsrv.net.slow import SlowRequests
from nbdsrv.net.writes import Writes
from protocol.constants import Command, CommandFlag, Errno
from protocol.requests import Request, Rules, parse_status_payload

__all__ = ["AGAIN", "Payloads", "Refusal"]

AGAIN = -1
"""Come back to this request."""

Refusal = tuple[Errno, str]


class _Payload:
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


class Payloads:
    """One client's payloads: at most one is arriving, the others lie in the receive buffer.

    Attributes:
        arriving: has the rest of one still to come?
        waiting_for_memory: until then nothing is received.
        received: bytes that came straight here and not with the requests.
        slow_writes: WRITEs the Disk itself had to carry out.
    """

    def __init__(
        self,
        reactor: Reactor,
        channel: Channel,
        rules: Rules,
        context_ids: tuple[int, ...],
        writes: Writes,
        slow: SlowRequests,
        *,
        refuse: Callable[[Request, Errno, str], None],
        memory_is_back: Callable[[], None],
        direct_fua: bool,
    ) -> None:
        """``memory_is_back`` is called in the middle of another client's turn."""
        self._reactor = reactor
        self._channel = channel
        self._rules = rules
        self._context_ids = context_ids
        self._writes = writes
        self._slow = slow
        self._refuse = refuse
        self._memory_is_back = memory_is_back
        self._direct_fua = direct_fua
        self._longest = RECEIVE_SIZE - writes.header_size
        self._payload: _Payload | None = None
        self.waiting_for_memory = False
        self.received = 0
        self.slow_writes = 0

    @property
    def arriving(self) -> bool:
        """Has the rest of one still to come?"""
        return self._payload is not None

    @property
    def have(self) -> int:
        """Bytes of the one that is arriving."""
        return self._payload.have if self._payload is not None else 0

    def receive(self, request: Request, rx: memoryview, body: int, end: int) -> int:
        """Act on a payload that begins at ``rx[body:end]``, now or once it is complete.

        Returns:
            Where the next request begins, or ``AGAIN``.
        """
        length, have = request.length, end - body
        buffers = self._reactor.buffers
        if not buffers.affords(max(length, RECEIVE_SIZE)):
            self.waiting_for_memory = True
            buffers.when_affordable(self._afforded)
            return AGAIN
        if length <= have:
            self._act(request, rx[body : body + length], None)
            return body + length
        if self._writes.pending and length <= self._longest:
            return AGAIN  # the thread that stores the writes before it receives the rest
        buffer = buffers.borrow(length)
        buffer.data[:have] = rx[body:end]
        self._payload = _Payload(request, length, buffer)
        self._payload.have = have
        return end

    def skip(self, request: Request, length: int, refusal: Refusal) -> None:
        """Throw away the ``length`` bytes still to come, then refuse."""
        self._payload = _Payload(request, length, None, refusal)

    def fill(self) -> bool:
        """Receive more of what is arriving, and act on it once it is complete.

        Raises:
            ConnectionError: the client left in the middle.
        """
        payload = self._payload
        assert payload is not None
        had = payload.have
        complete = payload.fill(self._channel, self._reactor.waste)
        self.received += payload.have - had
        if not complete:
            return False
        self._payload = None
        if payload.refusal is not None:
            self._refuse(payload.request, *payload.refusal)
        if payload.buffer is not None:
            self._act(payload.request, payload.buffer.view(payload.length), payload.buffer)
        return True

    def drop(self) -> None:
        """The client is gone."""
        if self._payload is not None and self._payload.buffer is not None:
            self._reactor.buffers.release(self._payload.buffer)
        self._payload = None

    def _afforded(self) -> None:
        self.waiting_for_memory = False
        self._memory_is_back()

    def _act(self, request: Request, data: memoryview, owner: Buffer | None) -> None:
        """The payload is here; without ``owner`` it lies in the shared receive buffer."""
        if request.command == Command.WRITE:
            durable = bool(request.flags & CommandFlag.FUA)
            direct = self._direct_fua or not durable
            if direct and self._writes.place(request.offset, request.length):
                self._writes.add(request.cookie, request.offset, data, owner, durable=durable)
            else:
                self._write_slowly(request, data, owner)
            return
        self._filtered_status(request, bytes(data))
        if owner is not None:
            self._reactor.buffers.release(owner)

    def _filtered_status(self, request: Request, payload: bytes) -> None:
        parsed = parse_status_payload(payload, self._context_ids)
        if parsed is None:
            self._refuse(request, Errno.EINVAL, "malformed list of meta contexts")
            return
        length, chosen = parsed
        refusal = self._rules.check_range(Command.BLOCK_STATUS, request.offset, length)
        if refusal is not None:
            self._refuse(request, *refusal)
            return
        effect = Request(request.command, request.flags, request.cookie, request.offset, length)
        self._slow.start(effect, self._slow.perform(effect, chosen))

    def _write_slowly(self, request: Request, data: memoryview, owner: Buffer | None) -> None:
        self.slow_writes += 1
        if owner is None:
            owner = self._reactor.buffers.borrow(request.length)
            owner.data[: request.length] = data
        data = owner.view(request.length)
        self._slow.start(request, self._slow.write(request, data), owner)
