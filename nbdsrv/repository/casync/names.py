"""What index files are called as restore points.

::

    vm1-2026-01-01.caibx              vm1/disk@2026-01-01
    vm1/2026-01-01T0300.caibx         vm1/disk@2026-01-01T0300
    vm1/sda-2026-01-01.caibx          vm1/sda@2026-01-01            several disks, one point
    disk.caibx                        disk/disk@current             its time is the file's
    vm1/sda.caibx                     vm1/sda@current
    2026-01-01.caibx                  <the directory>/disk@2026-01-01

A date at the end of the name is the point, as it is written; it counts as UTC. What is before it
is the disk in a directory, and the group where there is no directory.
"""

import re
from datetime import UTC, datetime
from typing import NamedTuple

__all__ = ["CURRENT", "SUFFIX", "Name", "name_of"]

SUFFIX = ".caibx"
CURRENT = "current"
"""The point of what has no date: it is whatever was written there last."""
DISK = "disk"
"""The disk where nothing says another name."""

_DATED = re.compile(
    r"(?:(?P<name>.+?)[-_.@ ])?"
    r"(?P<stamp>(?P<y>[0-9]{4})-?(?P<mo>[0-9]{2})-?(?P<d>[0-9]{2})"
    r"(?:[T_ -]?(?P<h>[0-9]{2})[:.-]?(?P<mi>[0-9]{2})(?:[:.-]?(?P<s>[0-9]{2}))?Z?)?)"
)


class Name(NamedTuple):
    """Group, disk and point; ``created`` is None where the name has no date."""

    group: str
    disk: str
    point: str
    created: float | None


def name_of(path: str, root: str) -> Name:
    """What an index is called.

    Args:
        path: below the root, with its suffix.
        root: the last part of the root's path.
    """
    directory, _, file = path.rpartition("/")
    stem = file.removesuffix(SUFFIX)
    match = _DATED.fullmatch(stem)
    created = _moment(match) if match else None
    if match is None or created is None:
        return Name(directory or stem, stem if directory else DISK, CURRENT, None)
    name = match["name"]
    if directory:
        return Name(directory, name or DISK, match["stamp"], created)
    return Name(name or root or DISK, DISK, match["stamp"], created)


def _moment(match: re.Match[str]) -> float | None:
    parts = [int(match[each] or 0) for each in ("y", "mo", "d", "h", "mi", "s")]
    try:
        return datetime(*parts, tzinfo=UTC).timestamp()  # type: ignore[misc, arg-type]
    except ValueError:
        return None
