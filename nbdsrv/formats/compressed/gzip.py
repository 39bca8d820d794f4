"""gzip: one pass at open, which leaves checkpoints to start from.

::

    file   |member ............................................|member ......|
                 ^        ^        ^        ^        ^          ^        ^     checkpoints
    disk   |unit|unit|unit|unit|unit|unit|unit|unit|unit|unit|unit|unit|..     256 KiB each

gzip tells neither its size nor where one might begin, so all of it is inflated once: some
400 MB/s of disk. On the way zlib verifies every member's checksum, its state is copied every so
often, and units of zeroes are noted. The checkpoints' number is bounded: when there are too many,
every second is dropped and the distance doubles (1 GiB: 1 MiB, 1 TiB: 1 GiB).

Reading a unit inflates from the checkpoint before it; whoever reads on continues where the last
one stopped.

Facts: RFC 1952; zeroes behind the last member are padding (gzip's manual), anything else is not.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from nbdsrv.formats.compressed.inflater import Inflater
from nbdsrv.formats.compressed.source import BlockSource
from nbdsrv.formats.image_file import ImageFile

if TYPE_CHECKING:
    from zlib import _Decompress

__all__ = ["GzipSource", "survey_gzip"]

UNIT = 256 << 10
"""Bytes of the disk that are decoded at a time."""
MAX_CHECKPOINTS = 1024
"""zlib's state takes some 40 KiB: 40 MiB in all."""
MAX_WARM = 16
"""States kept for who reads on; one for each sequential reader."""
SKIP = 1 << 20
"""Bytes that are inflated at a time just to get past them."""
_ZEROES = bytes(UNIT)


class _Checkpoint(NamedTuple):
    """Where one may begin: ``state`` is None at the beginning of a member."""

    offset: int
    position: int
    state: "_Decompress | None"


class GzipSource(BlockSource):
    """Units of a disk behind gzip."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self.size = 0
        self.starts = range(0)
        self.facts: Mapping[str, object] = {}
        self._checkpoints: list[_Checkpoint] = []
        self._distance = UNIT
        self._members = 0
        self._locks = [threading.Lock() for _ in range(MAX_WARM)]
        self._warm: OrderedDict[int, Inflater] = OrderedDict()
        self._warm_lock = threading.Lock()

    # --- once --------------------------------------------------------------------------------

    def survey(self) -> Generator[None, None, None]:
        """Inflate everything once. Blocking."""
        inflater = Inflater(self._file, 0, 0, None)
        zeroes = _ZeroUnits()
        while True:
            if inflater.between_members:
                if inflater.at_end():
                    break
                self._members += 1
            self._note(inflater)
            zeroes.add(inflater.more())
            yield
        zeroes.finish()
        self.size, self.zero = inflater.offset, zeroes.flags
        self.starts = range(0, self.size, UNIT)
        self.facts = {
            "compression": "gzip",
            "members": self._members,
            "index": "checkpoints",
            "checkpoint_distance": self._distance,
        }

    def _note(self, inflater: "Inflater") -> None:
        marks = self._checkpoints
        if marks and inflater.offset - marks[-1].offset < self._distance:
            return
        marks.append(_Checkpoint(inflater.offset, inflater.position, inflater.copy_state()))
        if len(marks) > MAX_CHECKPOINTS:
            del marks[1::2]
            self._distance *= 2

    # --- any time ----------------------------------------------------------------------------

    def memory(self, number: int) -> int:
        """A unit, what is skipped before it, and the state."""
        del number
        return UNIT + 2 * SKIP

    def decode(self, number: int) -> bytes:
        begin, end = self.starts[number], self.end(number)
        index = bisect_right(self._checkpoints, begin, key=_offset_of) - 1
        # One reader per checkpoint at a time: who waits finds the state of the one before warm.
        with self._locks[index % len(self._locks)]:
            checkpoint = self._checkpoints[index]
            inflater = self._take_warm(checkpoint.offset, begin) or Inflater(
                self._file, checkpoint.offset, checkpoint.position, checkpoint.state
            )
            while inflater.offset < begin:
                inflater.more(min(begin - inflater.offset, SKIP))
            parts = []
            while inflater.offset < end:
                parts.append(inflater.more(end - inflater.offset))
            self._keep_warm(inflater)
        return b"".join(parts)

    def _take_warm(self, lowest: int, highest: int) -> "Inflater | None":
        """The state that is nearest before ``highest``; nobody else has it meanwhile."""
        with self._warm_lock:
            best = max((at for at in self._warm if lowest <= at <= highest), default=-1)
            return self._warm.pop(best, None)

    def _keep_warm(self, inflater: "Inflater") -> None:
        with self._warm_lock:
            self._warm[inflater.offset] = inflater
            if len(self._warm) > MAX_WARM:
                self._warm.popitem(last=False)


def _offset_of(checkpoint: _Checkpoint) -> int:
    return checkpoint.offset


class _ZeroUnits:
    """Notes for each unit whether all of it is zeroes."""

    def __init__(self) -> None:
        self.flags = bytearray()
        self._filled = 0
        self._zero = True

    def add(self, data: bytes) -> None:
        """The next bytes of the disk."""
        at = 0
        while at < len(data):
            take = min(UNIT - self._filled, len(data) - at)
            if self._zero:
                self._zero = data[at : at + take] == _ZEROES[:take]
            at += take
            self._filled += take
            if self._filled == UNIT:
                self.finish()

    def finish(self) -> None:
        """End the unit."""
        if self._filled:
            self.flags.append(self._zero)
        self._filled, self._zero = 0, True


def survey_gzip(file: ImageFile) -> Generator[None, None, BlockSource | None]:
    """Go through any gzip file.

    Raises:
        CorruptImage: it is broken, cut short, or something else lies behind it.
    """
    source = GzipSource(file)
    yield from source.survey()
    return source
