"""Which points of a group are kept: pure, for any repository.

::

    newest ─────────────────────────────────────────────────> oldest
    ● ● ●   ●   ●   ●      ●       ●         ●                keep_last 3
    ●       ●   ●   ●      ●                                  keep_daily 5: the newest of each day
    ●              ●               ●                          keep_weekly 3 ...

Rules:

* Each rule is asked for itself, and a point that any of them keeps is kept: ``keep_daily 7`` keeps
  the newest point of each of the last seven days *on which there are points*. Days without any
  do not count, so a VM that has not been backed up for a year loses nothing by waiting.
* Days, weeks (which begin on Monday) and the rest are those of one stated time zone.
* ``keep_within`` counts back from the newest point of the group, not from now, for the same reason.
* The newest point of a group is always kept, unless a group may become empty: the next
  increment is made from it.
* Which is the newer of two points is told by their ids, as ``latest`` is, and not by their times:
  those are what the clock of some host said, and one that was ahead for a day would outlive what
  was backed up after it.
* No rule at all keeps nothing, so that is refused and not obeyed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from nbdsrv.errors import ConfigError

__all__ = ["Candidate", "Decision", "Rules", "decide"]

LATEST = "the latest of its group"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a rule sees of a point.

    Attributes:
        id: unique in the group; of two points the one with the greater is the newer.
        created: seconds since 1970, by the clock of the host that made it.
        labels: of the point.
    """

    id: str
    created: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is kept, in numbers of points; None: no such rule.

    Attributes:
        within: a span before the newest point.
        labels: (name, value) that keep a point; any value for None.
        allow_empty: may a group lose its newest point, if no rule keeps it?
    """

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None
    within: timedelta | None = None
    labels: tuple[tuple[str, str | None], ...] = ()
    allow_empty: bool = False

    def __post_init__(self) -> None:
        for name in ("last", *_PERIODS):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigError(f"--keep-{name} {count}: give at least 1, or leave it out")
        if self.within is not None and self.within < timedelta(0):
            raise ConfigError("--keep-within: a span has no sign")

    def __bool__(self) -> bool:
        """Is there any rule?"""
        counts = [getattr(self, name) for name in ("last", *_PERIODS)]
        return self.within is not None or bool(self.labels) or any(counts)


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one point.

    Attributes:
        point: the candidate.
        reasons: why it is kept, in the words of the rules; none: it is dropped.
    """

    point: Candidate
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Does it stay?"""
        return bool(self.reasons)


def decide(points: Iterable[Candidate], rules: Rules, zone: tzinfo | None = UTC) -> list[Decision]:
    """What becomes of the points of one group, the newest first.

    Args:
        points: in any order.
        rules: at least one.
        zone: whose days are meant; None: this host's, with its summer times.

    Raises:
        ConfigError: there is no rule, or a point's time is none of the calendar.
    """
    if not rules:
        raise ConfigError("no rule says what to keep; give --keep-last, --keep-daily ...")
    newest_first = sorted(points, key=lambda point: point.id, reverse=True)
    reasons: dict[str, list[str]] = {point.id: [] for point in newest_first}
    for point in newest_first[: rules.last or 0]:
        reasons[point.id].append("last")
    moments = [_moment(point, zone) for point in newest_first]
    for name, period in _PERIODS.items():
        count = getattr(rules, name)
        for point in _newest_of_each(newest_first, moments, period, count or 0):
            reasons[point.id].append(name)
    for point in newest_first:
        reasons[point.id] += _by_itself(point, newest_first[0], rules)
    if newest_first and not rules.allow_empty and not reasons[newest_first[0].id]:
        reasons[newest_first[0].id].append(LATEST)
    return [Decision(point, tuple(reasons[point.id])) for point in newest_first]


def _newest_of_each(
    newest_first: Sequence[Candidate],
    moments: Sequence[datetime],
    period: Callable[[datetime], Any],
    count: int,
) -> list[Candidate]:
    """The newest point of each of the last ``count`` periods that have any."""
    found: dict[Any, Candidate] = {}
    for point, moment in zip(newest_first, moments, strict=True):
        if len(found) == count:
            break
        found.setdefault(period(moment), point)
    return list(found.values())


def _by_itself(point: Candidate, newest: Candidate, rules: Rules) -> list[str]:
    """Reasons that need no other point but the newest."""
    found = []
    if rules.within is not None and newest.created - point.created <= rules.within.total_seconds():
        found.append("within")
    for name, value in rules.labels:
        if name in point.labels and value in {None, point.labels[name]}:
            found.append(f"label {name}" if value is None else f"label {name}={value}")
    return found


def _moment(point: Candidate, zone: tzinfo | None) -> datetime:
    try:
        return datetime.fromtimestamp(point.created, UTC).astimezone(zone)
    except (ValueError, OverflowError, OSError) as error:
        text = f"point {point.id}: its time, {point.created}, is none of the calendar"
        raise ConfigError(f"{text}; nothing is dropped") from error


def _hour(moment: datetime) -> tuple[Any, ...]:
    """The clock shows an hour twice when summer ends; those are two."""
    return (moment.date(), moment.hour, moment.utcoffset())


_PERIODS: dict[str, Callable[[datetime], Any]] = {
    "hourly": _hour,
    "daily": datetime.date,
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
    "yearly": lambda moment: moment.year,
}
