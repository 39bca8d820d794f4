"""qcow2 images that are written to.

::

    write   in place     a cluster of our own, as it is           a thread stores, nothing else
            elsewhere    absent, zero, compressed, shared         allocate, store all of it, enter
    zero    zero clusters (version 2: nothing, where nothing lies below)
    trim    likewise; a cluster is given up, and never shows what lies below
    flush   see ``writable_base``

Rule: a cluster that is being allocated is ``busy``; whoever else wants it waits, then looks again.
"""

import asyncio
import errno as os_errno
from array import array

from nbdsrv.disk.disk import Ability
from nbdsrv.disk.residency import NEVER, Residency
from nbdsrv.disk.runs import FileRun, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.image_lock import lock_for_writing
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind
from nbdsrv.formats.qcow2.opening import open_layers
from nbdsrv.formats.qcow2.reader import Layers
from nbdsrv.formats.qcow2.structs import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from nbdsrv.formats.qcow2.writable_base import ChangingQcow2
from nbdsrv.formats.qcow2.writable_start import Start, check_writable
from nbdsrv.formats.qcow2.writable_store import NewClusters, Turns, store
from nbdsrv.formats.qcow2.writable_tables import Table

__all__ = ["WritableQcow2", "open_writable"]

MAX_NEW = 64
"""Clusters allocated together: 4 MiB of 64 KiB, more than most writes."""
PLACE_AHEAD = 32
"""Clusters that ``place`` looks at beyond those it was asked for, where the tables change."""

_NOWHERE = (0, FileRun(-1, 0, 0, Residency(NEVER)))
_DATA, _ZERO, _ABSENT = int(Kind.DATA), int(Kind.ZERO), int(Kind.ABSENT)


async def open_writable(file: ImageFile, opening: Opening) -> "WritableQcow2":
    """``file`` as an image nobody else is writing to, the Disk owns it then.

    Raises:
        CorruptImage: it contradicts itself.
        UnsupportedImage: it is of a kind that is only read.
        DiskError: somebody else has it open.
    """
    workers = opening.workers
    await workers.look_up(lock_for_writing, file)
    layers = await open_layers(file, opening)
    try:
        start = await workers.look_up(_start, layers)
        return WritableQcow2(workers, layers, start)
    except BaseException:
        if layers.data_file is not None:
            layers.data_file.close()
        if layers.backing is not None:
            await layers.backing.close()
        raise


def _start(layers: Layers) -> Start:
    check_writable(layers)
    return Start(layers)


