"""The Disk: what every image, restore point, wrapper and remote export looks like.

Two halves, by what they may cost::

    on the event loop, never blocking       locate  place  begin_read
    may wait (async; threads inside)        load  read_into  extents  status
                                            write  zero  trim  flush  cache  close

``locate`` is how fast reads are served: it only says where bytes are, and the engine moves
them (``nbdsrv.net.transmission``). ``read_into`` is the same for everyone else.
"""

import errno as os_errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Flag, auto

from nbdsrv.disk.flights import Landing
from nbdsrv.disk.runs import BlockRun, FileRun, Run, ZeroRun
from nbdsrv.disk.watch import Watch
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import ExtentList
from protocol.terms import BlockSizes

__all__ = ["Ability", "Disk", "read_runs"]


class Ability(Flag):
    """What a Disk can do besides being read.

    DIRECT_FUA: what is written where ``place`` says is durable once its bytes are. Without it the
    tables may lag behind, and a durable write is ``write`` and ``flush``.
    """

    WRITE = auto()
    FLUSH = auto()
    TRIM = auto()
    ZERO = auto()
    FAST_ZERO = auto()
    MULTI_CONN = auto()
    ROTATIONAL = auto()
    DIRECT_FUA = auto()


class Disk(ABC):
    """A range of bytes with holes.

    Concurrency: all methods belong to one event loop and may run concurrently with each other;
    overlapping writes and reads that are in flight together have no order.

    Cancellation: an awaited method that is cancelled may have done all, some or none of its
    work, and returns only when no thread uses its buffers any more. The Disk stays usable.

    Errors: ``DiskError``; for reads its ``offset`` says how far the data is good.

    Attributes:
        name: for messages, usually the path.
        size: bytes.
        format: short lower-case name, for ``info``.
        abilities: see ``Ability``.
        block_sizes: constraints in bytes.
        contexts: names of the meta contexts ``status`` answers for.
        epoch: changes whenever something ``locate`` answered may no longer be true.
        workers: the threads it works on; a wrapper works on those of what it wraps.
        further_files: paths of what its bytes lie in beside the file it is named after.
        backing: the Disk below, which gives what this one does not have; closed with it.
        remote: are all its bytes elsewhere, so that ``locate`` has nothing to say, and to be had by
            ``begin_read``?
        landing: where whole blocks may go, of a Disk that must know of each write; or None.
    """

    name: str
    size: int
    format: str
    abilities: Ability = Ability.MULTI_CONN  # all clients share one Disk
    block_sizes: BlockSizes = BlockSizes()
    contexts: tuple[str, ...] = (ALLOCATION, ALLOCATION_DEPTH)
    epoch: int = 0
    further_files: tuple[str, ...] = ()
    backing: "Disk | None" = None
    remote: bool = False
    landing: Landing | None = None

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    @property
    def facts(self) -> Mapping[str, object]:
        """What ``info`` tells beyond size and allocation: JSON values under snake_case names."""
        return {}

    @property
    def depth(self) -> int:
        """Bytes whoever reads or writes all of it should have in flight; 0 if that is all the same.

        Changes with what the way to a remote disk turns out to hold: ask again and again.
        """
        return 0

    @abstractmethod
    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """Where these bytes are; never blocks.

        The runs are consecutive from ``offset`` and cover at least ``length`` bytes; the last
        one may reach further, as far as is known anyway.

        Returns:
            None if the metadata is not in memory: ``await load()`` and ask again.
        """

    @abstractmethod
    async def load(self, offset: int, length: int) -> None:
        """Bring into memory what ``locate`` needs for this range."""

    def place(self, offset: int, length: int) -> FileRun | None:
        """Where an overwrite may go directly; None means only ``write`` will do.

        Never blocks. The run begins at ``offset`` and may reach beyond ``length``; it holds until
        ``epoch`` changes.
        """
        del offset, length
        return None

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        length = len(buffer)
        if length:
            runs = await self.runs(offset, length)
            await self.workers.run(read_runs, self.name, offset, runs, buffer)

    def begin_read(self, offset: int, buffer: memoryview, done: Callable[[bool], None]) -> bool:
        """``read_into`` without anybody who waits; for the loop. Need not be able to.

        Args:
            offset: bytes; the range is within the disk.
            buffer: to be filled; belongs to the read until it has ended.
            done: called once from the loop when it has, never from within: are the bytes there?
                If not, ``read_into`` gets them or tells why not.

        Returns:
            False: not this way, or not now. Nothing is begun.
        """
        del offset, buffer, done
        return False

    def attend(self, watch: Watch) -> None:
        """Have ``watch`` tell of what comes from elsewhere for ``begin_read``; for the loop."""

    async def runs(self, offset: int, length: int) -> Sequence[Run]:
        """``locate``, loading as needed."""
        for _ in range(1000):
            runs = self.locate(offset, length)
            if runs is not None:
                return runs
            await self.load(offset, length)
        raise DiskError(f"{self.name}: the map of the image changes too fast to be read")

    @abstractmethod
    async def extents(self, offset: int, length: int) -> ExtentList:
        """Allocation from ``offset`` on: at least one extent, at most ``length`` bytes in all.

        May stop short where finding out more would take long; ask again from there.
        """

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Extents of one of ``contexts``, under the conditions of ``extents``."""
        found = await self.extents(offset, length)
        if context == ALLOCATION:
            return found
        if context == ALLOCATION_DEPTH:
            return ExtentList(offset, [(e.length, 0 if e.flags & 1 else 1) for e in found])
        raise self._no_context(context)

    async def write(self, offset: int, data: memoryview) -> None:
        """Store ``data``; visible to every later read, durable after ``flush``."""
        raise self._read_only()

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Make the range read as zeroes.

        Args:
            offset: bytes.
            length: bytes.
            punch: may the range become a hole?
            fast: fail with EOPNOTSUPP, changing nothing, unless this beats writing zeroes.
        """
        raise self._read_only()

    async def trim(self, offset: int, length: int) -> None:
        """The range is no longer needed; may do nothing."""
        raise self._read_only()

    async def flush(self) -> None:
        """Everything written before this call is durable when it returns."""

    async def cache(self, offset: int, length: int) -> None:
        """The range will be read soon; may do nothing."""

    @abstractmethod
    async def close(self) -> None:
        """Release descriptors and memory. Flushes nothing; idempotent."""

    def _no_context(self, context: str) -> DiskError:
        return DiskError(f"{self.name} has no context {context}", os_errno.EINVAL)

    def _check(self, offset: int, length: int, errno: int = os_errno.EINVAL) -> None:
        """Raises DiskError for a range that is not within the disk."""
        if offset < 0 or length < 0 or offset + length > self.size:
            text = f"{self.name}: {length} bytes at {offset} reach beyond its end at {self.size}"
            raise DiskError(text, errno)

    def _read_only(self) -> DiskError:
        return DiskError(f"{self.name} is read-only", os_errno.EROFS)


