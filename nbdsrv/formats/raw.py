"""Raw images and block devices: disk offset = file position.

::

    disk   |== data ==|.. hole ..|== data ==|...... hole ......|  size: any number of bytes
    file   |== data ==|          |== data ==|                  |  SEEK_DATA / SEEK_HOLE

Facts relied on: lseek(2) SEEK_DATA and SEEK_HOLE (a file system without them reports all as
data), fallocate(2) for holes, preadv2(2) RWF_NOWAIT, fsync(2): an error is reported once, after
which the pages count as clean although they never reached the disk.
"""

import errno as os_errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import TypeVarTuple

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import FileRun, Run, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.allocation import discard_device, punch_hole, zero_range
from nbdsrv.formats.extent_map import ExtentMap
from nbdsrv.formats.image_file import ImageFile, open_image_file
from nbdsrv.formats.image_lock import lock_for_writing
from nbdsrv.formats.opening import Opening
from protocol.extents import DATA, HOLE, ExtentList

__all__ = ["RawDisk", "open_raw", "raw_disk"]

Ts = TypeVarTuple("Ts")

MAX_EXTENTS = 1 << 16
"""Extents looked up in one go; a status reply may stop short."""
LOOK_AHEAD = 1 << 30
"""Bytes beyond a wanted range whose layout is learnt with it."""
LOOK_AHEAD_EXTENTS = 256
"""Extents beyond which looking ahead stops."""
ZERO_CHUNK = 1 << 20
"""Bytes of zeroes written at a time where fallocate cannot help."""


