"""Increments that may have lost zeroes, and how to know.

::

    guest    trims or zeroes a range ──> dirty, and a hole now
    < 2.21   the range is in the increment, as data that is zero                      right
    2.21 ... the range is in no frame: a restore has what was there before            lost
    2.24 ... likewise, unless --no-sparse-detection was given

Nothing in the file tells which version wrote it. Its log does, where it is still beside it:
``backup.inc.11262026143000.log`` names the version, the options and the files.

Source: virtnbdbackup's changelog (2.21, 2.24), and its extent handler.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from nbdsrv.errors import DiskError
from nbdsrv.repository.virtnbdbackup.data_file import DataFile
from nbdsrv.store.tree import Node, Tree

__all__ = ["LogText", "Logs", "is_log", "read_log"]

FIRST_LOSING = (2, 21)
KEEPS_ALL = "--no-sparse-detection"
MAX_LOG = 1 << 20
"""Bytes of a log that are looked at; it has some three thousand, more with --verbose."""
MAX_LOGS = 4096
SLACK_S = 2
"""The log is begun before the file; both times are rounded."""
_NAME = re.compile(r"backup\.\w+\.(\d{14})\.log")
_VERSION = re.compile(r"Version: v?((\d{1,4})\.(\d{1,4})\S{0,20}) Arguments: ([^\n]*)")


@dataclass(frozen=True, slots=True)
class LogText:
    """What a log says.

    Attributes:
        began: seconds since 1970, if the backup host's time zone is ours.
        version: of virtnbdbackup, or "".
        numbers: its first two, or none.
        keeps_all: were increments told to keep zeroes?
        text: of it.
    """

    began: float
    version: str
    numbers: tuple[int, ...]
    keeps_all: bool
    text: str


def is_log(node: Node) -> bool:
    """By its name."""
    return not node.directory and _NAME.fullmatch(node.name) is not None


def read_log(tree: Tree, path: str, node: Node) -> LogText | None:
    """A log, or None if it is none or cannot be read. Blocking."""
    found = _NAME.fullmatch(node.name)
    if found is None or not node.size:
        return None
    try:
        began = datetime.strptime(found[1], "%m%d%Y%H%M%S").astimezone().timestamp()
        raw = tree.read_range(path, 0, min(node.size, MAX_LOG))
    except (ValueError, OverflowError, OSError, DiskError):
        return None
    text = raw.decode(errors="replace")
    said = _VERSION.search(text)
    if said is None:
        return LogText(began, "", (), keeps_all=False, text=text)
    numbers = int(said[2]), int(said[3])
    return LogText(began, said[1], numbers, keeps_all=KEEPS_ALL in said[4], text=text)


class Logs:
    """The logs of a directory."""

    def __init__(self, logs: Sequence[LogText]) -> None:
        self._logs = sorted(logs, key=lambda log: log.began, reverse=True)[:MAX_LOGS]

    def version(self, file: DataFile) -> str | None:
        """The version that wrote a file, if its log is there."""
        log = self._of(file)
        return log.version or None if log is not None else None

    def doubt(self, file: DataFile) -> str:
        """Why a file may have lost zeroes; "" if it cannot."""
        if not file.since:
            return ""
        log = self._of(file)
        if log is None or not log.version:
            return (
                "no log tells which version wrote it; 2.21 and later leave out what the guest has"
                " zeroed or trimmed"
            )
        if log.numbers < FIRST_LOSING or log.keeps_all:
            return ""
        return f"virtnbdbackup {log.version} leaves out what the guest has zeroed or trimmed"

    def _of(self, file: DataFile) -> LogText | None:
        """The latest log of before that names the file."""
        for log in self._logs:
            if log.began <= file.created + SLACK_S and file.node.name in log.text:
                return log
        return None
