"""How a check ends: ok, FAIL or skip, and the two exceptions that say so.

::

    returns                     ok
    CheckFailedError, any other FAIL    the peer and our server disagree
    MissingPeerError            skip    (FAIL under CI=true: there the peer must be installed)
"""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["CheckFailedError", "MissingPeerError", "Result", "Status"]


class CheckFailedError(Exception):
    """What a peer saw is not what it should have seen."""


class MissingPeerError(Exception):
    """A program, device or privilege that the check needs is not here."""


class Status(StrEnum):
    """A cell of the table, as printed."""

    OK = "ok"
    FAIL = "FAIL"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Result:
    """One check that was run (or skipped)."""

    program: str
    feature: str
    status: Status
    detail: str
    duration_s: float
