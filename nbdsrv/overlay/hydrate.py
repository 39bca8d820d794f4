"""The base, copied into the overlay while the guest runs, so that no read goes there any more.

::

    states   BASE  | DATA | BASE (zeroes) | BASE  | ...          boot trace first, then ascending
               │                             │
    base  ── read_into ── Overlay.adopt ── COPIED ── flush now and then

Zeroes of the base are not copied: it is known without reading that they are there. So a finished
overlay reads nothing from the base, and still needs it to be opened: that it is the right one is
proven each time, and what it says of zeroes is asked of it.

Guests come first (``quiet``), then the rate. What was copied is durable at the next flush; after a
restart what is COPIED is passed over. A base that cannot be read right now is waited for, a damaged
part of it is left out and counted, and the last of the disk's free space is the guest's.
"""

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator, Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.throttle import Rate
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.overlay.block_map import BLOCK, BLOCK_BITS
from nbdsrv.overlay.overlay import Overlay
from nbdsrv.overlay.quiet import Quiet
from nbdsrv.overlay.states import BASE
from protocol.extents import ZERO

__all__ = ["HYDRATE_PATIENCE_S", "Hydration"]

log = logging.getLogger(__name__)

HYDRATE_PATIENCE_S = 0.25
"""Seconds a piece waits at most for the guests to pause: some megabytes a second, whatever they
do."""
PIECE = 1 << 20
"""Bytes copied at a time; a guest that comes meanwhile waits for no more than that."""
LANES = 3
"""Pieces on their way at a time: a distant base takes its time for each."""
FLUSH_BYTES = 64 << 20
"""Copied between two flushes: so much is copied again after a crash."""
SURVEY = 1 << 30
"""Bytes of the base whose extents are asked for at a time."""
RETRY_S = 5.0
"""Seconds until a base that did not answer is asked again."""
RESERVE_SHARE, RESERVE_MAX = 20, 4 << 30
"""Of the file system, a twentieth or four gigabytes stay free: the guest's writes need them."""
ROOM_S = 10.0
"""Seconds until a disk that was too full is looked at again."""

Range = tuple[int, int]
"""Offset and length, bytes."""


