"""The transmission phase of one client: the heart of the server.

::

    socket ─recv─> receive buffer ─decode all─┬─ READ, in memory ─ preadv ─> arena ─┐
                                              ├─ READ, large ───── sendfile ────────┤
                                              ├─ WRITE ──────────> Workers ─────────┼─send─> socket
                                              └─ all else, cold ─> task ────────────┘

One call of ``_turn`` takes everything the client has sent, answers what needs no waiting
straight into the shared arena, hands the rest on, and sends once. On that path there is no task,
no await and no allocation per request.

Rules:

* This runs on the loop and never blocks: files are read with RWF_NOWAIT, written by threads.
* Replies leave in the order they become ready; nothing is ever answered twice.
* While the socket does not take what is due, nothing more is read from it.
* After DISC (or end of stream) everything in flight is finished and sent before the close.
"""

import asyncio
import logging
import select
from collections.abc import Callable

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import make_resident
from nbdsrv.net.channel import Channel
from nbdsrv.net.dispatch import LAST, Dispatch
from nbdsrv.net.fetched import Fetch
from nbdsrv.net.measured import Measured
from nbdsrv.net.measures import Measures
from nbdsrv.net.outgoing import FilePart
from nbdsrv.net.reactor import RECEIVE_SIZE, Reactor
from nbdsrv.net.sender import Sender
from nbdsrv.net.slow import Answer
from nbdsrv.net.stall import Stall
from nbdsrv.net.writes import Streak
from protocol.handshake.events import Agreement

__all__ = ["Transmission"]

log = logging.getLogger(__name__)

TURN_REQUESTS = 256
"""Requests served before the other clients have their turn (about a millisecond)."""
GRACE_S = 1.0
"""Seconds a busy client has to leave when the server stops."""

_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT


