"""READs of a Disk whose bytes are elsewhere: another server's export, passed on.

::

    client ── READ READ READ ──> serve ── Disk.begin_read each ──> one send to the other server
                                                                         |
           <── one send ── _send_arrived <── _arrived <── _arrived <─────┘  in any order

No thread, no task, nothing that waits: a record for each read, and a buffer that the bytes are
received into and sent from, short ones behind their header. What cannot be begun, or fails, is
``SlowRequests``' to carry out.
"""

from collections.abc import Callable
from time import perf_counter

from nbdsrv.disk.disk import Disk
from nbdsrv.net.buffers import Buffer
from nbdsrv.net.measures import Measures
from nbdsrv.net.reactor import Reactor
from nbdsrv.net.slow import Answer, SlowRequests
from protocol.constants import Command, Dialect
from protocol.headers import EXTENDED_READ_KEY, EXTENDED_REQUEST, READ_KEY, REQUEST
from protocol.replies import ChunkEncoder, SimpleEncoder
from protocol.requests import Request

__all__ = ["AfarReads"]

MAX_AFAR = 64
"""Reads of one client under way at a time that no thread of ours works on."""
JOINED = (1 << 16) - 64
"""Bytes of a reply up to which it is received behind its header, to be sent in one go; the buffer
of a longer one would be twice as large."""


class _Read:
    """One that is under way. Called with whether its bytes have come."""

    __slots__ = ("_owner", "at", "began", "buffer", "cookie", "header", "length")

    def __init__(
        self, owner: "AfarReads", cookie: int, at: int, length: int, header: bytes, buffer: Buffer
    ) -> None:
        self._owner = owner
        self.cookie = cookie
        self.at = at
        self.length = length
        self.header = header
        self.buffer = buffer
        self.began = perf_counter()

    def __call__(self, good: bool) -> None:  # noqa: FBT001 - as ``Disk.begin_read`` calls it
        self._owner.ended(self, good=good)


class AfarReads:
    """One client's. Belongs to the loop.

    Attributes:
        begun: bytes of the request headers that ``serve`` has taken.
    """

    def __init__(
        self,
        disk: Disk,
        reactor: Reactor,
        encoder: SimpleEncoder | ChunkEncoder,
        dialect: Dialect,
        slow: SlowRequests,
        deliver: Callable[[Answer], None],
        measures: Measures,
    ) -> None:
        """``deliver`` sends an answer and becomes the owner of its buffers."""
        self._disk = disk
        self._reactor = reactor
        self._buffers = reactor.buffers
        self._encoder = encoder
        self._slow = slow
        self._deliver = deliver
        self._measures = measures
        extended = dialect is Dialect.EXTENDED
        self._frame = EXTENDED_REQUEST if extended else REQUEST
        self._key = EXTENDED_READ_KEY if extended else READ_KEY
        self._longest = disk.block_sizes.maximum
        self._unaligned = disk.block_sizes.minimum - 1
        self._reading = 0
        self._arrived: list[_Read] = []
        self.begun = 0
        if disk.remote:
            reactor.tend(disk)

    def serve(self, rx: memoryview, at: int, end: int) -> int:
        """Begin the plain reads in ``rx[at:end]``, as many as follow each other.

        Returns:
            Where it stopped: at something else, or at what must wait.
        """
        start, self._reactor.calm = at, True
        size, key, unpack_from = self._frame.size, self._key, self._frame.unpack_from
        disk_size, longest, unaligned = self._disk.size, self._longest, self._unaligned
        while end - at >= size:
            found, cookie, offset, length = unpack_from(rx, at)
            if found != key or not 0 < length <= longest or offset + length > disk_size:
                break
            if (offset | length) & unaligned or self._slow.full():
                break
            if not self.begin(cookie, offset, length):
                request = Request(Command.READ, 0, cookie, offset, length)
                self._slow.start(request, self._slow.read(request))
            at += size
        self.begun += at - start
        return at

    def begin(self, cookie: int, at: int, length: int) -> bool:
        """Begin a READ that is within the disk; False if that is not possible now."""
        if self._reading >= MAX_AFAR or not self._buffers.affords(length):
            return False
        header = self._encoder.data_header(cookie, at, at, length, done=True)
        begin = len(header) if length <= JOINED else 0
        buffer = self._buffers.borrow(begin + length)
        read = _Read(self, cookie, at, length, header, buffer)
        if not self._disk.begin_read(at, buffer.data[begin : begin + length], read):
            self._buffers.release(buffer)
            return False
        self._reading += 1
        self._slow.enter(length)
        self._reactor.afar += 1
        return True

    def ended(self, read: _Read, *, good: bool) -> None:
        """Its bytes are there, or will not come this way."""
        self._reading -= 1
        self._reactor.afar -= 1
        self._reactor.calm = True
        if good:
            if not self._arrived:  # what arrives with it leaves with it
                self._reactor.soon(self._send_arrived)
            self._arrived.append(read)
            return
        self._slow.leave(read.length)
        self._buffers.release(read.buffer)
        # A task waits as long as it takes, and tells what is wrong.
        request = Request(Command.READ, 0, read.cookie, read.at, read.length)
        self._slow.start(request, self._slow.read(request))

    def _send_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        answers: Answer = []
        now, waits = perf_counter(), self._measures.reads
        for read in arrived:
            self._slow.leave(read.length)
            waits.add(now - read.began)
            data, header, length = read.buffer.data, read.header, read.length
            if length <= JOINED:
                begin = len(header)
                data[:begin] = header
                answers.append((data[: begin + length], read.buffer))
            else:
                answers += ((header, None), (data[:length], read.buffer))
        self._deliver(answers)