class WritableQcow2(ChangingQcow2):
    """The current state of an image, to be changed."""

    def __init__(self, workers: Workers, layers: Layers, start: Start) -> None:
        """Becomes the owner of the files and the backing Disk."""
        super().__init__(workers, layers, start)
        self.abilities = (
            Ability.WRITE | Ability.FLUSH | Ability.TRIM | Ability.ZERO | Ability.MULTI_CONN
        )
        self._zero_clusters = self.header.version > 2
        if self._zero_clusters or self.backing is None:
            self.abilities |= Ability.FAST_ZERO
        self._busy: dict[int, asyncio.Event] = {}
        self._turns = Turns()
        self._placed: dict[int, tuple[int, FileRun]] = {}
        self._placed_at = -1

    # --- writing -------------------------------------------------------------------------------

    def place(self, offset: int, length: int) -> FileRun | None:
        """Clusters of our own; their entries may not be durable yet, so there is no DIRECT_FUA."""
        if self._placed_at != self.epoch:
            self._placed.clear()
        number = offset >> self._bits + self._l2_bits
        first, run = self._placed.get(number, _NOWHERE)
        if not first <= offset <= offset + length <= first + run.length:
            if not self._prepared or self._flush_failed or self._closed or not length:
                return None
            # Looking far pays only where the tables stand still.
            ahead = None if self._placed_at == self.epoch else PLACE_AHEAD
            self._placed_at = self.epoch
            found = self._find_place(offset, length, ahead)
            if found is None:
                return None
            first, run = self._placed[number] = found
        skip = offset - first
        return run._replace(position=run.position + skip, length=run.length - skip)

    def _find_place(
        self, offset: int, length: int, ahead: int | None
    ) -> tuple[int, FileRun] | None:
        """Where the first of the clusters in place begins, and all of them up to ``ahead`` more."""
        cluster = offset >> self._bits
        table = self._tables.get(cluster >> self._l2_bits)
        if table is None:
            return None
        index = cluster & (1 << self._l2_bits) - 1
        limit = len(table.words)
        if ahead is not None:
            wanted = (offset + length - 1 >> self._bits) - cluster + 1
            limit = min(index + wanted + ahead, limit)
        count = self._in_place(table, index, limit)
        first = cluster << self._bits
        reach = min(count << self._bits, self.size - first)
        if first + reach < offset + length:
            return None
        return first, self.file.run(table.words[index] & OFFSET_MASK, reach)

    def _in_place(self, table: Table, index: int, limit: int) -> int:
        """How many clusters from ``index`` on are our own and follow each other in the file."""
        words, size = table.words, self.header.cluster_size
        word = words[index]
        if not table.own or word & (COPIED | COMPRESSED | ZERO_FLAG) != COPIED:
            return 0
        if not self._sound(word):
            return 0
        host = (word & OFFSET_MASK) >> self._bits
        most = min(limit - index, (self.file.size >> self._bits) - host)
        # A stretch at a time, twice as long while they go on, half as long once one does not.
        count, step, growing = min(most, 1), 1, True
        while count < most and step:
            more = min(step, most - count)
            begin = word + count * size
            goes_on = words[index + count : index + count + more] == array(
                "Q", range(begin, begin + more * size, size)
            ) and self._refcounts.no_table(host + count, more)
            if goes_on:
                count += more
            growing = growing and goes_on
            step = step * 2 if growing else step // 2
        return count

    async def write(self, offset: int, data: memoryview) -> None:
        """In place where that is possible; durable after ``flush``."""
        self._check_change(offset, len(data))
        if data:
            await self._prepare()
        done = 0
        while done < len(data):
            done += await self._write_some(offset + done, data[done:])
        await self._relieve()

    async def _write_some(self, offset: int, data: memoryview) -> int:
        """Store what one thread can in one go; 0 if somebody else was at it."""
        cluster = offset >> self._bits
        event = self._busy.get(cluster)
        if event is not None:
            await event.wait()
            return 0
        table = await self._pin(cluster >> self._l2_bits)
        try:
            if cluster in self._busy:
                return 0
            index = cluster & (1 << self._l2_bits) - 1
            wanted = (offset + len(data) - 1 >> self._bits) - cluster + 1
            limit = min(index + wanted, len(table.words))
            self._check_entries(table, index, index + 1)
            count = self._in_place(table, index, limit)
            if not count:
                return await self._write_new(table, index, limit - index, offset, data)
            skip = offset & self.header.cluster_size - 1
            length = min((count << self._bits) - skip, len(data))
            position = (table.words[index] & OFFSET_MASK) + skip
            await self._run(store, self.file, position, data[:length])
            return length
        finally:
            table.pins -= 1

    async def _write_new(
        self, table: Table, index: int, count: int, offset: int, data: memoryview
    ) -> int:
        """Allocate clusters and fill them: with ``data``, and with what they held around it."""
        first = offset >> self._bits
        count = self._claim(table, index, first, min(count, MAX_NEW))
        try:
            start = first << self._bits
            stop = min(start + (count << self._bits), self.size)
            data = data[: stop - offset]
            after = offset + len(data)
            await self._own(table)
            new = NewClusters(
                self.file,
                self._refcounts,
                self.name,
                count << self._bits,
                start,
                await self.runs(start, offset - start) if offset > start else (),
                data,
                offset - start,
                await self.runs(after, stop - after) if after < stop else (),
                stop - after,
            )
            try:
                await self._run(new.store, self._turns, self._turns.issue())
            finally:  # even when cancelled: what has been stored is entered
                for taken in new.stored:
                    words = self._data_words(taken.position, taken.count)
                    self._replace(table, index, words)
                    self._changed(start, taken.count << self._bits, _DATA, taken.position)
                    index += taken.count
                    start += taken.count << self._bits
            return len(data)
        finally:
            self._unclaim(first, count)

    def _data_words(self, position: int, count: int) -> "array[int]":
        begin, size = position | COPIED, self.header.cluster_size
        return array("Q", range(begin, begin + count * size, size))

    # --- zeroing -------------------------------------------------------------------------------

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Whole clusters by their entries, the rest by writing."""
        self._check_change(offset, length)
        first, last = self._whole(offset, length)
        if fast and (Ability.FAST_ZERO not in self.abilities or (length and first >= last)):
            raise DiskError(f"{self.name}: no faster than writing", os_errno.EOPNOTSUPP)
        if not length:
            return
        await self._prepare()
        if first >= last:
            await self._zero_within(offset, length)
            return
        start, stop = first << self._bits, last << self._bits
        await self._zero_within(offset, start - offset)
        await self._clear(first, last, give_up=punch, zeroes=True)
        await self._zero_within(stop, offset + length - stop)
        await self._relieve()

    async def trim(self, offset: int, length: int) -> None:
        """Give up whole clusters; they read as zeroes then. Others stay as they are."""
        self._check_change(offset, length)
        first, last = self._whole(offset, length)
        if first < last:
            await self._prepare()
            await self._clear(first, last, give_up=True, zeroes=False)
            await self._relieve()

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters that are within the range; nothing lies beyond the disk's end."""
        end = offset + length
        last = end if end < self.size else end + self.header.cluster_size - 1
        return offset + self.header.cluster_size - 1 >> self._bits, last >> self._bits

    async def _zero_within(self, offset: int, length: int) -> None:
        """Zeroes in a part of one or two clusters, unless they are there anyway."""
        end = offset + length
        while offset < end:
            upto = min((offset >> self._bits) + 1 << self._bits, end)
            runs = await self.runs(offset, upto - offset)
            if not all(isinstance(run, ZeroRun) for run in runs):
                await self.write(offset, memoryview(bytes(upto - offset)))
            offset = upto

    async def _clear(self, first: int, last: int, *, give_up: bool, zeroes: bool) -> None:
        """Clusters first to last read as zeroes; ``zeroes``: even where that takes writing."""
        while first < last:
            number = first >> self._l2_bits
            stop = min(last, number + 1 << self._l2_bits)
            if self._tables.l1[number] or self._below(first, stop - first) or not give_up:
                await self._clear_in_table(number, first, stop, give_up=give_up, zeroes=zeroes)
                await self._relieve()
            first = stop

    async def _clear_in_table(
        self, number: int, first: int, stop: int, *, give_up: bool, zeroes: bool
    ) -> None:
        while first < stop:
            event = self._busy.get(first)
            if event is not None:
                await event.wait()
                continue
            table = await self._pin(number)
            try:
                await self._own(table)
                first = self._clear_some(table, first, stop, give_up=give_up)
            finally:
                table.pins -= 1
            if first < stop and first not in self._busy:
                if zeroes:  # version 2 has no other way to hide what lies below
                    size = self.header.cluster_size
                    start = first << self._bits
                    await self.write(start, memoryview(bytes(min(size, self.size - start))))
                first += 1

    def _clear_some(self, table: Table, first: int, stop: int, *, give_up: bool) -> int:
        """Clear entries until one is busy or cannot be; returns its cluster. Never waits."""
        words, base = table.words, table.number << self._l2_bits
        self._check_entries(table, first - base, stop - base)
        give_up = give_up and self._may_give_up()
        below = self._clusters_below()
        while first < stop and first not in self._busy:
            begin, word = first, self._cleared(words[first - base], first < below, give_up)
            if word is None:
                break
            first += 1
            while (
                first < stop
                and word & OFFSET_MASK == 0
                and first not in self._busy
                and self._cleared(words[first - base], first < below, give_up) == word
            ):
                first += 1
            new = array("Q", [word]) * (first - begin)
            if words[begin - base : first - base] != new:
                self._replace(table, begin - base, new)
                kind = _ZERO if word else _ABSENT
                self._changed(begin << self._bits, (first - begin) << self._bits, kind)
        return first

    def _cleared(self, word: int, below: bool, give_up: bool) -> int | None:  # noqa: FBT001
        """The entry that makes a cluster read as zeroes; None if there is none."""
        if not word and not below and give_up:
            return 0
        if not self._zero_clusters:
            return None if below else 0
        if not give_up and word & (COPIED | COMPRESSED) == COPIED and word & OFFSET_MASK:
            return word | ZERO_FLAG
        if word & ZERO_FLAG and not word & COMPRESSED and not word & OFFSET_MASK:
            return word
        return ZERO_FLAG if below or not give_up else 0

    def _below(self, first: int, count: int) -> bool:
        return self._inside_backing(first << self._bits, count << self._bits) > 0

    def _clusters_below(self) -> int:
        return -(-self.backing.size >> self._bits) if self.backing is not None else 0

    def _claim(self, table: Table, index: int, cluster: int, limit: int) -> int:
        """Make clusters busy that cannot be written in place; how many."""
        count = 0
        while count < limit and cluster + count not in self._busy:
            at = index + count
            if count and self._in_place(table, at, at + 1):
                break
            count += 1
        self._check_entries(table, index, index + count)
        self._busy |= dict.fromkeys(range(cluster, cluster + count), asyncio.Event())
        return count

    def _unclaim(self, cluster: int, count: int) -> None:
        event = self._busy[cluster]
        for each in range(cluster, cluster + count):
            del self._busy[each]
        event.set()

    def _check_change(self, offset: int, length: int) -> None:
        if self._closed:
            raise DiskError(f"{self.name} is closed")
        self._check(offset, length, os_errno.ENOSPC)
        self._check_flushed()
