"""What threads do for an image that is written to: fill new clusters, and write tables in order.

Rule: an outcome is left in the job itself, because whoever waits for it may have been cancelled.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from nbdsrv.disk.disk import read_runs
from nbdsrv.disk.runs import Run, ZeroRun
from nbdsrv.errors import CorruptImage
from nbdsrv.formats.allocation import punch_hole
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow2.refcounts import Changes, Refcounts, Taken
from nbdsrv.formats.qcow2.writable_tables import Snapshot

__all__ = ["NewClusters", "Turns", "WriteBack", "release", "store"]


log = logging.getLogger(__name__)


def store(file: ImageFile, position: int, data: memoryview | bytes) -> None:
    """Write all of ``data``. Raises OSError."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(file.fd, view[done:], file.base + position + done)


class Turns:
    """Who allocates first: in the order of requests, whatever order threads are woken in.

    So what is written one after the other lies one after the other, even when several requests are
    under way. Jobs start in the order they are submitted in: nobody waits for one that cannot run.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._issued = self._next = 0

    def issue(self) -> int:
        """A ticket; on the loop, for the job that is submitted next."""
        self._issued += 1
        return self._issued - 1

    @contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Wait until everybody with an earlier ticket is through. In a thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == ticket)
        try:
            yield
        finally:
            with self._changed:
                self._next += 1
                self._changed.notify_all()


class NewClusters:
    """Clusters to be allocated and filled.

    Attributes:
        stored: what was allocated, in the guest's order; empty unless all of it is filled.
    """

    def __init__(
        self,
        file: ImageFile,
        refcounts: Refcounts,
        name: str,
        length: int,
        offset: int = 0,
        before: Sequence[Run] = (),
        data: memoryview | bytes = b"",
        skip: int = 0,
        after: Sequence[Run] = (),
        after_length: int = 0,
    ) -> None:
        """``length`` bytes of whole clusters, for the guest's bytes at ``offset``::

        | before | data | after | 0 |
         skip             after_length
        """
        self._file = file
        self._refcounts = refcounts
        self._name = name
        self._length = length
        self._offset = offset
        self._before = before
        self._data = data
        self._skip = skip
        self._after = after
        self._after_length = after_length
        self.stored: list[Taken] = []

    def store(self, turns: Turns, ticket: int) -> None:
        """Allocate and fill. Raises DiskError or OSError, and nothing is allocated then."""
        with turns.turn(ticket):
            taken = self._take()
        try:
            data = memoryview(self._data)
            end = self._skip + len(data)
            parts = (
                (0, self._old(self._offset, self._before, self._skip)),
                (self._skip, data),
                (end, self._old(self._offset + end, self._after, self._after_length)),
            )
            at = 0
            for clusters in taken:
                at = self._fill(clusters, at, parts)
        except BaseException:
            self._refcounts.give_back(taken)
            raise
        self.stored = taken

    def take_table(self) -> None:
        """Allocate one cluster for a table, which is written later."""
        taken = self._take()
        self._refcounts.claim(taken[0].position, 1, taken[0].position)
        self.stored = taken

    def _old(self, offset: int, runs: Sequence[Run], length: int) -> memoryview | None:
        """What the guest's bytes were; None for zeroes."""
        if not length or all(isinstance(run, ZeroRun) for run in runs):
            return None
        buffer = bytearray(length)
        read_runs(self._name, offset, runs, memoryview(buffer))
        return memoryview(buffer)

    def _take(self) -> list[Taken]:
        bits = self._refcounts.cluster_bits
        left = self._length >> bits
        taken: list[Taken] = []
        try:
            while left:
                taken.append(self._refcounts.take(left))
                left -= taken[-1].count
        except BaseException:
            self._refcounts.give_back(taken)
            raise
        return taken

    def _fill(
        self, clusters: Taken, at: int, parts: Sequence[tuple[int, memoryview | None]]
    ) -> int:
        """Write the bytes from ``at`` on into these clusters; returns where the next ones go on."""
        end = at + (clusters.count << self._refcounts.cluster_bits)
        written = at
        for start, part in parts:
            if part is None:
                continue
            begin, stop = max(start, at), min(start + len(part), end)
            if begin >= stop:
                continue
            self._zeroes(clusters, at, written, begin)
            store(self._file, clusters.position + begin - at, part[begin - start : stop - start])
            written = stop
        self._zeroes(clusters, at, written, end)
        return end

    def _zeroes(self, clusters: Taken, at: int, begin: int, end: int) -> None:
        if begin < end and not clusters.fresh:
            store(self._file, clusters.position + begin - at, bytes(end - begin))


class WriteBack:
    """All changes of the tables at one moment, to be written.

    Attributes:
        taken: the changes of L1 and L2 tables.
        given_up: clusters of a refcount table that was replaced.
        done: is all of it durable?
        lost: has the kernel failed to store something it had accepted? Then it is lost.
    """

    def __init__(self, file: ImageFile, refcounts: Refcounts, taken: Snapshot) -> None:
        self._file = file
        self._refcounts = refcounts
        self.taken = taken
        self.given_up: list[tuple[int, int]] = []
        self.done = False
        self.lost = False

    def perform(self) -> None:
        """Write and sync, in order. Raises OSError."""
        changes = self._refcounts.changes()
        try:
            self._write(changes)
        except BaseException:
            self._refcounts.put_back(changes)
            raise
        if changes.old_table is not None:
            position, clusters = changes.old_table
            self.given_up.append((position >> self._refcounts.cluster_bits, clusters))
        self.done = True

    def _write(self, changes: Changes) -> None:
        self._store(changes.blocks)
        self._store(self.taken.new)
        self._sync()
        if changes.table:
            self._store(changes.table)
            self._sync()
        if self.taken.entries:
            self._store(self.taken.entries)
            self._sync()

    def _store(self, writes: Iterable[tuple[int, bytes]]) -> None:
        for position, data in writes:
            store(self._file, position, data)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file.fd)
        except OSError:
            self.lost = True
            raise


def release(file: ImageFile, refcounts: Refcounts, runs: Sequence[tuple[int, int]]) -> None:
    """Nothing refers to these clusters (first, count) any more, durably: one reference less each.

    What has none left becomes a hole, where the file system can, while it cannot be given away yet.
    """
    bits = refcounts.cluster_bits
    if not file.device:
        for first, count in refcounts.sole(runs):
            with suppress(OSError):
                punch_hole(file.fd, file.base + (first << bits), count << bits)
    try:
        refcounts.drop(runs)
    except CorruptImage as error:
        log.warning("qcow2.refcount %s", error)  # what is left of them stays in use
