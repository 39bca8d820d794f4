"""Reads that need no waiting: what the speed of the server rests on.

::

    request ──> window? ──yes──> preadv(RWF_NOWAIT) into the arena, behind its reply header
                  │ no                 └─ large, plain socket: sendfile
                  └──> Disk.locate ──> a new window, a hole, pieces of several kinds,
                                       a block to unpack: threads; or: not now

The *window* is the last FileRun that ``locate`` gave: disk range, file and how to read it. Within
it a read is a comparison, one system call and one ``pack_into``. In an image whose blocks lie
scattered nearly every read finds another window first, among those that are remembered
(``windows``) or by a look into tables in memory.
"""

import os
from collections.abc import Callable, Sequence
from time import monotonic

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import NEVER, Residency, Stored
from nbdsrv.disk.runs import BlockRun, FileRun, RemoteRun, Run, ZeroRun
from nbdsrv.net.outgoing import FilePart
from nbdsrv.net.reactor import ARENA_SIZE, Reactor
from nbdsrv.net.sender import Sender
from nbdsrv.net.windows import WINDOW_BITS, Window
from protocol.constants import Command, CommandFlag, Dialect
from protocol.headers import (
    DATA_DONE_KEY,
    EXTENDED_DATA,
    EXTENDED_DATA_DONE_KEY,
    EXTENDED_READ_KEY,
    EXTENDED_REQUEST,
    READ_KEY,
    REQUEST,
    SIMPLE_OK,
    SIMPLE_WORDS,
    STRUCTURED_DATA,
)
from protocol.replies import ChunkEncoder, SimpleEncoder
from protocol.requests import Request

__all__ = ["Reads"]

LARGE = 1 << 16
"""Bytes from which sendfile beats copying, on a plain socket."""
CERTAIN = 256 << 10
"""Bytes up to which a reply from sendfile is announced as complete: the pages were there a
microsecond ago and the socket usually takes it whole. Should the file be truncated just then, only
hanging up remains. Larger replies end with a chunk of their own, which costs the client two system
calls, and can still turn into an error."""
DECODED = 8
"""Blocks decoded on the loop in one go, half a millisecond, while nobody else wants anything."""
SEND_AT = 160 << 10
"""Bytes of replies after which they are sent, so that the client works while we do."""

NO_WINDOW: Window = (0, 0, -1, 0, NEVER)
UNKNOWN = (NO_WINDOW, Residency(NEVER))
NOT_SOUGHT: tuple[int, int, Sequence[Run] | None] = (-1, 0, None)
"""What ``locate`` has just said of a range that ``serve`` then stopped at."""
_SIMPLE, _STRUCTURED = int(Dialect.SIMPLE), int(Dialect.STRUCTURED)
_preadv, _pack_chunk, _pack_simple = os.preadv, STRUCTURED_DATA.pack_into, SIMPLE_WORDS.pack_into


Bring = Callable[[Request, Sequence[Stored]], bool]
"""Has the kernel bring what a READ needs into memory, then serves it once more; false if not now.
"""
Later = Callable[[Request, Sequence[Run], bool], bool]
"""Has threads answer a READ of encoded blocks; false if not now. The last argument: are the packed
bytes known not to be in memory?"""


