"""Rules of keeping: what each keeps, and what holds whatever the points and rules."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import ConfigError
from nbdsrv.repository.retention import LATEST, Candidate, Rules, decide

DAY = 86400.0
START = datetime(2026, 11, 2, 12, tzinfo=UTC).timestamp()  # a Monday


def days(*numbers: float) -> list[Candidate]:
    """A point on each of these days."""
    return [Candidate(f"{number:07.2f}", START + number * DAY) for number in numbers]


def kept(points: list[Candidate], rules: Rules, zone: ZoneInfo | None = None) -> list[str]:
    return [each.point.id for each in decide(points, rules, zone or UTC) if each.kept]


def test_the_last_are_kept() -> None:
    assert kept(days(0, 1, 2, 3), Rules(last=2)) == ["0003.00", "0002.00"]


def test_of_a_day_the_newest_is_kept_and_empty_days_do_not_count() -> None:
    points = days(0, 0.1, 5, 5.2, 30)
    assert kept(points, Rules(daily=3)) == ["0030.00", "0005.20", "0000.10"]


def test_weeks_begin_on_monday() -> None:
    points = days(4, 6, 7)  # Friday, Sunday, Monday
    assert kept(points, Rules(weekly=2)) == ["0007.00", "0006.00"]


def test_a_week_at_the_turn_of_the_year_is_one() -> None:
    thursday = datetime(2026, 12, 31, tzinfo=UTC).timestamp()
    points = [Candidate("a", thursday), Candidate("b", thursday + DAY)]
    assert kept(points, Rules(weekly=2)) == ["b"]
    assert kept(points, Rules(yearly=2)) == ["b", "a"]


def test_days_are_those_of_the_zone() -> None:
    late = datetime(2026, 6, 1, 22, 30, tzinfo=UTC).timestamp()
    points = [Candidate("a", late), Candidate("b", late + 3600)]
    assert kept(points, Rules(daily=2)) == ["b"]
    points = [Candidate("a", late - 3600), Candidate("b", late)]
    assert kept(points, Rules(daily=2), ZoneInfo("Europe/Paris")) == ["b", "a"]


def test_the_hour_that_the_clock_shows_twice_is_two() -> None:
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp()
    points = [Candidate("a", first), Candidate("b", first + 3600)]
    assert kept(points, Rules(hourly=2), ZoneInfo("Europe/Paris")) == ["b", "a"]


def test_within_counts_from_the_newest_point() -> None:
    points = days(0, 5, 6, 7)
    assert kept(points, Rules(within=timedelta(days=2))) == ["0007.00", "0006.00", "0005.00"]


def test_labels_keep_and_the_latest_is_kept_in_any_case() -> None:
    points = [
        Candidate("a", 1.0, {"release": "1"}),
        Candidate("b", 2.0, {"release": "2"}),
        Candidate("c", 3.0),
    ]
    found = {
        each.point.id: each.reasons for each in decide(points, Rules(labels=(("release", "1"),)))
    }
    assert found == {"c": (LATEST,), "b": (), "a": ("label release=1",)}
    rules = Rules(labels=(("release", None),), allow_empty=True)
    assert kept(points, rules) == ["b", "a"]


def test_all_reasons_are_named() -> None:
    (decision,) = decide(days(1), Rules(last=1, daily=1, within=timedelta(0)))
    assert decision.reasons == ("last", "daily", "within")


def test_no_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rule"):
        decide(days(1), Rules())
    with pytest.raises(ConfigError, match="no rule"):
        decide(days(1), Rules(allow_empty=True))


@pytest.mark.parametrize("count", [0, -1])
def test_a_rule_that_keeps_nothing_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Rules(daily=count)


def test_a_clock_that_was_ahead_does_not_make_an_older_point_the_newest() -> None:
    """``latest`` is by id: what it names must not go for the sake of one that was made before."""
    points = [Candidate("a", START), Candidate("b", START + 400 * DAY), Candidate("c", START + DAY)]
    assert kept(points, Rules(last=1)) == ["c"]
    assert kept(points, Rules(labels=(("release", None),))) == ["c"]
    assert kept(points, Rules(within=timedelta(0))) == ["c", "b"]  # rather one more


def test_a_time_of_no_calendar_drops_nothing() -> None:
    with pytest.raises(ConfigError, match="nothing is dropped"):
        decide([Candidate("a", 1e300)], Rules(last=1))


counts = st.none() | st.integers(1, 6)
rules_ = st.builds(
    Rules,
    last=counts,
    hourly=counts,
    daily=counts,
    weekly=counts,
    monthly=counts,
    yearly=counts,
    within=st.none() | st.integers(0, 40).map(lambda number: timedelta(days=number)),
).filter(bool)
points_ = st.lists(st.integers(0, 3 * 365 * 24), max_size=60).map(
    lambda hours: [
        Candidate(f"{index:04}", START + hour * 3600.0) for index, hour in enumerate(hours)
    ]  # clocks go back and forth as they like
)


@given(points_, rules_)
def test_what_is_kept_is_no_less_than_each_rule_says_and_no_more(
    points: list[Candidate], rules: Rules
) -> None:
    decisions = decide(points, rules)
    assert [each.point for each in decisions] == points[::-1]
    if points:
        assert decisions[0].kept
    most = sum(
        getattr(rules, name) or 0
        for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    )
    by_count = [each for each in decisions if set(each.reasons) - {"within", LATEST}]
    assert len(by_count) <= most
    assert len([each for each in decisions if "last" in each.reasons]) == min(
        rules.last or 0, len(points)
    )
    by_day = [each.point for each in decisions if "daily" in each.reasons]
    assert len({int(point.created // DAY) for point in by_day}) == len(by_day)


@given(points_, rules_)
def test_to_prune_again_drops_nothing(points: list[Candidate], rules: Rules) -> None:
    once = [each.point for each in decide(points, rules) if each.kept]
    assert [each.point for each in decide(once, rules) if each.kept] == once


@given(points_, rules_, st.integers(1, 6))
def test_one_more_rule_drops_no_more(points: list[Candidate], rules: Rules, last: int) -> None:
    more = Rules(last=max(last, rules.last or 0), daily=rules.daily, weekly=rules.weekly)
    fewer = Rules(last=rules.last, daily=rules.daily, weekly=rules.weekly)
    if fewer:
        assert set(kept(points, fewer)) <= set(kept(points, more))
