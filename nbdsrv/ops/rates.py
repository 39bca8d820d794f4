"""What happened lately: the difference of what was counted now and some seconds ago.

::

    every second ── totals of all exports ──> [ s0 s1 s2 s3 s4 s5 ]    oldest and newest: a window
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from nbdsrv.net.measures import Measures, Tally, percentile, weighted
from nbdsrv.net.server import Server, measured_as

__all__ = ["PERCENTILES", "Lately", "Rates", "totals", "waits"]

WINDOW = 6
"""Samples kept: five seconds between the oldest and the newest."""
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def totals(server: Server) -> dict[str, Tally]:
    """What the clients of each export have moved, those who have left included."""
    found = {}
    for name, measures in server.measures.items():
        found[name] = Tally()
        found[name].add(measures.departed)
    for client, session in server.sessions.items():
        found[measured_as(session.export)].add(client.tally())
    return found


@dataclass(frozen=True, slots=True)
class _Waits:
    quick: list[int]
    reads: list[int]
    writes: list[int]
    others: list[int]

    @classmethod
    def of(cls, measures: Measures) -> "_Waits":
        return cls(
            list(measures.quick.counts),
            list(measures.reads.counts),
            list(measures.writes.counts),
            list(measures.others.counts),
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    when: float
    tallies: Mapping[str, Tally]
    waits: Mapping[str, _Waits]


@dataclass(frozen=True, slots=True)
class Lately:
    """One export, in the window.

    Attributes:
        seconds: how long the window is.
        waits: seconds by percentile, of "read", "write" and "other"; only of what there was.
    """

    seconds: float
    moved: Tally
    waits: Mapping[str, Mapping[str, float]]

    def per_second(self, count: int) -> float:
        """That many in the window."""
        return count / self.seconds if self.seconds > 0 else 0.0


class Rates:
    """The window. Call ``sample`` once a second."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._samples: deque[_Sample] = deque(maxlen=WINDOW)
        self.sample()

    def sample(self) -> None:
        """Look at the counters."""
        waits = {name: _Waits.of(each) for name, each in self._server.measures.items()}
        self._samples.append(_Sample(time.monotonic(), totals(self._server), waits))

    def lately(self, name: str) -> Lately:
        """What happened to an export; to one that was not there then, since it came."""
        old, new = self._samples[0], self._samples[-1]
        before, now = old.tallies.get(name, Tally()), new.tallies.get(name, Tally())
        moved = Tally(**{key: getattr(now, key) - getattr(before, key) for key in Tally.__slots__})
        nothing = _Waits.of(Measures())
        then, today = old.waits.get(name, nothing), new.waits.get(name, nothing)
        return Lately(new.when - old.when, moved, waits(moved, then, today))


def waits(moved: Tally, then: _Waits, now: _Waits) -> dict[str, dict[str, float]]:
    """Percentiles of what was counted between two looks."""
    quick, reads, writes, others = (
        [new - old for new, old in zip(getattr(now, kind), getattr(then, kind), strict=True)]
        for kind in ("quick", "reads", "writes", "others")
    )
    found = {
        "read": weighted(quick, moved.quick, reads),
        "write": [float(count) for count in writes],
        "other": [float(count) for count in others],
    }
    said = {}
    for kind, counts in found.items():
        values = {name: percentile(counts, share) for name, share in PERCENTILES.items()}
        if values["p50"] is not None:
            said[kind] = {name: value for name, value in values.items() if value is not None}
    return said
