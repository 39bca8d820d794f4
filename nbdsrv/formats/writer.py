"""An image being written, from its beginning to its end.

::

    open(size) ──> begin(plan) ── data(offset, bytes) | zero(offset, length) ... ──> finish()
                                                                                └──> abort()

Contract between whoever copies and a format's writer:

* ``open`` comes first, before the plan is made: that can take minutes, in which nobody should wait
  for a refusal.
* ``data`` and ``zero`` never overlap. Where ``ordered`` they come one at a time in ascending order,
  otherwise in any order and several at once.
* What is left out is a hole where ``fresh``: zeroes, or what the backing image has there. Elsewhere
  it is whatever was there before, and so nothing is left out.
* ``data`` begins and ends on multiples of ``granularity``, except at the end of the disk.
* ``zero`` says that the range reads as zeroes whatever lies below; ranges are any.
* Before ``finish`` returns the image is complete and durable (fsync); without it there is none: a
  file is written under a temporary name beside its own and renamed by ``finish``
  (``nbdsrv.formats.target_file`` does it). A target that is not ``fresh`` is left as far as it got.
* ``abort`` may follow whatever has failed or was cancelled, ``open`` included.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["ImageWriter", "Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be written.

    Attributes:
        size: of the disk, bytes.
        data: the ranges (offset, length) that ``data`` will be called for at most, ascending,
            merged; call it to go through them. A target that cannot seek back needs it to write
            its tables first; all-zero pieces found on the way are then written as data.
    """

    size: int
    data: Callable[[], Iterator[tuple[int, int]]]


class ImageWriter(ABC):
    """Writes one image. All methods belong to one event loop; blocking work is in threads.

    Attributes:
        ordered: must data come in ascending order, one call at a time?
        granularity: bytes.
        seekable: False when the target is a pipe; may be set by the constructor.
        fresh: is the image made anew? Otherwise it is overwritten in place, and zeroes must be
            written too.
        threaded: may ``store`` be used? Only without ``ordered``; spares a change of threads.
    """

    ordered: bool = True
    granularity: int = 1
    seekable: bool = True
    fresh: bool = True
    threaded: bool = False

    @property
    def depth(self) -> int:
        """Bytes to have in flight, where the target is a remote disk (``Disk.depth``)."""
        return 0

    @abstractmethod
    async def open(self, size: int) -> None:
        """Open the target for a disk of ``size`` bytes.

        Raises:
            UnsupportedImage: the format has no such size.
            DiskError: the target has no room for it, may not be written, cannot be made.
        """

    @abstractmethod
    async def begin(self, plan: Plan) -> None:
        """Write what goes ahead of the data. Raises DiskError."""

    @abstractmethod
    async def data(self, offset: int, data: memoryview) -> None:
        """Store; done with ``data`` when it returns."""

    def store(self, offset: int, data: memoryview) -> None:
        """What ``data`` does, blocking, in any thread, beside other calls; where ``threaded``."""
        raise NotImplementedError

    @abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """Zeroes, explicitly."""

    @abstractmethod
    async def finish(self) -> None:
        """Make it complete, durable and visible."""

    @abstractmethod
    async def abort(self) -> None:
        """Leave nothing behind. Idempotent; after ``finish`` it does nothing."""
