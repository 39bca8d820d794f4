"""A moment of an overlay as a read-only Disk, while the guest writes on.

::

    Overlay    | A | B | C | D |        write to B:  1  the old B is set aside
    aside      | . | B | . | . |                     2  B is written
    Frozen     A aside.B C D            a block that is not aside is as it is in the overlay

What is set aside lies in a scratch file with the disk's own addresses, which has no name and is
gone with the process; it holds at most what is written meanwhile. Reads look again whether a block
was set aside while they read it, for then they may have read what came after.

If nothing more can be set aside (the file system is full) the frozen view ends, not the guest's
write: what it shows is an error from then on.
"""

import errno as os_errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nbdsrv.disk.disk import read_runs
from nbdsrv.disk.residency import NEVER, Residency
from nbdsrv.disk.runs import FileRun, RemoteRun, Run
from nbdsrv.errors import DiskError
from nbdsrv.overlay.block_map import BLOCK_BITS, BlockMap
from nbdsrv.overlay.layered import Layered
from nbdsrv.overlay.states import BASE, IN_FILE, ZERO

if TYPE_CHECKING:
    from nbdsrv.overlay.overlay import Overlay

__all__ = ["Frozen", "copy_range"]

COPY = 1 << 20
"""Bytes set aside at a time."""
ASIDE = 1
"""Added to a block's state where it is noted as set aside, for 0 says that it is not."""


class Frozen(Layered):
    """Use ``Overlay.freeze``. Closing it thaws."""

    def __init__(self, overlay: "Overlay", thawed: Callable[[], None]) -> None:
        super().__init__(overlay.workers, overlay.base, f"{overlay.name}@frozen", overlay.point)
        self._overlay = overlay
        self._aside = BlockMap()
        self._scratch = -1
        self._thawed = thawed
        self._broken = ""
        self._uncached = Residency(NEVER)

    def make_scratch(self, path: str) -> None:
        """Open the scratch file in a directory. Blocking; raises OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self._scratch = os.open(path, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in {os_errno.EOPNOTSUPP, os_errno.EISDIR, os_errno.ENOENT}:
                raise
            name = os.path.join(path, "scratch")  # a file system without nameless files
            self._scratch = os.open(name, flags | os.O_CREAT | os.O_TRUNC, 0o600)
            os.unlink(name)

    @property
    def facts(self) -> Mapping[str, object]:
        """The overlay's."""
        return self._overlay.facts

    # --- what the guest is about to change -----------------------------------------------------

    async def keep(self, first: int, end: int) -> None:
        """Set blocks aside before they change; whoever changes them has claimed them."""
        if self._closed or self._broken:
            return
        for start, stop, aside in list(self._aside.stretches(first, end)):
            if not aside:
                await self._keep(start, stop)

    async def _keep(self, first: int, end: int) -> None:
        for start, stop, state in list(self._overlay.settled_states().stretches(first, end)):
            if state in IN_FILE:
                position, length = start << BLOCK_BITS, (stop - start) << BLOCK_BITS
                try:
                    await self.workers.run(self._overlay.copy_out, self._scratch, position, length)
                except OSError as error:
                    text = os.strerror(error.errno or os_errno.EIO)
                    self._broken = f"what was written meanwhile found no room: {text}"
                    return
            self._aside.set(start, stop, state + ASIDE)

    # --- reading -------------------------------------------------------------------------------

    def _stretch(self, block: int, end: int) -> tuple[int, int]:
        aside, stop = self._aside.stretch(block, end)
        if aside:
            return aside - ASIDE, stop
        return self._overlay.settled_states().stretch(block, stop)

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """Only ``read_into`` knows whether what it has read still counts."""
        del offset
        return (RemoteRun(length),)

    async def load(self, offset: int, length: int) -> None:
        """There is nothing ``locate`` would need."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """What the disk held at that moment."""
        self._check(offset, len(buffer))
        self._check_open()
        if not len(buffer):
            return
        first, end = self._blocks_of(offset, len(buffer))
        at = first
        while at < end:
            aside, stop = self._aside.stretch(at, end)
            begin = max(at << BLOCK_BITS, offset)
            upto = min(stop << BLOCK_BITS, offset + len(buffer))
            part = buffer[begin - offset : upto - offset]
            if aside:
                await self._read_aside(aside - ASIDE, begin, part)
            else:
                await self._read_live(begin, part)
                _, still = self._aside.stretch(at, stop)
                if self._aside.get(at) or still < stop:
                    continue  # some of it was set aside meanwhile: what was read may be newer
            self._check_open()
            at = stop

    async def _read_aside(self, state: int, offset: int, part: memoryview) -> None:
        if state == ZERO:
            part[:] = bytes(len(part))
        elif state == BASE:
            await self.base.read_into(offset, part)
        else:
            run = FileRun(self._scratch, offset, len(part), self._uncached)
            await self.workers.run(read_runs, self.name, offset, (run,), part)

    async def _read_live(self, offset: int, part: memoryview) -> None:
        await self._overlay.read_into(offset, part)

    async def close(self) -> None:
        """Thaw: nothing is set aside any more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._thawed()
        if self._scratch >= 0:
            # Whoever is setting something aside right now must not find another file here.
            await self._overlay.changing.landed()
            fd, self._scratch = self._scratch, -1
            os.close(fd)

    def _check_open(self) -> None:
        super()._check_open()
        if self._broken:
            raise DiskError(f"{self.name}: {self._broken}", os_errno.ENOSPC)


def copy_range(source: int, target: int, position: int, length: int) -> None:
    """The same range of another file. Blocking; raises OSError."""
    end = position + length
    buffer = memoryview(bytearray(min(COPY, length)))
    while position < end:
        count = os.preadv(source, [buffer[: end - position]], position)
        if not count:
            raise OSError(os_errno.EIO, "the data file was truncated")
        done = 0
        while done < count:
            done += os.pwrite(target, buffer[done:count], position + done)
        position += count
