"""A request that was sent, and which part of its answer has arrived.

A READ's answer may come in chunks of any order; together they must cover the request exactly::

    request   |<------------------------------------>|
    arrived   |####|      |##########|          |####|     three spans
    chunk          |######|                                joins the first two: two spans

Rule: an answer outside the request, or a second one for the same bytes, is a
RemoteProtocolError before a single byte of it is handed on (libnbd 2019: such a chunk was
written outside the reader's buffer).
"""

from bisect import bisect_right, insort

from protocol.answers import Failed
from protocol.constants import Command, CommandFlag
from protocol.errors import RemoteProtocolError

__all__ = ["Inflight"]

MAX_SPANS = 1 << 16
"""Disjoint pieces of one answer to be remembered: 32 MiB in 512-byte chunks, in any order."""
NO_SPANS: list[int] = []
"""Of a request nothing has arrived for; never added to."""
MAX_FAILURES = 1 << 16
"""Error chunks in one answer: as many as it may have chunks."""


class Inflight:
    """One request awaiting its answer."""

    __slots__ = (
        "_ends",
        "_failed_offsets",
        "_failures",
        "_starts",
        "awaited_contexts",
        "command",
        "content_chunks",
        "cookie",
        "end",
        "failure",
        "flags",
        "length",
        "offset",
    )

    def __init__(
        self,
        cookie: int,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        contexts: frozenset[int] = frozenset(),
    ) -> None:
        self.cookie = cookie
        self.command = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.end = offset + length
        self.awaited_contexts = contexts
        self.content_chunks = 0
        self.failure: Failed | None = None
        # Most answers are one chunk, for which none of these is needed.
        self._starts = self._ends = self._failed_offsets = NO_SPANS
        self._failures = 0

    def __str__(self) -> str:
        return f"{self.command.name} {self.offset}+{self.length} (cookie {self.cookie})"

    @property
    def untouched(self) -> bool:
        """Has nothing of its answer arrived?"""
        return not (self.content_chunks or self._failures)

    def cover(self, offset: int, length: int) -> None:
        """Account for a content chunk.

        Raises:
            RemoteProtocolError: it is empty, not within the request, not the first for some of
                its bytes, or one too many for a request that must not be fragmented.
        """
        end = offset + length
        if not length or offset < self.offset or end > self.end:
            raise RemoteProtocolError(f"chunk {offset}+{length} is not within {self}")
        self.content_chunks += 1
        if self.content_chunks > 1 and self.flags & CommandFlag.DF:
            raise RemoteProtocolError(f"a second content chunk for {self}, which has flag DF")
        if self._failed_offsets:
            at = bisect_right(self._failed_offsets, end - 1)
            if at and self._failed_offsets[at - 1] >= offset:
                raise RemoteProtocolError(f"chunk {offset}+{length} after its error, for {self}")
        self._add_span(offset, end)

    def _add_span(self, start: int, end: int) -> None:
        starts, ends = self._starts, self._ends
        if starts is NO_SPANS:
            self._starts, self._ends = [start], [end]
            return
        at = len(starts) if not starts or start >= ends[-1] else bisect_right(starts, start)
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            raise RemoteProtocolError(f"overlapping chunk {start}+{end - start} for {self}")
        joins_left = at > 0 and ends[at - 1] == start
        joins_right = at < len(starts) and starts[at] == end
        if joins_left and joins_right:
            ends[at - 1] = ends[at]
            del starts[at], ends[at]
        elif joins_left:
            ends[at - 1] = end
        elif joins_right:
            starts[at] = start
        else:
            starts.insert(at, start)
            ends.insert(at, end)
            if len(starts) > MAX_SPANS:
                raise RemoteProtocolError(f"more than {MAX_SPANS} separate chunks for {self}")

    def answer_context(self, context_id: int) -> None:
        """Account for a status chunk; one for each context that was asked, no other."""
        if context_id not in self.awaited_contexts:
            raise RemoteProtocolError(f"context {context_id} unasked for or repeated, for {self}")
        self.awaited_contexts -= {context_id}

    def fail(self, failure: Failed) -> None:
        """Account for an error chunk."""
        offset = failure.offset
        if offset is not None and not self.offset <= offset < self.end:
            raise RemoteProtocolError(f"error at offset {offset}, not within {self}")
        self._failures += 1
        if self._failures > MAX_FAILURES:
            raise RemoteProtocolError(f"more than {MAX_FAILURES} error chunks for {self}")
        if offset is not None:
            if self._failed_offsets is NO_SPANS:
                self._failed_offsets = []
            insort(self._failed_offsets, offset)
        if self.failure is None:
            self.failure = failure

    def check_complete(self) -> None:
        """Refuse an answer that claims success and is not whole."""
        if self.failure is not None:
            return
        if self.command is Command.READ and (self._starts, self._ends) != (
            [self.offset],
            [self.end],
        ):
            raise RemoteProtocolError(f"success without all of the data for {self}")
        if self.awaited_contexts:
            missing = sorted(self.awaited_contexts)
            raise RemoteProtocolError(f"success without contexts {missing} for {self}")
