"""Sizes and rates as people write them: ``256K``, ``4M``, ``100M/s``."""

import re

from nbdsrv.errors import ConfigError

__all__ = ["parse_rate", "parse_size"]

_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(option: str, text: str) -> int:
    """Bytes; units are binary.

    Raises:
        ConfigError: no size, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * (1 << _UNITS[match[2].upper()])) if match else 0
    if size <= 0:
        raise ConfigError(f"{option} {text}: not a size; for instance 256K, 4M or 1G")
    return size


def parse_rate(option: str, text: str) -> int:
    """Bytes a second.

    Raises:
        ConfigError: no rate, or none at all.
    """
    return parse_size(option, text.strip().removesuffix("/s"))