class Hydration:
    """Of one overlay, while it is open. Belongs to its loop.

    Attributes:
        state: ``waiting`` for its beginning, ``copying``, ``complete``, ``incomplete`` (parts of
            the base are damaged), ``no room``, ``base away``.
        position: bytes of the disk that have been gone through.
        copied: bytes that this run has copied.
        damaged: bytes that the base cannot give.
        error: what went wrong last, or "".
    """

    def __init__(self, overlay: Overlay, base: Disk, quiet: Quiet, rate: Rate) -> None:
        """Nothing is read yet.

        Args:
            overlay: open.
            base: what it lies over.
            quiet: the guests' pauses.
            rate: what is read at most.
        """
        self.state = "waiting"
        self.position = 0
        self.copied = 0
        self.damaged = 0
        self.error = ""
        self._overlay = overlay
        self._base = base
        self._quiet = quiet
        self._rate = rate
        self._unflushed = 0

    @property
    def facts(self) -> dict[str, object]:
        """For ``status``."""
        return {
            "state": self.state,
            "position": self.position,
            "size": self._overlay.size,
            "copied_bytes": self.copied,
            "damaged_bytes": self.damaged,
            "bytes_per_s": self._rate.bytes_per_s if self._rate.bytes_per_s < math.inf else None,
            "error": self.error or None,
        }

    async def run(self, first: Sequence[Range] = ()) -> None:
        """Copy all of it; ``first`` comes first. May be cancelled at any time.

        Raises:
            DiskError: the overlay can store nothing any more.
        """
        self.state = "copying"
        for offset, length in first:
            end = min(offset + length, self._overlay.size)
            await self._copy_range(offset & -BLOCK, end)
        at = 0
        while at < self._overlay.size:
            at = await self._copy_next(at)
            self.position = at
        await self._flush()
        self.state = "incomplete" if self.damaged else "complete"
        if not self.damaged:
            self.error = ""
        name, copied = self._overlay.name, self.copied
        log.info("overlay.hydrated overlay=%s copied=%d damaged=%d", name, copied, self.damaged)

    async def _copy_next(self, at: int) -> int:
        """What is the base's around there; from where to go on."""
        states = self._overlay.settled_states()
        blocks = -(-self._overlay.size >> BLOCK_BITS)
        state, stop = states.stretch(at >> BLOCK_BITS, blocks)
        end = min(stop << BLOCK_BITS, self._overlay.size)
        if state != BASE:
            return end
        end = min(end, at + SURVEY)
        await self._copy_range(at, end)
        return end

    async def _copy_range(self, offset: int, end: int) -> None:
        """Copy what is data, in a few lanes."""
        pieces = self._pieces(offset, end)
        turn = asyncio.Lock()

        async def lane() -> None:
            while True:
                async with turn:
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                await self._copy(*piece)

        try:
            async with asyncio.TaskGroup() as lanes:
                for _ in range(LANES):
                    lanes.create_task(lane())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _pieces(self, offset: int, end: int) -> AsyncIterator[Range]:
        """Whole blocks of what the base has data in and is still the base's; (offset, end)."""
        at = offset
        while at < end:
            found = await self._insist_extents(at, end - at)
            for start, stop, data in found:
                # A block is copied if any of it is data.
                first, last = start & -BLOCK, min(-(-stop // BLOCK) * BLOCK, self._overlay.size)
                while data and first < last:
                    upto = min((first // PIECE + 1) * PIECE, last)
                    if self._is_base(first, upto):
                        yield first, upto
                    first = upto
                at = stop

    def _is_base(self, offset: int, end: int) -> bool:
        """Is any of these blocks the base's?"""
        first, last = offset >> BLOCK_BITS, (end + BLOCK - 1) >> BLOCK_BITS
        stretches = self._overlay.settled_states().stretches(first, last)
        return any(state == BASE for _, _, state in stretches)

    async def _insist_extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        while True:
            try:
                found = await self._base.extents(offset, length)
            except CorruptImage as error:
                self._leave_out(length, error)
                return [(offset, offset + length, False)]
            except DiskError as error:
                await self._base_away(error)
                continue
            at, rows = offset, []
            for each in found:
                rows.append((at, at + each.length, not each.flags & ZERO))
                at += each.length
            return rows

    async def _copy(self, offset: int, end: int) -> None:
        buffer = memoryview(bytearray(end - offset))
        while True:
            await self._quiet.pause()
            await self._rate.take(len(buffer))
            await self._await_room()
            try:
                await self._base.read_into(offset, buffer)
            except CorruptImage as error:
                if len(buffer) > BLOCK:
                    await self._copy_blocks(offset, end)
                else:
                    self._leave_out(len(buffer), error)
                return
            except DiskError as error:
                await self._base_away(error)
                continue
            break
        self.state = "copying"
        taken = await self._overlay.adopt(offset, buffer)
        self.copied += taken
        self._unflushed += taken
        if self._unflushed >= FLUSH_BYTES:
            await self._flush()

    async def _copy_blocks(self, offset: int, end: int) -> None:
        """Around something that is damaged: halves, down to a block."""
        middle = (offset + end >> BLOCK_BITS + 1) << BLOCK_BITS
        if middle <= offset:
            middle = offset + BLOCK
        await self._copy(offset, middle)
        await self._copy(middle, end)

    async def _flush(self) -> None:
        self._unflushed = 0
        await self._overlay.flush()

    # --- what may go wrong -----------------------------------------------------------------------

    def _leave_out(self, length: int, error: DiskError) -> None:
        self.damaged += length
        if not self.error:
            log.warning("overlay.hydrate overlay=%s reason=%s", self._overlay.name, error)
        self.error = str(error)

    async def _base_away(self, error: DiskError) -> None:
        if self.state != "base away":
            log.warning("overlay.hydrate overlay=%s reason=%s", self._overlay.name, error)
        self.state, self.error = "base away", str(error)
        await asyncio.sleep(RETRY_S)

    async def _await_room(self) -> None:
        """The last of the free space is not ours."""
        while (lacking := await self._base.workers.look_up(_lacking, self._overlay.name)) > 0:
            if self.state != "no room":
                text = f"{lacking} bytes too few are free; it goes on when there are"
                log.warning("overlay.hydrate overlay=%s reason=%s", self._overlay.name, text)
                self.error = text
            self.state = "no room"
            await asyncio.sleep(ROOM_S)


def _lacking(path: str) -> int:
    """Bytes by which the file system has less room than is to stay free. Blocking."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    reserve = min(found.f_blocks * found.f_frsize // RESERVE_SHARE, RESERVE_MAX)
    return reserve - found.f_bavail * found.f_frsize
