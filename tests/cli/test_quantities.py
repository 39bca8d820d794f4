"""Sizes and rates."""

import pytest

from nbdsrv.cli.quantities import parse_rate, parse_size
from nbdsrv.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("64K", 65_536), ("4m", 4 << 20), ("1.5GiB", 3 << 29), ("2 T", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--x", text) == size
    assert parse_rate("--x", f"{text}/s") == size


@pytest.mark.parametrize("text", ["", "0", "-1", "K", "1X", "1e9", "9" * 30, "0.0000001"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--x"):
        parse_size("--x", text)