class Reads:
    """One client's reads that are answered within its turn, and those of blocks, handed on from it.

    Attributes:
        served: bytes of the request headers that ``serve`` has taken.
        begun: reads of these that were handed on.
    """

    def __init__(
        self,
        disk: Disk,
        reactor: Reactor,
        sender: Sender,
        encoder: SimpleEncoder | ChunkEncoder,
        dialect: Dialect,
        secure: bool,  # noqa: FBT001
        bring: Bring,
        later: Later,
    ) -> None:
        self._disk = disk
        self._reactor = reactor
        self._sender = sender
        self._encoder = encoder
        self._dialect = int(dialect)
        extended = dialect is Dialect.EXTENDED
        frame = EXTENDED_REQUEST if extended else REQUEST
        head = {
            Dialect.SIMPLE: SIMPLE_WORDS,
            Dialect.STRUCTURED: STRUCTURED_DATA,
            Dialect.EXTENDED: EXTENDED_DATA,
        }[dialect].size
        # TLS has no sendfile; there all that fits behind unsent replies is copied.
        large = ARENA_SIZE - SEND_AT - head if secure else LARGE
        key = EXTENDED_READ_KEY if extended else READ_KEY
        # What the loop of ``serve`` needs, unpacked in one go.
        self._constants = (frame.unpack_from, frame.size, key, int(dialect), head, large)
        self._secure = secure
        self._bring = bring
        self._later = later
        self.served = 0
        self.begun = 0
        self._longest = disk.block_sizes.maximum
        self._runs: Sequence[Run] | None = None
        self._window = NO_WINDOW
        self._windows = reactor.windows(disk)
        self._sought = NOT_SOUGHT
        self._residency = Residency(NEVER)
        self._cold = -1
        self._decoded = 0
        # One look: threads may change it, and what was found of an older one is not to be believed.
        self._epoch = disk.epoch
        self._windows.renew(self._epoch)

    def serve(self, rx: memoryview, at: int, end: int) -> int:
        """Answer plain reads within the window from ``rx[at:]``, as many as follow each other.

        Stops at the first request that is anything else, or when the socket is full.

        Returns:
            Where it stopped.
        """
        if self._epoch != self._disk.epoch:
            self._epoch = self._disk.epoch
            self._window = NO_WINDOW
            self._windows.renew(self._epoch)
        self._decoded = 0
        self._sought = NOT_SOUGHT
        start, stop, fd, shift, inline = self._window
        unpack_from, size, read_key, dialect, head, large = self._constants
        sender, windows = self._sender, self._windows
        arena, used = sender.arena, sender.used
        first, last = at, end - size
        try:
            while at <= last:
                key, cookie, offset, length = unpack_from(rx, at)
                if key != read_key:
                    break
                if offset < start or offset + length > stop:
                    known = windows.get(offset >> WINDOW_BITS, UNKNOWN)
                    if known[0][0] <= offset and offset + length <= known[0][1]:
                        self._window, self._residency = known
                    else:
                        sender.used = used
                        answered = self._look_for(cookie, offset, length)
                        if answered is None:
                            break
                        if answered:
                            at += size
                            if sender.out.parts or (sender.used > SEND_AT and not sender.push()):
                                return at
                            used = sender.used
                            continue
                    start, stop, fd, shift, inline = self._window
                if inline < 0:
                    break
                if length >= large:
                    sender.used = used
                    if not self._send_file(cookie, offset, length):
                        return at
                    at += size
                    if sender.out.parts:
                        return at
                    used = sender.used
                    continue
                if not length:
                    break
                data = used + head
                after = data + length
                try:
                    if _preadv(fd, (arena[data:after],), offset + shift, inline) != length:
                        break
                except BlockingIOError:
                    wanted = (fd, offset + shift, length, self._residency)
                    request = Request(Command.READ, 0, cookie, offset, length)
                    if not self._bring(request, (wanted,)):
                        self._cold = offset
                        break
                    self._residency.cold()
                    self.begun += 1
                    at += size
                    continue
                except OSError:
                    break
                if dialect == _STRUCTURED:
                    _pack_chunk(arena, used, DATA_DONE_KEY, cookie, length + 8, offset)
                elif dialect == _SIMPLE:
                    _pack_simple(arena, used, SIMPLE_OK, cookie)
                else:
                    EXTENDED_DATA.pack_into(
                        arena, used, EXTENDED_DATA_DONE_KEY, cookie, offset, length + 8, offset
                    )
                used = after
                at += size
                if used > SEND_AT:
                    sender.used = used
                    if not sender.push():
                        return at
                    used = 0
            sender.used = used
            return at
        finally:  # also where the client turns out to be gone
            self.served += at - first

    def read(self, request: Request) -> bool:
        """Answer any READ if that needs no waiting; False if it does."""
        at, length = request.offset, request.length
        if not length:
            self._sender.emit(self._encoder.done(request.cookie, at))
            return True
        cold, self._cold = self._cold, -1
        start, stop, *_ = self._window
        self._runs = None
        if at < start or at + length > stop:
            sought, self._sought = self._sought, NOT_SOUGHT
            known = sought[0] == at and sought[1] == length
            runs = self._runs = sought[2] if known else self._disk.locate(at, length)
            if runs is None:
                return False
            first = runs[0]
            if first.length < length or not isinstance(first, FileRun):
                if isinstance(first, RemoteRun):
                    return False
                if isinstance(first, ZeroRun) and first.length >= length:
                    return self._hole(request)
                return self._assemble(request, runs)
            self._enter(at, first)
        if cold == at or self._residency.inline == NEVER:
            self._residency.cold()
            return False
        if length >= LARGE and not self._secure:
            return self._send_file(request.cookie, at, length)
        return self._copy(request)

    def runs(self, request: Request) -> Sequence[Run] | None:
        """Where a READ that ``read`` has just declined finds its bytes; None if that is unknown."""
        if self._runs is not None:
            return self._runs
        start, stop, fd, shift, _ = self._window
        at, length = request.offset, request.length
        if start <= at and at + length <= stop:
            return (FileRun(fd, at + shift, length, self._residency),)
        return None

    def _look_for(self, cookie: int, offset: int, length: int) -> bool | None:
        """Find a window for these bytes, or answer, or have it answered.

        Returns:
            False: there is a window now. True: answered, or handed on. None: neither, or not in
            order.
        """
        if not 0 < length <= self._longest or offset + length > self._disk.size:
            return None
        runs = self._disk.locate(offset, length)
        if not runs or runs[0].length < length:
            self._sought = (offset, length, runs)
            return None
        first = runs[0]
        if isinstance(first, FileRun):
            self._enter(offset, first)
            return False
        if isinstance(first, BlockRun) and length < LARGE:
            block, away = first.blocks.peek(first.key), False
            if block is None and self._may_decode():
                self._decoded += 1
                block = first.blocks.decode_now(first.key, length)
                away = block is None and not first.blocks.is_coming(first.key)
            if block is None:
                request = Request(Command.READ, 0, cookie, offset, length)
                if self._later(request, runs, away):
                    self.begun += 1
                    return True
                self._sought = (offset, length, runs)
                return None
            if len(block) < first.skip + length:
                return None
            self._copy_block(cookie, offset, memoryview(block)[first.skip : first.skip + length])
            return True
        encoder = self._encoder
        if isinstance(first, ZeroRun) and not isinstance(encoder, SimpleEncoder):
            self._sender.emit(encoder.hole(cookie, offset, offset, length, done=True))
            return True
        return None

    def _may_decode(self) -> bool:
        """May a block be decoded here and now? Handing it to a thread and back costs as much.

        Also while threads are at work: a client that got all its blocks from threads would go on
        to do so, at two thirds of the speed, since there is always one under way.
        """
        return self._reactor.alone and self._decoded < DECODED

    def _copy_block(self, cookie: int, at: int, data: memoryview) -> None:
        sender, length = self._sender, len(data)
        if not sender.make_room(self._constants[4] + length):
            header = self._encoder.data_header(cookie, at, at, length, done=True)
            sender.emit(header + data)
            return
        self._announce(cookie, at, length)
        sender.arena[sender.used : sender.used + length] = data
        sender.used += length

    def _enter(self, at: int, run: FileRun) -> None:
        self._residency = run.residency
        self._window = self._windows.met(at, run)

    def _assemble(self, request: Request, runs: Sequence[Run]) -> bool:
        """A reply of several pieces, if all of them are in memory and the arena has room."""
        at, length, cookie = request.offset, request.length, request.cookie
        encoder, sender = self._encoder, self._sender
        sparse = not (isinstance(encoder, SimpleEncoder) or request.flags & CommandFlag.DF)
        if sparse and len(runs) > 1 and any(isinstance(run, ZeroRun) for run in runs):
            return False
        header = encoder.data_header(cookie, at, at, length, done=True)
        total = len(header) + length
        if total > ARENA_SIZE or not sender.make_room(total):
            return False
        begin = sender.used + len(header)
        end = begin + length
        for run in runs:
            after = min(begin + run.length, end)
            if not _in_memory(run, sender.arena[begin:after]):
                return False
            begin = after
        sender.arena[sender.used : sender.used + len(header)] = header
        sender.used = end
        return True

    def _hole(self, request: Request) -> bool:
        encoder = self._encoder
        if isinstance(encoder, SimpleEncoder) or request.flags & CommandFlag.DF:
            return self._zeroes(request)
        at = request.offset
        self._sender.emit(encoder.hole(request.cookie, at, at, request.length, done=True))
        return True

    def _zeroes(self, request: Request) -> bool:
        if request.length > LARGE:
            return False
        at, length = request.offset, request.length
        header = self._encoder.data_header(request.cookie, at, at, length, done=True)
        self._sender.emit(header + bytes(length))
        return True

    def _copy(self, request: Request) -> bool:
        """Read into the arena, if there is room and the pages are there."""
        at, length = request.offset, request.length
        sender = self._sender
        header = self._encoder.data_header(request.cookie, at, at, length, done=True)
        total = len(header) + length
        if total > ARENA_SIZE or not sender.make_room(total):
            return False
        _, _, fd, shift, inline = self._window
        begin = sender.used + len(header)
        end = begin + length
        try:
            count = os.preadv(fd, (sender.arena[begin:end],), at + shift, inline)
        except OSError:
            count = -1
        if count != length:
            self._residency.cold()
            return False
        sender.arena[sender.used : begin] = header
        sender.used = end
        return True

    def _send_file(self, cookie: int, at: int, length: int) -> bool:
        """Send a range of the window straight from the page cache, if all of it is there."""
        _, _, fd, shift, _ = self._window
        position = at + shift
        if self._secure or not self._residency.resident(fd, position, length):
            return False
        encoder, sender = self._encoder, self._sender
        done = length <= CERTAIN
        if done:
            self._announce(cookie, at, length)
        else:
            sender.emit(encoder.data_header(cookie, at, at, length, done=False))
        sent = sender.send_file(fd, position, length)
        if sent == length:
            if not done and self._dialect != _SIMPLE:
                sender.emit(encoder.done(cookie, at))
        else:
            left = (fd, position + sent, length - sent)
            name = os.path.basename(self._disk.name)
            ending = None if done or isinstance(encoder, SimpleEncoder) else encoder
            part = FilePart(*left, self._residency, monotonic(), ending, cookie, at, name)
            sender.out.add_file(part)
            sender.out.flush()
        return True

    def _announce(self, cookie: int, at: int, length: int) -> None:
        """Put the header of a complete reply into the arena; cheaper than to build it apart."""
        sender = self._sender
        head = self._constants[4]
        if not sender.make_room(head):
            sender.emit(self._encoder.data_header(cookie, at, at, length, done=True))
            return
        arena, used = sender.arena, sender.used
        if self._dialect == _STRUCTURED:
            _pack_chunk(arena, used, DATA_DONE_KEY, cookie, length + 8, at)
        elif self._dialect == _SIMPLE:
            _pack_simple(arena, used, SIMPLE_OK, cookie)
        else:
            EXTENDED_DATA.pack_into(arena, used, EXTENDED_DATA_DONE_KEY, cookie, at, length + 8, at)
        sender.used = used + head


def _in_memory(run: Run, part: memoryview) -> bool:
    """Fill ``part`` from the beginning of ``run`` if that needs no waiting."""
    if isinstance(run, FileRun):
        inline = run.residency.inline
        if inline == NEVER:
            return False
        try:
            if os.preadv(run.fd, (part,), run.position, inline) == len(part):
                return True
        except OSError:
            pass
        run.residency.cold()
        return False
    if isinstance(run, BlockRun):
        block = run.blocks.peek(run.key)
        if block is None or len(block) < run.skip + len(part):
            return False
        part[:] = memoryview(block)[run.skip : run.skip + len(part)]
        return True
    part[:] = bytes(len(part))
    return True