class Transmission(Measured):
    """Serves one client until it leaves. Belongs to the loop.

    ``on_closed`` is called once, when the socket is closed and nothing is in flight any more.

    Attributes:
        reason: why it ended, once it has.
    """

    def __init__(
        self,
        reactor: Reactor,
        channel: Channel,
        disk: Disk,
        agreement: Agreement,
        on_closed: Callable[[], None],
        measures: Measures,
    ) -> None:
        self.reason = "left"
        self._reactor = reactor
        self._channel = channel
        self._disk = disk
        self._on_closed = on_closed
        self._sender = Sender(reactor, channel, self._warm)
        self._dispatch = Dispatch(
            *(reactor, channel, disk, agreement, self._sender),
            deliver=self._deliver,
            again=self._serve_again,
            streak_ended=self._streak_ended,
            memory_is_back=self._memory_is_back,
            measures=measures,
        )
        super().__init__(measures, self._dispatch, self._sender)
        self._slow = self._dispatch.slow
        self._remote = disk.remote
        self._left = b""
        self._more = False
        self._end_of_stream = False
        self._ending = False
        self._closed = False
        # Nothing is half done that the next turn would have to go on with.
        self._quick = False
        self._turn_length = TURN_REQUESTS * self._frame_size
        self._stall = Stall(reactor.buffers, self._progress, self._give_up)
        self._mask = _READ

    @property
    def waited_for(self) -> bool:
        """Is there a request that has not been answered yet, or a thread that serves this one?"""
        return bool(self._slow.in_flight or self._writes.lent)

    # --- life ------------------------------------------------------

    def start(self, remainder: bytes = b"") -> None:
        """Begin to serve; ``remainder`` are bytes that came with the handshake."""
        self._left = remainder
        self._received += len(remainder)
        self._reactor.add(self._channel.fileno(), self, self._mask)
        if remainder or self._channel.pending():
            self._more = True
            self._reactor.again(self)

    def drain(self) -> None:
        """Answer what is in flight, refuse the rest with ESHUTDOWN, then close.

        A client that is asking right now gets ``GRACE_S`` to take its answers and leave: closing
        with unread requests in the socket would reset the connection and lose them.
        """
        if self._closed:
            return
        self._dispatch.draining = True
        self._quick = False
        idle = not (self._slow.in_flight or self._writes.lent or self._sender.out.parts)
        self._writes.recalled = True
        if not self._writes.lent:
            self._more = False
            self.resume()
            idle = idle and not self._dispatch.turned_away
        if idle:
            self._finish()
        else:
            asyncio.get_running_loop().call_later(GRACE_S, self._finish)

    def _finish(self) -> None:
        """Nothing more is received; close when what is in flight has been sent."""
        if not self._closed:
            self._ending = True
            self._after()

    @property
    def unheard(self) -> bool:
        """Is it the client's turn: are there answers that it does not take?"""
        return self._sender.out.blocked

    def abort(self) -> None:
        """Close at once. What is in flight finishes unheard."""
        if self._closed:
            return
        self._closed = True
        if self._writes.lent:
            self._channel.shut_down()  # makes the thread return
            return
        self._reactor.remove(self._channel.fileno())
        self._close()

    def _close(self) -> None:
        self._sender.out.drop()
        self._writes.drop()
        self._payloads.drop()
        self._channel.close()
        if not self._slow.in_flight:
            self._on_closed()

    def on_events(self, events: int) -> None:
        """The socket is ready."""
        try:
            # An event may be older than the mask: something delivered since may have filled the
            # socket or lent it.
            if events & _READ and self._mask & _READ:
                if not self._quick:
                    (self._timed_turn if self._timed else self._turn)()
                elif self._answer_reads():
                    return
            elif events & (select.EPOLLERR | select.EPOLLHUP):
                self.abort()
                return
            elif events & _WRITE:
                self._sender.out.flush()
        except Exception as error:  # noqa: BLE001 - the reactor serves others
            self._lost(error)
        else:
            self._after()

    def resume(self) -> None:
        """Go on with what was left for fairness, memory or a full socket."""
        if self._closed:
            return
        try:
            if self._may_read():
                self._turn()
            else:
                self._more = True  # not now, but it must not be forgotten
        except Exception as error:  # noqa: BLE001 - the reactor serves others
            self._lost(error)
        else:
            self._after()

    def _lost(self, error: BaseException | None) -> None:
        self.reason = f"lost: {error}"
        if isinstance(error, OSError):
            log.info("session.lost reason=%s", error)
        else:
            log.error("session.bug", exc_info=error)
        self.abort()

    def _may_read(self) -> bool:
        return not (
            self._sender.out.parts
            or self._ending
            or self._closed
            or self._payloads.waiting_for_memory
            or self._writes.lent
            or self._slow.full()
        )

    def _after(self) -> None:
        """Close if all is done, else watch for what is needed next."""
        half_done = self._left or self._payloads.arriving or self._end_of_stream
        self._quick = not (half_done or self._dispatch.draining or self._timed)
        if self._closed or self._writes.lent:
            self._mask = 0
            return
        if self._ending and not self._slow.in_flight and not self._sender.out.parts:
            self.abort()
            return
        may_read = self._may_read()
        if self._sender.out.parts:
            self._stall.watch()
        mask = (_READ if may_read else 0) | (_WRITE if self._sender.out.blocked else 0)
        if mask != self._mask:
            self._mask = mask
            self._reactor.modify(self._channel.fileno(), mask)
        if self._more and may_read:
            self._more = False
            self._reactor.again(self)

    # --- receiving ------------------------------------------------------

    def _answer_reads(self) -> bool:
        """The commonest turn, cut short; True if that was all.

        Plain reads, all of them in memory, all replies sent: nothing about the connection's state
        has changed then, and there is nothing to look after.
        """
        rx = self._reactor.receive.data
        end = self._channel.receive_into(rx)
        if not end:
            self._end_of_stream = end == 0
            self._keep(rx, 0, 0)
            return False
        self._received += end
        serve = self._afar.serve if self._remote else self._reads.serve
        at = serve(rx, 0, min(end, self._turn_length))
        if at == end:  # begun is as good as answered
            full = self._slow.in_flight and self._slow.full()
            return self._sender.push() and not (full or self._channel.pending())
        if self._sender.out.parts:  # the client must read first
            self._sender.push()
            self._keep(rx, at, end)
        else:
            self._serve(rx, at, end)
        return False

    def _turn(self) -> None:
        """Take what has arrived and serve it; bounded in requests and bytes."""
        if self._payloads.arriving and not self._fill_payload():
            return
        if self._writes.pending:
            self._writes.lend(0, 0, alone=bool(self._left), mute=bool(self._sender.out.parts))
            return
        rx = self._reactor.receive.data
        end = len(self._left)
        if end:
            rx[:end] = self._left
            self._left = b""
        if end < RECEIVE_SIZE // 2 and not self._end_of_stream:
            count = self._channel.receive_into(rx[end:])
            if count == 0:
                self._end_of_stream = True
            elif count is not None:
                end += count
                self._received += count
        self._serve(rx, 0, end)

    def _serve(self, rx: memoryview, at: int, end: int) -> None:
        """Serve what was received, as far as possible now."""
        at = self._consume(rx, at, end)
        if self._payloads.arriving:
            self._fill_payload()  # usually the rest is there already
        if self._writes.pending:
            alone = self._payloads.arriving or not self._may_read() or self._end_of_stream
            if not alone:
                self._writes.lend(at, end, alone=False, mute=False)
                return
        self._keep(rx, at, end)
        if self._writes.pending:
            self._writes.lend(0, 0, alone=True, mute=bool(self._sender.out.parts))

    def _fill_payload(self) -> bool:
        """Receive more of it; False if it is not complete yet."""
        if not self._payloads.fill():
            self._stall.watch()
            return False
        self._sender.push()
        return True

    def _memory_is_back(self) -> None:
        # Not now: this is called in the middle of somebody else's turn.
        self._more = True
        if not self._closed:
            self._reactor.again(self)

    def _keep(self, rx: memoryview, at: int, end: int) -> None:
        """What could not be served yet waits until the next turn."""
        self._more = end - at >= self._frame_size or self._channel.pending()
        if at < end:
            self._left = bytes(rx[at:end])
        if self._end_of_stream and not self._more:
            self._ending = True  # as good as DISC: what came before it is finished

    def _streak_ended(self, streak: Streak | None, error: BaseException | None) -> None:
        """A thread gives the connection back."""
        if self._closed:
            self._close()
            return
        self._mask = _READ
        self._reactor.add(self._channel.fileno(), self, _READ)
        if streak is None:
            self._lost(error)
            return
        if streak.unsent:
            add = self._sender.out.add_first if streak.torn else self._sender.out.add
            add(streak.unsent)
        if streak.left:
            self._left = streak.left
        self._end_of_stream = self._end_of_stream or streak.end_of_stream
        self._more = bool(self._left) or self._end_of_stream or self._channel.pending()
        self._deliver([])

    def _consume(self, rx: memoryview, at: int, end: int) -> int:
        """Serve the requests in ``rx[at:end]``; returns how far it got."""
        size, sender = self._frame_size, self._sender
        requests = 0
        while end - at >= size:
            if self._remote and not self._dispatch.draining:
                at = self._afar.serve(rx, at, min(end, self._turn_length))
                if end - at < size or at >= self._turn_length or not self._may_read():
                    break
            elif not self._dispatch.draining:
                before = at
                at = self._reads.serve(rx, at, min(end, at + self._turn_length))
                requests += (at - before) // size
                if end - at < size or sender.out.parts or requests >= TURN_REQUESTS:
                    break
                if self._slow.in_flight and self._slow.full():
                    break
                if self._reactor.buffers.affords(RECEIVE_SIZE):
                    at = self._writes.serve(rx, at, end)
                    if end - at < size:
                        break
            requests += 1
            after = self._dispatch.serve(rx, at, end)
            if after < 0:
                if after == LAST:
                    self._ending = True
                    at = end
                break
            at = after
            if requests >= TURN_REQUESTS or not self._may_read():
                break
        sender.push()
        return at

    # --- stalling ------------------------------------------------------

    def _progress(self) -> int | None:
        """For ``Stall``: bytes moved, or None if this client holds no memory."""
        if self._closed or not (self._payloads.arriving or self._sender.out.parts):
            return None
        return self._sender.out.sent + self._payloads.have

    def _give_up(self, reason: str) -> None:
        self._lost(ConnectionError(reason))

    # --- files that must be read in again ------------------------------------------------------

    def _warm(self, part: FilePart) -> None:
        """What waited for the client to read on has left the page cache meanwhile."""
        self._slow.enter(0)
        where = (part.fd, part.position, part.length)
        self._reactor.workers.submit(make_resident, *where, done=self._warmed)

    def _warmed(self, _result: object, _error: BaseException | None) -> None:
        self._slow.leave(0)
        self._sender.out.warmed()
        self._deliver([])

    # --- replies ------------------------------------------------------

    def _serve_again(self, fetched: list[Fetch]) -> None:
        """Outside a turn: what the kernel has brought into memory for these."""
        try:
            if not self._closed and not self._writes.lent:
                self._dispatch.serve_again(fetched)
                self._sender.push()
                fetched = []
        except Exception as error:  # noqa: BLE001 - the reactor serves others
            self._lost(error)
            return
        if not self._closed:
            for fetch in fetched:  # a thread has the connection
                self._slow.start(fetch.request, self._slow.read(fetch.request))
        self._deliver([])

    def _deliver(self, answer: Answer) -> None:
        """Send what became ready outside a turn."""
        for data, owner in answer:
            if not self._closed:
                self._sender.out.add(data, owner)
            elif owner is not None:
                self._reactor.buffers.release(owner)
        if self._closed:
            if not self._slow.in_flight and not self._writes.lent:
                self._on_closed()
            return
        if self._writes.lent:
            return
        try:
            self._sender.out.flush()
        except OSError as error:
            self._lost(error)
        else:
            self._after()
