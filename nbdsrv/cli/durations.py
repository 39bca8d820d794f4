"""Spans of time as people write them: ``90s``, ``36h``, ``1w2d``."""

import re

from nbdsrv.errors import ConfigError

__all__ = ["parse_duration", "spelled"]

_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([smhdwy])", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
LONGEST_S = 1000 * 365 * 86400


def parse_duration(option: str, text: str) -> float:
    """Seconds. ``0`` needs no unit; a minute is ``m``, a year ``y`` of 365 days.

    Raises:
        ConfigError: no span of time.
    """
    rest = text.strip()
    if rest == "0":
        return 0.0
    total, at = 0.0, 0
    while match := _PART.match(rest, at):
        total += float(match[1]) * _SECONDS[match[2].lower()]
        at = match.end()
    if at != len(rest) or not rest or total > LONGEST_S:
        raise ConfigError(f"{option} {text}: not a span of time; for instance 90s, 36h, 7d or 1w2d")
    return total


def spelled(seconds: float) -> str:
    """The same, with the largest unit that goes into it once or more."""
    for unit in ("d", "h", "m"):
        if seconds >= _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:.3g}{unit}"
    return f"{seconds:.3g}s"