class RawDisk(Disk):
    """A file or block device, or a part of one, as it is."""

    format = "raw"

    def __init__(self, workers: Workers, file: ImageFile) -> None:
        """Becomes the owner of ``file``."""
        super().__init__(workers)
        self.name = file.path
        self.size = file.size
        self._file = file
        self._fd = file.fd
        self._base = file.base
        self._map = ExtentMap()
        self._flush_failed = False
        self.abilities = Ability.MULTI_CONN
        if file.writable:
            self.abilities |= (
                Ability.WRITE | Ability.FLUSH | Ability.TRIM | Ability.ZERO | Ability.FAST_ZERO
            )
            self.abilities |= Ability.DIRECT_FUA

    # --- addresses -----------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """Data as far as it is known to go; holes only after asking the kernel again."""
        runs: list[Run] = []
        at, end = offset, offset + length
        while at < end:
            entry = self._map.find(at)
            if entry is None:
                return None
            _, known_end, data = entry
            if data:
                runs.append(self._file.run(at, known_end - at))
                at = known_end
                continue
            # This lseek does not wait for the disk: the extent was read a while ago.
            hole_end = min(self._seek(at, os.SEEK_DATA), known_end)
            if hole_end <= at:
                self._map.forget(at, known_end)
                return None
            runs.append(ZeroRun(hole_end - at))
            at = hole_end
        return runs

    def place(self, offset: int, length: int) -> FileRun | None:
        """Anywhere: an overwrite of a raw file goes where it says."""
        del length
        if Ability.WRITE not in self.abilities:
            return None
        return self._file.run(offset, self.size - offset)

    async def load(self, offset: int, length: int) -> None:
        """Ask the file system about this range, and a little beyond."""
        self._check(offset, length)
        found = await self.workers.look_up(self._look_up, offset, length, LOOK_AHEAD)
        for start, span, flags in found.ranges():
            self._map.learn(start, start + span, data=flags == DATA)

    async def extents(self, offset: int, length: int) -> ExtentList:
        """What the file system says at this moment."""
        self._check(offset, length)
        found = await self.workers.look_up(self._look_up, offset, length, 0)
        clipped = []
        for start, span, flags in found.ranges():
            if start >= offset + length:
                break
            clipped.append((min(span, offset + length - start), flags))
        return ExtentList(offset, clipped)

    def _look_up(self, offset: int, length: int, ahead: int) -> ExtentList:
        """SEEK_DATA and SEEK_HOLE in turn. In a worker thread."""
        found: list[tuple[int, int]] = []
        at, end = offset, min(offset + length, self.size)
        horizon = min(end + ahead, self.size)
        try:
            while at < end or (at < horizon and len(found) < LOOK_AHEAD_EXTENTS):
                data = self._seek(at, os.SEEK_DATA)
                found.append((data - at, HOLE))
                hole = self._seek(data, os.SEEK_HOLE)
                found.append((hole - data, DATA))
                at = hole
                if len(found) >= MAX_EXTENTS:
                    break
        except OSError as error:
            raise DiskError.from_os(f"mapping {self.name}", error, at) from error
        return ExtentList(offset, found)

    def _seek(self, at: int, whence: int) -> int:
        """Next data or hole at or after ``at``; the end of the disk where there is none.

        What a truncated file has lost is neither: it counts as data, so that reading it fails
        instead of giving zeroes.
        """
        base, size = self._base, self.size
        try:
            return min(os.lseek(self._fd, base + at, whence) - base, size)
        except OSError as error:
            if error.errno == os_errno.EINVAL:  # a block device: it has no holes it knows of
                return at if whence == os.SEEK_DATA else size
            if error.errno != os_errno.ENXIO:
                raise
        info = os.fstat(self._fd)
        if stat.S_ISREG(info.st_mode) and info.st_size - base < size and whence == os.SEEK_DATA:
            return max(at, info.st_size - base)
        return size

    # --- changes -------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        """Into the page cache; durable after ``flush``."""
        self._check_change(offset, len(data))
        await self._change(self._write, offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """By fallocate; by writing zeroes only where the file system leaves no choice."""
        self._check_change(offset, length)
        self._forget(offset, length)
        await self._change(self._zero, offset, length, punch, fast)
        self._forget(offset, length)

    async def trim(self, offset: int, length: int) -> None:
        """Punch a hole or discard; a file system that cannot is not an error."""
        self._check_change(offset, length)
        self._forget(offset, length)
        await self._change(self._trim, offset, length)
        self._forget(offset, length)

    async def flush(self) -> None:
        """fdatasync; once it has failed it fails for good, since what was lost stays lost."""
        if Ability.WRITE not in self.abilities:
            return
        self._check_flushed()
        try:
            await self.workers.run(os.fdatasync, self._fd)
        except OSError as error:
            self._flush_failed = True
            raise DiskError.from_os(f"flushing {self.name}", error) from error
        self._check_flushed()  # the kernel tells of a lost write once: to a flush beside this one

    def _check_flushed(self) -> None:
        if self._flush_failed:
            text = f"{self.name}: an earlier flush failed and data was lost; open the image anew"
            raise DiskError(text)

    async def cache(self, offset: int, length: int) -> None:
        """Read ahead into the page cache, without waiting for it."""
        advise = os.posix_fadvise
        where = (self._base + offset, length)
        await self._change(advise, self._fd, *where, os.POSIX_FADV_WILLNEED)

    async def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._fd = -1
            await self.workers.look_up(self._file.close)

    def _check_change(self, offset: int, length: int) -> None:
        if Ability.WRITE not in self.abilities:
            raise self._read_only()
        self._check(offset, length, os_errno.ENOSPC)

    async def _change(self, work: Callable[[*Ts], object], *args: *Ts) -> None:
        try:
            await self.workers.run(work, *args)
        except OSError as error:
            raise DiskError.from_os(self.name, error) from error

    def _forget(self, offset: int, length: int) -> None:
        self._map.forget(offset, offset + length)
        self.epoch += 1

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], self._base + offset + done)

    def _zero(self, offset: int, length: int, punch: bool, fast: bool) -> None:  # noqa: FBT001
        method = punch_hole if punch else zero_range
        try:
            method(self._fd, self._base + offset, length)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            if fast:
                raise OSError(os_errno.EOPNOTSUPP, "no faster than writing") from error
            self._write_zeroes(offset, length)

    def _write_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, ZERO_CHUNK)))
        offset += self._base
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, zeroes[: end - offset], offset)

    def _trim(self, offset: int, length: int) -> None:
        discard = discard_device if self._file.device else punch_hole
        try:
            discard(self._fd, self._base + offset, length)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise


_CANNOT = frozenset({os_errno.EOPNOTSUPP, os_errno.ENOSYS, os_errno.ENOTTY, os_errno.EINVAL})
"""What fallocate and BLKDISCARD answer where the request makes no sense to the file system;
EINVAL is a device's answer to a range that is not whole sectors."""


async def raw_disk(file: ImageFile, opening: Opening) -> RawDisk:
    """``file`` as it is; becomes its owner, unless it raises.

    Raises:
        DiskError: it would be written to, and another program has it open.
    """
    if file.writable:
        await opening.workers.look_up(_lock, file)
    return RawDisk(opening.workers, file)


async def open_raw(path: str, workers: Workers, *, writable: bool) -> RawDisk:
    """Open a raw image or block device; read-only unless ``writable``, and then really so.

    Raises:
        DiskError: missing, no permission, a directory, not a disk at all; to be written to while
            another program has it open.
    """
    return await workers.look_up(_open, path, workers, writable)


def _open(path: str, workers: Workers, writable: bool) -> RawDisk:  # noqa: FBT001
    file = open_image_file(path, writable=writable)
    try:
        if writable:
            _lock(file)
    except BaseException:
        file.close()
        raise
    return RawDisk(workers, file)


def _lock(file: ImageFile) -> None:
    # There are no tables that two of ours could fall out over: they may be partitions of it.
    lock_for_writing(file, beside_ours=True)
