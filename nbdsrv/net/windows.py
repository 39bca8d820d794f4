"""Where the bytes of a disk lie in files, as far as clients have asked lately.

::

    disk      |   256 KiB   |   256 KiB   |   256 KiB   | ...
    windows        [======]         [==========]             the last one met in each

To ask ``Disk.locate`` takes 2 us, as long as all the rest of a 4 KiB read from memory; to find it
here a tenth of that. In an image whose blocks lie scattered that is nearly every read.

Rule: a window is true for one ``epoch`` of the disk. Who looks has compared it since the loop had
its last turn (``renew``), and nothing but the loop changes it.
"""

from nbdsrv.disk.residency import Residency
from nbdsrv.disk.runs import FileRun

__all__ = ["WINDOW_BITS", "Window", "Windows"]

WINDOW_BITS = 18
MAX_WINDOWS = 1 << 13
"""Remembered of one disk, 2 MiB of memory; then all are forgotten. 2 GiB are read at random."""

Window = tuple[int, int, int, int, int]
"""(start, end, descriptor, what to add to an offset for a position in the file, flags): bytes of
the disk, and how ``preadv`` is told to get them without waiting."""


class Windows(dict[int, tuple[Window, Residency]]):
    """By number of the 256 KiB that the read which met it began in. Belongs to the loop."""

    __slots__ = ("_epoch",)

    def __init__(self) -> None:
        super().__init__()
        self._epoch = -1

    def renew(self, epoch: int) -> None:
        """The disk has this epoch now: what was true before is forgotten."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.clear()

    def met(self, offset: int, run: FileRun) -> Window:
        """What ``locate`` has said of the bytes from ``offset`` on; remembered."""
        fd, position, length, residency = run
        start, end, shift = offset, offset + length, position - offset
        key = offset >> WINDOW_BITS
        known = self.get(key)
        if known is not None:
            # A run begins where it was asked for: what lies before that was met earlier.
            before, until, other, its_shift, _ = known[0]
            if other == fd and its_shift == shift and before <= end and start <= until:
                start, end = min(before, start), max(until, end)
        elif len(self) >= MAX_WINDOWS:
            self.clear()
        window = (start, end, fd, shift, residency.inline)
        self[key] = (window, residency)
        return window
