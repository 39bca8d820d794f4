"""Replies as they come off the wire, in pieces of any size, checked and turned into answers.

::

    simple    magic:4 error:4 cookie:8                            then a good READ's data
    chunk     magic:4 flags:2 type:2 cookie:8 length:4            then the payload
    ext.      magic:4 flags:2 type:2 cookie:8 offset:8 length:8   then the payload

    header ──> (data offset) ──> data, passed on ──┐
       ^  └──> payload, gathered ──────────────────┤
       └───────────────────────────────────────────┘

Source: proto.md, "Simple reply message" and the two after it (ext-header branch).

Rule: a length is judged as soon as its header is there. Data is never gathered here: it is
passed on as it comes, in views of the caller's buffer. What is gathered (a header, a status or
error payload cut in two) is gathered once, in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass

from protocol import payloads
from protocol.answers import Answer, Data, Done, Failed, Hole
from protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    Dialect,
    Errno,
    ReplyFlag,
    ReplyType,
)
from protocol.errors import RemoteProtocolError
from protocol.headers import (
    DATA_DONE_KEY,
    EXTENDED_DATA,
    EXTENDED_DATA_DONE_KEY,
    EXTENDED_HEADER,
    SIMPLE_OK,
    SIMPLE_REPLY,
    SIMPLE_WORDS,
    STRUCTURED_DATA,
    STRUCTURED_HEADER,
)
from protocol.inflight import Inflight
from protocol.payloads import Frame
from protocol.terms import Negotiated

__all__ = ["Incoming", "Payload"]

NOBODY = Inflight(0, Command.DISC, 0, 0)
"""Whose reply is being received between two replies."""

DATA_OFFSET_SIZE = 8
PLAIN_READS = {
    Dialect.SIMPLE: (SIMPLE_WORDS, SIMPLE_OK),
    Dialect.STRUCTURED: (STRUCTURED_DATA, DATA_DONE_KEY),
    Dialect.EXTENDED: (EXTENDED_DATA, EXTENDED_DATA_DONE_KEY),
}
"""What precedes the data of a READ that is answered in one piece, and how that begins."""
LAST = int(ReplyFlag.DONE) << 16
"""DONE, where a header's key has its flags."""


@dataclass(frozen=True, slots=True)
class Payload:
    """The next ``length`` bytes of the stream belong at ``offset`` of the export."""

    cookie: int
    offset: int
    length: int


