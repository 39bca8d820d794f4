"""Spans of time on the command line."""

import pytest

from nbdsrv.cli.durations import parse_duration, spelled
from nbdsrv.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90s", 90),
        ("5m", 300),
        ("36h", 129_600),
        ("7d", 604_800),
        ("1w2d", 777_600),
        ("1.5h", 5400),
        ("1y", 31_536_000),
        (" 1D ", 86_400),
    ],
)
def test_spans(text: str, seconds: float) -> None:
    assert parse_duration("--grace", text) == seconds


@pytest.mark.parametrize(
    "text", ["", "5", "h", "-1h", "1h-", "1x", "1h 2", "9999y", "1e9s", "\u0661s"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--grace"):
        parse_duration("--grace", text)


def test_spelled() -> None:
    assert [spelled(each) for each in (0, 59, 90, 5400, 86_400)] == [
        "0s",
        "59s",
        "1.5m",
        "1.5h",
        "1d",
    ]
