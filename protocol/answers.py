"""What a client learns from a server's replies, in the order it arrives.

::

    READ          (Data | Hole)* Failed* Done
    BLOCK_STATUS  Status* Failed* Done
    all others    Failed* Done

Every request ends with exactly one Done, and nothing follows it for that cookie. Events of
different requests interleave as the server pleases.
"""

from dataclasses import dataclass

from protocol.constants import Errno

__all__ = ["Answer", "Data", "Done", "Failed", "Hole", "Status"]


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of the export, as they arrive: a chunk may come in several pieces.

    ``data`` is a view of the buffer given to ``receive_data``: use it before the buffer changes.
    It counts for nothing until Done arrives without a failure that concerns it.
    """

    cookie: int
    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Hole:
    """``length`` bytes of the export from ``offset`` on read as zeroes."""

    cookie: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Status:
    """Block status under one meta context: (length, flags) pairs from the request's offset on.

    Flags have 64 bits. The extents may end before the request's end or behind it, never behind
    the export's; neighbours may be equal.
    """

    cookie: int
    context_id: int
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """Something went wrong with a request; Done still follows.

    Attributes:
        text: the server's own words, control characters replaced; often empty.
        offset: where in the export it happened, if the server says so. All before it that
            was received is then good; without it nothing is.
    """

    cookie: int
    errno: Errno
    text: str
    offset: int | None


@dataclass(frozen=True, slots=True)
class Done:
    """The request is over. ``failure`` is the first Failed of this request, None for success."""

    cookie: int
    failure: Failed | None


Answer = Data | Hole | Status | Failed | Done