class Incoming:
    """The receiving half of a client's connection. Not safe for concurrent use.

    Attributes:
        answers: what has been understood and not been taken away.
        leaving: the server has answered ESHUTDOWN: it wants the connection to end.
    """

    def __init__(self, terms: Negotiated, inflight: dict[int, Inflight]) -> None:
        self.answers: list[Answer] = []
        self.leaving = False
        self._inflight = inflight
        self._export_size = terms.size
        self._dialect = terms.dialect
        extended = terms.dialect is Dialect.EXTENDED
        self._header_size = EXTENDED_HEADER.size if extended else SIMPLE_REPLY.size
        self._plain, self._plain_key = PLAIN_READS[terms.dialect]
        # Gathering: this many bytes are needed, these are there, then this is called.
        self._need = self._header_size
        self._partial = bytearray()
        self._on_frame: Callable[[Frame], None] = self._on_header
        # The chunk being received.
        self._request = NOBODY
        self._last = False
        self._kind = 0
        self._length = 0
        # Its data: where the next byte belongs, and how many are still to come.
        self._position = 0
        self._left = 0

    @property
    def payload(self) -> Payload | None:
        """What the next bytes of the stream are, when they are data; None otherwise."""
        if not self._left:
            return None
        return Payload(self._request.cookie, self._position, self._left)

    @property
    def between_replies(self) -> bool:
        """Whether nothing is half received."""
        return self._request is NOBODY and not self._partial

    def whereabouts(self) -> str:
        """What is being received, for an error message."""
        if self._left:
            return f"{self._left} bytes of data short at {self._position} of {self._request}"
        have = f"{len(self._partial)} of {self._need} bytes"
        if self._request is NOBODY:
            return f"within a reply header, {have}"
        return f"within the payload of a chunk for {self._request}, {have}"

    def feed(self, view: memoryview) -> None:
        """Take bytes, append to ``answers``.

        Raises:
            RemoteProtocolError: the server broke a rule; ``answers`` holds what was before.
        """
        at, end = 0, len(view)
        while at < end:
            if self._left:
                taken = min(self._left, end - at)
                piece = view[at : at + taken]
                self.answers.append(Data(self._request.cookie, self._position, piece))
                at += taken
                self.advance(taken)
                continue
            if self._request is NOBODY and not self._partial and (after := self._read(view, at)):
                at = after
                continue
            taken = min(self._need - len(self._partial), end - at)
            frame: Frame = view[at : at + taken]
            at += taken
            if taken < self._need:
                self._partial += frame
                if len(self._partial) < self._need:
                    break
                frame, self._partial = self._partial, bytearray()
            self._on_frame(frame)

    def advance(self, count: int) -> None:
        """``count`` bytes of ``payload`` have been received, here or by the shell itself."""
        self._position += count
        self._left -= count
        if not self._left:
            self._end_chunk()

    def _read(self, view: memoryview, at: int) -> int:
        """The header of a good READ's only chunk, and its data if that is there: the same answers
        and the same checks in fewer steps, for nearly all replies are that.

        Returns:
            Where the rest begins; 0: it is something else, or too little to tell.
        """
        data = at + self._plain.size
        if data > len(view):
            return 0
        if self._dialect is Dialect.STRUCTURED:
            key, cookie, length, offset = self._plain.unpack_from(view, at)
            length -= DATA_OFFSET_SIZE
        elif self._dialect is Dialect.EXTENDED:
            key, cookie, asked, length, offset = self._plain.unpack_from(view, at)
            length = length - DATA_OFFSET_SIZE if asked == offset else -1
        else:
            key, cookie = self._plain.unpack_from(view, at)
            offset = length = -1
        if key != self._plain_key:
            return 0
        request = self._inflight.get(cookie)
        if request is None or request.command is not Command.READ or not request.untouched:
            return 0
        if self._dialect is not Dialect.SIMPLE and (
            offset != request.offset or length != request.length
        ):
            return 0
        end = data + request.length
        if end <= len(view):
            del self._inflight[cookie]
            self.answers += (Data(cookie, request.offset, view[data:end]), Done(cookie, None))
            return end
        request.cover(request.offset, request.length)
        self._request, self._last = request, True
        self._position, self._left = request.offset, request.length
        return data

    # --- headers -------------------------------------------------------------------------

    def _on_header(self, frame: Frame) -> None:
        magic = int.from_bytes(frame[:4], "big")
        if magic == EXTENDED_REPLY_MAGIC and self._dialect is Dialect.EXTENDED:
            self._on_extended(frame)
        elif magic == STRUCTURED_REPLY_MAGIC and self._dialect is Dialect.STRUCTURED:
            # Up to here as long as a simple reply; four bytes are missing.
            self._partial += frame
            self._need = STRUCTURED_HEADER.size
            self._on_frame = self._on_structured
        elif magic == SIMPLE_REPLY_MAGIC and self._dialect is not Dialect.EXTENDED:
            self._on_simple(frame)
        else:
            raise RemoteProtocolError(f"wrong reply magic {magic:#x} for {self._dialect.name}")

    def _on_simple(self, frame: Frame) -> None:
        _, error, cookie = SIMPLE_REPLY.unpack(frame)
        request = self._find(cookie)
        if self._dialect is Dialect.STRUCTURED:
            needs_chunks = {Command.READ} if error else {Command.READ, Command.BLOCK_STATUS}
            payloads.need(request.command not in needs_chunks, "a simple reply", request)
        self._request = request
        self._last = True
        if error:
            self._fail(payloads.failed(error, "", None, request))
        elif request.command is Command.READ:
            request.cover(request.offset, request.length)
            self._position, self._left = request.offset, request.length
            return
        self._end_chunk()

    def _on_structured(self, frame: Frame) -> None:
        key, cookie, length = STRUCTURED_HEADER.unpack(frame)
        self._begin_chunk(self._find(cookie), key, length)

    def _on_extended(self, frame: Frame) -> None:
        key, cookie, offset, length = EXTENDED_HEADER.unpack(frame)
        request = self._find(cookie)
        if offset != request.offset:
            raise payloads.invalid(f"reply header with offset {offset}", request)
        self._begin_chunk(request, key, length)

    def _find(self, cookie: int) -> Inflight:
        request = self._inflight.get(cookie)
        if request is None:
            raise RemoteProtocolError(f"reply to cookie {cookie:#x}, which awaits none")
        return request

    # --- chunks --------------------------------------------------------------------------

    def _begin_chunk(self, request: Inflight, key: int, length: int) -> None:
        self._request = request
        self._last = bool(key & LAST)
        self._kind = key & 0xFFFF
        self._length = length
        payloads.check_length(self._kind, length, request, self._dialect)
        if self._kind == ReplyType.OFFSET_DATA:
            self._need = DATA_OFFSET_SIZE
            self._on_frame = self._on_data_offset
        elif length:
            self._need = length
            self._on_frame = self._on_payload
        else:
            payloads.need(self._last, "chunk NONE without DONE", request)
            self._end_chunk()

    def _on_data_offset(self, frame: Frame) -> None:
        offset, length = payloads.data_offset(frame), self._length - DATA_OFFSET_SIZE
        self._request.cover(offset, length)
        self._position, self._left = offset, length

    def _on_payload(self, frame: Frame) -> None:
        request = self._request
        if payloads.is_error(self._kind):
            self._fail(payloads.error(self._kind, frame, request))
        elif self._kind == ReplyType.BLOCK_STATUS:
            self.answers.append(payloads.status(frame, request, self._export_size))
        elif self._kind == ReplyType.BLOCK_STATUS_EXT:
            self.answers.append(payloads.status_ext(frame, request, self._export_size))
        else:
            offset, length = payloads.hole(frame)
            request.cover(offset, length)
            self.answers.append(Hole(request.cookie, offset, length))
        self._end_chunk()

    def _fail(self, failure: Failed) -> None:
        self._request.fail(failure)
        self.leaving = self.leaving or failure.errno is Errno.ESHUTDOWN
        self.answers.append(failure)

    def _end_chunk(self) -> None:
        request = self._request
        if self._last:
            request.check_complete()
            del self._inflight[request.cookie]
            self.answers.append(Done(request.cookie, request.failure))
        self._request = NOBODY
        self._need = self._header_size
        self._on_frame = self._on_header