def read_runs(name: str, offset: int, runs: Sequence[Run], buffer: memoryview) -> None:
    """Fill ``buffer`` from ``runs``, blocking. For worker threads.

    Raises:
        DiskError: with the disk offset of the first byte that could not be read.
    """
    at = 0
    for run in runs:
        if at >= len(buffer):
            break
        part = buffer[at : at + run.length]
        if isinstance(run, FileRun):
            _pread_exactly(name, run, part, offset + at)
        elif isinstance(run, ZeroRun):
            part[:] = bytes(len(part))
        elif isinstance(run, BlockRun):
            _decode_exactly(name, run, part, offset + at)
        else:
            raise DiskError(f"{name}: only read_into gives these bytes", offset=offset + at)
        at += len(part)


def _decode_exactly(name: str, run: BlockRun, part: memoryview, offset: int) -> None:
    try:
        block = run.blocks.get(run.key, len(part))
    except DiskError as error:  # a new one: others may be waiting for the same block
        raise type(error)(str(error), error.errno, offset) from error
    end = run.skip + len(part)
    if len(block) < end:
        text = f"corrupt image: {name} at {offset}: a block decodes to {len(block)} bytes only"
        raise CorruptImage(text, offset=offset)
    part[:] = memoryview(block)[run.skip : end]


def _pread_exactly(name: str, run: FileRun, part: memoryview, offset: int) -> None:
    done = 0
    while done < len(part):
        try:
            count = os.preadv(run.fd, [part[done:]], run.position + done)
        except OSError as error:
            raise DiskError.from_os(f"reading {name}", error, offset + done) from error
        if not count:
            end = run.position + done
            text = f"{name} ends before byte {end}, was it truncated?"
            raise DiskError(text, offset=offset + done)
        done += count
