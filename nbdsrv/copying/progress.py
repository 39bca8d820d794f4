"""How far a copy has come, on a terminal: bar, bytes, rate, time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Advance", "Bar", "progress"]

Advance = Callable[[int, int], None]
"""Called with (bytes done, bytes to do)."""


class Bar:
    """What is shown; an ``Advance``, and another one for looking where there is anything to do."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._looking = False
        self._begun: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        shown = self.begin()
        if self._looking:  # the rate begins anew
            self._looking = False
            shown.reset(shown.task_ids[0], description=self._what, total=total)
        shown.update(shown.task_ids[0], completed=done, total=total)

    def looking(self, done: int, total: int) -> None:
        """So much of a disk's map is known, before anything is done."""
        self._looking = True
        shown = self.begin()
        text = f"{self._what}: looking for data"
        shown.update(shown.task_ids[0], description=text, completed=done, total=total)

    def begin(self) -> "Progress":
        """Show it, if that has not begun."""
        if self._begun is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._begun = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._begun.add_task(self._what, total=None)
            self._begun.start()
        return self._begun

    def end(self) -> None:
        """Take it away."""
        if self._begun is not None:
            self._begun.stop()


@contextmanager
def progress(what: str, *, quiet: bool, at_once: bool = True) -> Iterator[Bar | None]:
    """Show it on standard error until the end of the block, if that is a terminal.

    Unless ``at_once``, only when there is something to tell: loading what draws it takes a while.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bar = Bar(what)
    if at_once:
        bar.begin()
    try:
        yield bar
    finally:
        bar.end()
