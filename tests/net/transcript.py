"""What a server answered to one request, checked against the specification as it comes in.

::

    simple      | error            | data of a READ
    chunks      | DATA | HOLE | STATUS | ERROR ...   the last one DONE

Rule: everything proto.md demands of *every* reply is asserted here, so that each test which
reads a reply checks it: content inside the request and never twice, nothing behind an error,
holes not empty, extents merged and within the hint.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from protocol import structs
from protocol.constants import Command, CommandFlag, Errno, ReplyFlag, ReplyType

ERRORS = (ReplyType.ERROR, ReplyType.ERROR_OFFSET)


@dataclass(frozen=True, slots=True)
class Asked:
    """The request; ``length`` is its effect, not its payload."""

    command: int
    flags: int
    offset: int
    length: int


@dataclass(slots=True)
class Answer:
    """A whole reply.

    Attributes:
        error: 0 or the wire's number.
        error_offset: where, if the server said so.
        pieces: (offset, length, data; None for a hole) in order of arrival.
        statuses: context id to (length, flags) pairs.
        kinds: chunk types in order of arrival; empty for a simple reply.
    """

    cookie: int
    asked: Asked
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    pieces: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    kinds: list[ReplyType] = field(default_factory=list)

    def data(self) -> bytes:
        """The bytes of a READ without error; asserts that all of them came."""
        assert self.error == 0, f"{Errno(self.error).name}: {self.text}"
        out = bytearray()
        for offset, length, data in sorted(self.pieces, key=lambda piece: piece[0]):
            assert offset == self.asked.offset + len(out), "a part of the data is missing"
            out += data if data is not None else bytes(length)
        assert len(out) == self.asked.length, "a part of the data is missing"
        return bytes(out)

    def good(self) -> bytes:
        """The contiguous bytes from the start that a failed READ delivered."""
        out = bytearray()
        for offset, length, data in sorted(self.pieces, key=lambda piece: piece[0]):
            assert offset == self.asked.offset + len(out)
            out += data if data is not None else bytes(length)
        return bytes(out)

    def take(self, kind: int, flags: int, payload: bytes) -> bool:
        """One more chunk; True if it was the last."""
        assert flags & ~ReplyFlag.DONE == 0, f"unknown chunk flags {flags:#x}"
        done = bool(flags & ReplyFlag.DONE)
        self.kinds.append(ReplyType(kind))
        if kind == ReplyType.NONE:
            assert done, "NONE without DONE"
            assert payload == b"", "NONE with a payload"
        elif kind in ERRORS:
            self._failed(ReplyType(kind), payload)
        elif kind in {ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE}:
            self._content(ReplyType(kind), payload)
        else:
            self._status(ReplyType(kind), payload)
        if done:
            self._complete()
        return done

    def _failed(self, kind: ReplyType, payload: bytes) -> None:
        struct = structs.ErrorChunk if kind is ReplyType.ERROR else structs.ErrorOffsetChunk
        parsed = struct.parse(payload)
        assert len(struct.build(parsed)) == len(payload), "bytes behind an error chunk"
        assert parsed.error in set(Errno) - {Errno.OK}, f"error {parsed.error} is not a wire errno"
        self.error, self.text = parsed.error, parsed.text.decode()
        if kind is ReplyType.ERROR_OFFSET:
            self.error_offset = parsed.offset
            start, end = self.asked.offset, self.asked.offset + self.asked.length
            assert start <= parsed.offset < end, "ERROR_OFFSET outside the request"

    def _content(self, kind: ReplyType, payload: bytes) -> None:
        assert self.asked.command == Command.READ
        data: bytes | None = None
        if kind is ReplyType.OFFSET_DATA:
            assert len(payload) >= 9, "OFFSET_DATA without data"
            offset, data = int.from_bytes(payload[:8], "big"), payload[8:]
            length = len(data)
        else:
            assert len(payload) == 12
            hole = structs.OffsetHole.parse(payload)
            offset, length = hole.offset, hole.length
            assert length, "an empty hole"
            assert not self.asked.flags & CommandFlag.DF, "a hole in spite of DF"
        end = self.asked.offset + self.asked.length
        assert self.asked.offset <= offset, "content before the request"
        assert offset + length <= end, "content behind the request"
        for other, span, _ in self.pieces:
            assert offset + length <= other or other + span <= offset, "content sent twice"
        self.pieces.append((offset, length, data))
        assert not (self.asked.flags & CommandFlag.DF and len(self.pieces) > 1), "DF fragmented"

    def _status(self, kind: ReplyType, payload: bytes) -> None:
        assert self.asked.command == Command.BLOCK_STATUS
        if kind is ReplyType.BLOCK_STATUS_EXT:
            parsed = structs.BlockStatusExt.parse(payload)
            assert len(payload) == 8 + 16 * parsed.count, "count field does not match"
        else:
            assert kind is ReplyType.BLOCK_STATUS
            assert len(payload) % 8 == 4
            parsed = structs.BlockStatus.parse(payload)
        extents = [(extent.length, extent.flags) for extent in parsed.extents]
        assert parsed.context not in self.statuses, "two chunks for one context"
        self.statuses[parsed.context] = extents
        self._check_extents(extents)

    def _check_extents(self, extents: list[tuple[int, int]]) -> None:
        assert extents, "status without an extent"
        assert all(length for length, _ in extents), "an empty extent"
        before_last = sum(length for length, _ in extents[:-1])
        assert before_last < self.asked.length, "extents beyond the request"
        for (_, left), (_, right) in pairwise(extents):
            assert left != right, "equal neighbours not merged"
        if self.asked.flags & CommandFlag.REQ_ONE:
            assert len(extents) == 1
            assert extents[0][0] <= self.asked.length

    def _complete(self) -> None:
        if self.asked.command == Command.BLOCK_STATUS and not self.error:
            assert self.statuses, "status request answered without a status"
        if self.asked.command == Command.READ and not self.error:
            self.data()
