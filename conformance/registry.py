"""What a check is, and the list of all of them.

A check is one function registered under the program it drives and the feature it shows::

    @check("nbdinfo", "map", needs=("nbdinfo",))
    def nbdinfo_map(context: Context) -> None: ...

It passes by returning. It fails by raising :class:`CheckFailedError` (or anything else), and
is not run at all where a program it needs is not installed (:class:`MissingPeerError`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from conformance.context import Context
from conformance.outcome import CheckFailedError

__all__ = ["Check", "Part", "all_checks", "check", "expect", "expect_in"]


class Part(StrEnum):
    """Which run a check belongs to.

    Two minutes in all, every image format, a minute in a guest, minutes of kills and services, a
    libvirtd of our own, ten minutes of two hundred clients, a Linux that boots a dozen times.
    """

    QUICK = "quick"
    FORMATS = "formats"
    KERNEL = "kernel"
    REPOSITORY = "repository"
    LIVE = "live"
    SERVICE = "service"
    BOOT = "boot"


@dataclass(frozen=True, slots=True)
class Check:
    """One cell of the table."""

    program: str
    feature: str
    run: Callable[[Context], None]
    part: Part
    needs: tuple[str, ...]


_CHECKS: list[Check] = []


def check(
    program: str, feature: str, *, needs: tuple[str, ...] = (), part: Part = Part.QUICK
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Register a function as the check of one feature with one program.

    Args:
        program: the row, as its users call the program.
        feature: the cell, unique within the row.
        needs: executables looked up on PATH (and the sbin directories) before it runs.
        part: the run it belongs to.
    """

    def register(function: Callable[[Context], None]) -> Callable[[Context], None]:
        if any(known.program == program and known.feature == feature for known in _CHECKS):
            raise ValueError(f"the check {program} / {feature} is registered twice")
        _CHECKS.append(Check(program, feature, function, part, needs))
        return function

    return register


def all_checks() -> list[Check]:
    """Every check registered so far, in the order of registration."""
    return list(_CHECKS)


def expect(expected: object, actual: object, what: str) -> None:
    """Raise CheckFailedError unless both are equal; ``what`` names the thing compared."""
    if expected != actual:
        raise CheckFailedError(f"{what}: expected {_short(expected)}, got {_short(actual)}")


def expect_in(part: str, whole: str, what: str) -> None:
    """Raise CheckFailedError unless the text occurs; ``what`` names where it was looked for."""
    if part not in whole:
        raise CheckFailedError(f"{what}: expected to find {part!r} in {_short(whole)}")


def _short(value: object, limit: int = 400) -> str:
    text = repr(value)
    if not isinstance(value, str | bytes):
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            pass
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
